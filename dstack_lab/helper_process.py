"""The process of a `Helper`: ``python -m dstack_lab.helper_process --line=FD --parent=PID``.

On its line comes, pickled, one function with its arguments after another; back go whether it returned and what, or what
it raised.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from dstack_lab.helper import READY
from dstack_lab.worker import end_with_parent

#: How much it stands back: beside workers that compute all the time it gets a quarter of what one of them does.
NICE = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Say ready, then answer until the line ends."""
    parser = argparse.ArgumentParser(prog="python -m dstack_lab.helper_process")
    parser.add_argument("--line", type=int, required=True, help="descriptor of the connection")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--parent-signal", action="store_true", help="end by the kernel's parent-death signal")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    end_with_parent(options.parent, options.parent_signal)
    importlib.import_module("dstack_lab.policies")  # what plans are made with: later it would take time from a run
    _stand_back()
    line = Connection(options.line)
    line.send_bytes(READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            line.send_bytes(answer(line.recv_bytes()))


def answer(data: bytes) -> bytes:
    """Compute what is asked for; return, pickled, whether it returned, and what it returned or raised."""
    try:
        function, given = _read(data)
        return pickle.dumps((True, function(*given)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return _error(error)


def _read(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except (AttributeError, ImportError) as error:
        cure = "put functions and classes that another process needs into a file that it can import"
        raise ValueError(f"{error}: {cure}") from error


def _error(error: Exception) -> bytes:
    """The error itself with what led to it; one that cannot travel as its words."""
    error.add_note("in another process:\n" + "".join(traceback.format_exception(error)))
    try:
        said = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(said)
    except Exception:
        said = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return said


def _stand_back() -> None:
    os.nice(NICE)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:  # sessions share cores first, processes then
        group.write(str(NICE))


if __name__ == "__main__":
    main()
