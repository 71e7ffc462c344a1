"""The process that holds all tenants of one GPU: each has a thread, a channel and a network.

A tenant speaks `dstack_lab.protocol` on its channel, as a worker process does on its pipes. A ``run``
or ``time`` may carry ``groups``, the SMs it is lent from now on; the answer to ``run`` says
``granted_sms`` and whether a CUDA graph was replayed (``path``: ``graph`` or ``eager``).

Started by `dstack_lab.devices.green_process`, which passes the room `dstack_lab.worker`: a device may
not import it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from dstack_lab.protocol import Lines, Message, encode
from dstack_lab.provenance import versions_here

MESSAGE_BYTES = 65536

#: After one of these every later call of this process fails, whoever makes it.
FATAL = ("cuda error", "cudnn_status_execution_failed", "cuda_error_illegal", "cuda_error_launch_failed")
FATAL_STATUS = 70

#: Longest that a tenant waits for another's thread to let go of the interpreter [s].
SWITCH_S = 2e-4


class Tenant:
    """One network at one share, served by a thread.

    Parameters
    ----------
    channel : socket.socket
    options : argparse.Namespace
        Of its backend.
    backend : object
        As `dstack_lab.worker.Backend`, with ``use(groups)``, ``facts()`` and ``serving`` beside it:
        only while it serves are its groups its own. A tenant that replaces a lost one loads and
        warms up on SMs that others may be using.
    worker : module
        `dstack_lab.worker`.
    turn : threading.Lock
        One tenant loads at a time: a CUDA graph must not be captured while others allocate.
    """

    def __init__(
        self, channel: socket.socket, options: argparse.Namespace, backend: Any, worker: Any, turn: threading.Lock
    ) -> None:
        self.channel, self.options, self.backend, self.worker, self.turn = channel, options, backend, worker, turn

    def serve(self) -> None:
        """Load, say ready, answer requests until ``stop`` or the end of the channel."""
        with self.channel, contextlib.suppress(OSError):  # the parent hung up: nobody to answer
            if self._load():
                lines = Lines()
                while data := self.channel.recv(MESSAGE_BYTES):
                    for message in lines.feed(data):
                        if message.get("op") == "stop":
                            return
                        self._send(self._answer(message))

    def _load(self) -> bool:
        begin = time.perf_counter()
        with self.turn:
            try:
                facts = self.backend.load()
            except Exception as error:
                self._send({"reply": "failed", **self.worker.describe(error)})
                return False
            if self.options.batches:
                warm = self.worker.answer(self.backend, {"op": "warm", "batches": list(self.options.batches)})
                if warm["reply"] == "error":
                    self._send({**warm, "reply": "failed"})
                    return False
        self.backend.serving = True
        gc.freeze()  # what torch and the network are made of stays: no collection need visit it
        ready: Message = {"reply": "ready", "pid": os.getpid(), "threads": 1, "cores": sorted(os.sched_getaffinity(0))}
        ready |= {"facts": facts, "versions": versions_here("torch", "torchvision", "cuda-bindings")}
        self._send({**ready, "load_ms": (time.perf_counter() - begin) * 1e3})
        return True

    def _answer(self, message: Message) -> Message:
        begin = time.thread_time()
        try:
            if "groups" in message:
                self.backend.use(message["groups"])
        except Exception as error:
            reply = {"reply": "error", **self.worker.describe(error), **({"id": message["id"]} if "id" in message else {})}
        else:
            reply = self.worker.answer(self.backend, message)
        if reply["reply"] == "run":
            reply |= self.backend.facts()
        if "cpu_ms" in reply:
            reply["cpu_ms"] = (time.thread_time() - begin) * 1e3  # the process's is that of all tenants
        return dict(reply)

    def _send(self, message: Message) -> None:
        self.channel.sendall(encode(message))
        text = str(message.get("message", "")).lower()
        if message["reply"] in ("failed", "error") and any(word in text for word in FATAL):
            sys.stderr.write(f"the GPU's state is lost for this process: {message['message']}\n")
            sys.stderr.flush()
            os._exit(FATAL_STATUS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--control", type=int, required=True, help="descriptor of the socket that brings tenants")
    parser.add_argument("--backend", required=True, help="package.module:Class")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--fine", action="store_true")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--parent-signal", action="store_true", help="end by the kernel's parent-death signal")
    return parser.parse_args(arguments)


def main(worker: Any, arguments: Sequence[str] | None = None) -> None:
    """Take in tenants until the parent closes the control socket; ends the process."""
    options = parse(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    worker.end_with_parent(options.parent, options.parent_signal)
    sys.setswitchinterval(SWITCH_S)
    module, _, name = options.backend.partition(":")
    backend_class = getattr(importlib.import_module(module), name)
    turn = threading.Lock()
    with socket.socket(fileno=options.control) as control:
        while True:
            data, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
            if not data:
                break
            (message,) = Lines().feed(data)
            channel = socket.socket(fileno=fds[0])
            theirs = argparse.Namespace(device=options.device, fine=options.fine, **message)
            tenant = Tenant(channel, theirs, backend_class(theirs), worker, turn)
            threading.Thread(target=tenant.serve, daemon=True, name=theirs.model).start()
    sys.stderr.flush()
    os._exit(0)  # torch's threads and a network of one's own may hold up an orderly end
