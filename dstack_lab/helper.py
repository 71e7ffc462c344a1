"""A process that computes what a policy asks for, so that a run's loop never stands still for it.

Not a thread: one that computes in Python takes the interpreter from the loop time and again. On two cores of their own a
loop woke 0.36 ms late (median; 99th percentile 0.9 ms) beside a thread that plans, 0.08 ms (0.15) beside a process or nothing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from dstack_lab.devices.spawn import keep_tail, worker_env
from dstack_lab.work import Work, WorkLost

#: What a process says when it can begin.
READY = b"ready"


class Helper:
    """Work through what is submitted, in a process of its own; `news` brings what came of it when `fileno` is readable.

    The process starts now and lasts until `close`, or until this process ends. One that died is replaced, and what it
    worked on is tried once more.
    """

    def __init__(self) -> None:
        self._lock, self._closing, self._ready = threading.Lock(), False, threading.Event()
        self._asked: SimpleQueue[tuple[Work, bytes] | None] = SimpleQueue()
        self._ended: SimpleQueue[tuple[Work, bytes | WorkLost]] = SimpleQueue()
        self._events: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._refused = self._how = ""  # why there never was a process; how the last one ended
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._begin()
        except BaseException:
            os.close(self._bell)
            raise
        self._thread = threading.Thread(target=self._go, name="dstack_lab helper", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def fileno(self) -> int:
        """Descriptor that becomes readable when there is news."""
        return self._bell

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the process has imported what it needs, which would take time from a run.

        Raises
        ------
        RuntimeError
            If it ended instead, or took longer.
        """
        if not self._ready.wait(timeout_s) or self._refused:
            why = self._refused or f"it is not ready after {timeout_s:g} s"
            raise RuntimeError(f"no process for the policy's work: {why}; policy.works_apart = False does without")

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Work:
        """Have ``function(*arguments)`` computed. What cannot be sent is the work's error."""
        work = Work()
        try:
            data = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            work.end(error=error)
        else:
            self._asked.put((work, data))
        return work

    def news(self) -> list[tuple[str, str]]:
        """End the work that is done, and return what happened to the process: kind and sentence."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        for work, answer in _drained(self._ended):
            if isinstance(answer, WorkLost):
                work.end(error=answer)
            else:
                _tell(work, answer)
        return _drained(self._events)

    def close(self) -> None:
        """End the process, whatever it does. Twice is fine."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._finalizer()
        self._asked.put(None)
        self._thread.join()
        self._line.close()
        os.close(self._bell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _begin(self) -> None:
        """Start a process; its first message is `READY`."""
        self._line, theirs = Pipe()
        command = [sys.executable, "-m", "dstack_lab.helper_process", f"--line={theirs.fileno()}", f"--parent={os.getpid()}"]
        # The kernel's parent-death signal follows the thread that starts a process: only the main thread lasts.
        command += ["--parent-signal"] if threading.current_thread() is threading.main_thread() else []
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=worker_env(1, {}),
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent only
            )
        except BaseException:
            self._line.close()
            raise
        finally:
            theirs.close()
        self._finalizer = weakref.finalize(self, _end, self._process)  # also at interpreter exit
        self._tail = bytearray()
        self._listener = threading.Thread(target=keep_tail, args=(self._process.stderr, self._tail), daemon=True)
        self._listener.start()

    def _go(self) -> None:
        """In the thread: hand one thing after another to the process. It waits most of the time, so the loop does not."""
        try:
            self._hear_ready(self._line)
        except (EOFError, OSError):
            self._refused = self._death()
        self._ready.set()
        while (asked := self._asked.get()) is not None:
            work, data = asked
            try:
                answer = self._answer(data)
            except OSError as error:  # no other process could be started
                answer = WorkLost(f"no process for the policy's work: {error}")
            if answer is None:
                return
            self._ended.put((work, answer))
            os.eventfd_write(self._bell, 1)

    @staticmethod
    def _hear_ready(line: Connection) -> None:
        if line.recv_bytes() != READY:
            raise EOFError

    def _answer(self, data: bytes) -> bytes | WorkLost | None:
        """What the process says, at the second try if it dies at the first; None when all is to end."""
        if self._process.poll() is not None and not self._again("it had nothing to do"):
            return None
        for note in ("what it worked on is tried again", "what it worked on is given up"):
            try:
                self._line.send_bytes(data)
                return self._line.recv_bytes()
            except (EOFError, OSError):
                if not self._again(note):
                    return None
        return WorkLost(f"the process for the policy's work {self._how}, twice at the same work")

    def _again(self, note: str) -> bool:
        """Start another process in place of one that died; False when all is to end."""
        self._how = self._death()
        with self._lock:
            if self._closing:
                return False
            self._events.put(("helper died", f"the process for the policy's work {self._how}; {note}"))
            os.eventfd_write(self._bell, 1)
            self._line.close()
            self._begin()
        with contextlib.suppress(EOFError, OSError):  # if it dies too, that is noticed at the next message
            self._hear_ready(self._line)
        return True

    def _death(self) -> str:
        """Say how the process ended, with its last words; afterwards it has."""
        _end(self._process)
        self._listener.join(1.0)
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        words = self._tail.decode(errors="replace").strip()
        return how + (f"; its last words: {words[-600:]}" if words else "")


def _tell(work: Work, answer: bytes) -> None:
    """End work with what the process said."""
    try:
        good, value = pickle.loads(answer)
    except Exception as error:
        good, value = False, error
    if good:
        work.end(value)
    else:
        work.end(error=value)


def _drained(queue: SimpleQueue[Any]) -> list[Any]:
    found: list[Any] = []
    with contextlib.suppress(Empty):
        while True:
            found.append(queue.get_nowait())
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and wait for its end."""
    process.kill()
    process.wait()
