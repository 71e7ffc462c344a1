"""Messages between a parent and its workers: one JSON object a line, over a pipe.

A request has the key ``op``, an answer the key ``reply``. A request may carry an ``id`` of any kind:
its answer carries the same one. Optional fields are in brackets.

========  ===================================================  =======  ==============================================
op        fields                                               reply    fields
========  ===================================================  =======  ==============================================
(start)                                                        ready    pid, threads, cores, versions, load_ms, facts
(start)                                                        failed   error, message; the worker then exits
``warm``  batches, [repeats], [threads]                        warm     wall_ms
``time``  batch, repeats, [min_ms], [max_ms], [threads]        time     samples_ms, cpu_ms, wall_ms
``run``   inputs, [threads]                                    run      outputs, service_ms, cpu_ms, start_ms, [path]
``stop``                                                                the worker exits with status 0
any                                                            error    error, message; the worker lives on
========  ===================================================  =======  ==============================================

- ``inputs``: numbers of example inputs, one a request; a number beyond the pool wraps around.
- ``outputs``: ``[class, score]`` for each input in the same order: the position of the largest
  output, and the mean of all outputs.
- ``service_ms``, ``samples_ms``: gathering the batch, the network, and reading its answer.
- ``start_ms``: when service began, on ``time.monotonic`` (one clock for all processes of a machine).
- ``cpu_ms``: processor time of all threads; ``cpu_ms / wall_ms`` is the number of effective cores.
- ``time`` repeats until `repeats` batches and `min_ms` are both reached, or `max_ms` is.
- ``threads``: use this many from now on, when a worker was leased another number of cores.
- ``facts``: what the backend has to say about its device; on the CPU ``team``, the numbers of the
  threads that compute.
- ``error``: one of `ERRORS`.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

OPS = ("warm", "time", "run", "stop")
REPLIES = ("ready", "failed", "warm", "time", "run", "error")

#: Kinds of failure: memory ran out, the request or the model's name was wrong, anything else.
ERRORS = ("out_of_memory", "bad_input", "failed")


def encode(message: Message) -> bytes:
    """Return `message` as one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Collects bytes as they come and gives back the messages that are whole."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """Take `data`, return the messages completed by it, oldest first.

        Raises
        ------
        ValueError
            If a line is not a JSON object.
        """
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [_decode(line) for line in whole if line.strip()]


def _decode(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except ValueError as error:  # undecodable bytes are one too
        raise ValueError(f"message = {line[:80]!r}: must be a line of JSON ({error})") from error
    if not isinstance(message, dict):
        raise ValueError(f"message = {line[:80]!r}: must be a JSON object")
    return message
