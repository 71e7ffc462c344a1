"""How a worker process is born and ends: its cores, its environment, its last words."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

#: Thread placement of the parent's own: it would overrule the cores given to the worker.
NOT_INHERITED = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_WAIT_POLICY", "OMP_DYNAMIC")

#: Rounds an idle OpenMP thread spins before it sleeps. The default (300,000, about 7 ms) burns the
#: cores that were just handed to another worker; sleeping at once makes small networks slower.
SPIN_ROUNDS = "10000"

TAIL_BYTES = 4000


@contextlib.contextmanager
def on_cores(cores: Sequence[int] | None) -> Iterator[None]:
    """Put the calling thread on `cores` for a moment: a process started now inherits them.

    Set later, from inside the worker or on its number, the threads that libraries make while
    they are imported would be missed.
    """
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, ValueError) as error:
        raise ValueError(f"cores = {tuple(cores)}: must be cores of this machine ({error})") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def worker_env(threads: int, extra: dict[str, str]) -> dict[str, str]:
    """Environment of a worker with `threads` threads: settled before any library reads it."""
    env = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    here = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([here, *filter(None, sys.path)]))  # a notebook's own networks too
    return env | {"GOMP_SPINCOUNT": SPIN_ROUNDS} | extra


def keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    """Read a worker's standard error to its end, so that it never blocks; keep the last words."""
    with stream:
        while data := stream.read(4096):
            tail += data
            del tail[:-TAIL_BYTES]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill `process`, wait for its end and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def threads_of(pid: int) -> set[int]:
    """Numbers of the threads of a process.

    Raises
    ------
    FileNotFoundError
        If there is no such process.
    """
    return {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}


def spread(pid: int, team: Sequence[int], cores: Sequence[int]) -> None:
    """Put all threads of a process on `cores`, and deal those out among `team`.

    The team computes in step. Left to the kernel, two of its threads stay on one core for seconds
    when a foreign thread runs on the other, and each waits for the other in every layer: three
    times slower again than the foreign thread makes it.

    Raises
    ------
    FileNotFoundError
        If there is no such process.
    OSError
        If none of the cores can be used.
    """
    done: set[int] = set()
    while fresh := threads_of(pid) - done:  # again, for threads born meanwhile
        for thread in fresh:
            i = team.index(thread) if thread in team else 0
            place = (cores[i :: len(team)] or [cores[i % len(cores)]]) if thread in team else cores
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, place)
        done |= fresh
