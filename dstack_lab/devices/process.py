"""A worker process: started with its cores and threads, spoken to through pipes, never left behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from dstack_lab.checks import count, percent, positive, require
from dstack_lab.devices.base import WorkerDied, WorkerFailed, WorkerTimeout
from dstack_lab.devices.spawn import end, keep_tail, on_cores, spread, worker_env
from dstack_lab.protocol import Lines, Message, encode


class WorkerProcess:
    """A worker in a process of its own. It serves until `close`, or until this process ends.

    Starting returns at once; the worker's first message is ``ready`` or ``failed``.

    Parameters
    ----------
    model : str
        A name of `dstack_lab.zoo`, or one's own network.
    gpu_pct : float
        Share it stands for.
    threads : int
        Threads it computes with.
    cores : sequence of int, optional
        Cores it may run on; those of this process otherwise.
    batches : sequence of int
        Batches it runs twice before saying ready.
    weights : str, optional
        ``"DEFAULT"`` for trained weights.
    seed : int
        Of weights and inputs.
    pool : int
        Number of different example inputs it holds.
    memory_mib : float, optional
        MiB that serving may allocate beyond the loaded network.
    env : dict of str to str, optional
        Further environment.
    backend : str
        The worker's ``--device``.

    Raises
    ------
    ValueError
        If an argument is out of range, or a core does not exist.
    """

    note = ""  #: what is not as it was asked for, though it serves: "; ..."

    def __init__(
        self,
        model: str,
        gpu_pct: float,
        *,
        threads: int = 1,
        cores: Sequence[int] | None = None,
        batches: Sequence[int] = (),
        weights: str | None = None,
        seed: int = 0,
        pool: int = 64,
        memory_mib: float | None = None,
        env: dict[str, str] | None = None,
        backend: str = "cpu",
    ) -> None:
        require(isinstance(model, str) and bool(model), "model", model, "the name of a network")
        self.model, self.gpu_pct = model, percent("gpu_pct", gpu_pct)
        self.granted_sms: int | None = None  #: as its ``ready`` says; None on a CPU
        self.threads = count("threads", threads)
        self.cores = None if cores is None else tuple(cores)
        batches = [count("batch", b) for b in batches]
        pool = max([count("pool", pool), *batches])
        command = [sys.executable, "-m", "dstack_lab.worker", f"--model={model}", f"--device={backend}"]
        command += [f"--threads={threads}", f"--seed={count('seed', seed, least=0)}", f"--pool={pool}"]
        command += [f"--batches={','.join(map(str, batches))}", f"--parent={os.getpid()}"]
        command += [f"--weights={weights}"] if weights else []
        command += [f"--memory-mib={positive('memory_mib', memory_mib)}"] if memory_mib is not None else []
        # The kernel's parent-death signal follows the thread that starts a worker: only the main thread lasts.
        command += ["--parent-signal"] if threading.current_thread() is threading.main_thread() else []
        with on_cores(self.cores):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=worker_env(self.threads, env or {}),
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent only
            )
        self._finalizer = weakref.finalize(self, end, self._process)  # also at interpreter exit
        assert self._process.stdin and self._process.stdout and self._process.stderr  # noqa: PT018
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._readable = select.poll()
        self._readable.register(self._out, select.POLLIN)
        self._lines, self._inbox, self._ended = Lines(), deque[Message](), False
        self._team: list[int] = []
        self._tail = bytearray()
        self._listener = threading.Thread(target=keep_tail, args=(self._process.stderr, self._tail), daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def __repr__(self) -> str:
        return f"<worker of {self.model} at {self.gpu_pct:g} %, pid {self.pid}>"

    def fileno(self) -> int:
        """Descriptor that becomes readable when an answer came, or when the worker died."""
        return self._out

    def send(self, message: Message) -> None:
        """Hand over a request.

        Raises
        ------
        WorkerDied
            If the process has ended.
        WorkerTimeout
            If the pipe is full and the worker reads nothing for 5 s.
        """
        data = encode(message)
        while data:
            try:
                data = data[os.write(self._in, data) :]
            except BlockingIOError:
                if not select.select([], [self._in], [], 5.0)[1]:
                    raise WorkerTimeout(f"{self!r} took no request for 5 s") from None
            except OSError:  # broken pipe, or closed by close()
                raise self._death() from None

    def poll(self) -> list[Message]:
        """Return the answers that are here, oldest first; never waits.

        Raises
        ------
        WorkerDied
            If the process has ended and its last answer was taken.
        """
        self._read()
        if self._ended and not self._inbox:
            raise self._death()
        answers = list(self._inbox)
        self._inbox.clear()
        return answers

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Wait for the next answer; None after `timeout_s` seconds.

        Raises
        ------
        WorkerDied
            If the process ended without one.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._inbox:
            if self._ended:
                raise self._death()
            left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
            if not self._readable.poll(left_ms):
                return None
            self._read()
        return self._inbox.popleft()

    def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a request and wait for its answer.

        Raises
        ------
        WorkerDied, WorkerTimeout
            If there is none.
        WorkerFailed
            If the answer is ``error``.
        """
        self.send(message)
        return self._expect(str(message["op"]), timeout_s)

    def wait_ready(self, timeout_s: float = 300.0) -> Message:
        """Wait until the network is loaded and warm; return the ``ready`` message.

        Raises
        ------
        ValueError
            If the worker refused its arguments: no such network, say.
        WorkerFailed, WorkerDied, WorkerTimeout
            If it could not load, ended, or took longer than `timeout_s` seconds.
        """
        return self._expect("ready", timeout_s)

    def _expect(self, reply: str, timeout_s: float) -> Message:
        message = self.receive(timeout_s)
        if message is None:
            raise WorkerTimeout(f"{self!r} gave no answer to {reply!r} within {timeout_s:g} s")
        if message["reply"] in ("failed", "error"):
            if message["error"] == "bad_input":
                raise ValueError(message["message"])
            raise WorkerFailed(f"{self!r} {message['error'].replace('_', ' ')}: {message['message']}", message["error"])
        return message

    def pin(self, cores: Iterable[int]) -> None:
        """Move all threads of the worker to `cores` now, its computing threads to one core each.

        With fewer cores than threads, say so in the next request's ``threads``: threads that
        wait for each other on one core are many times slower than one thread.

        Raises
        ------
        ValueError
            If none of the cores can be used.
        WorkerDied
            If the process has ended.
        """
        if not self._finalizer.alive:  # its number may be another process's by now
            raise self._death()
        cores = tuple(sorted(set(cores)))
        try:
            spread(self.pid, self._team, cores)
        except FileNotFoundError:
            raise self._death() from None
        except OSError as error:
            raise ValueError(f"cores = {cores}: must be cores of this machine ({error.strerror})") from error
        self.cores = cores

    def close(self, timeout_s: float = 5.0) -> None:
        """Ask the worker to stop, wait `timeout_s` seconds, then kill it. Twice is fine."""
        if not self._finalizer.alive:
            return
        try:
            with contextlib.suppress(WorkerDied, WorkerTimeout):
                self.send({"op": "stop"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the worker at once and free its pipes. Twice is fine."""
        self._finalizer()
        self._ended, self._in, self._out = True, -1, -1  # the descriptors may be another file's by now
        self._listener.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()  # it may be hung, or the user pressed Ctrl-C: no waiting

    def _read(self) -> None:
        while not self._ended:
            try:
                data = os.read(self._out, 65536)
            except BlockingIOError:
                return
            self._ended = not data
            for message in self._lines.feed(data):
                if message["reply"] == "ready":
                    self._team = message["facts"].get("team", [])
                    self.granted_sms = message["facts"].get("granted_sms")
                self._inbox.append(message)

    def _death(self) -> WorkerDied:
        """Say how the process ended, with its last words."""
        if not self._finalizer.alive:
            return WorkerDied(f"{self!r} was closed")
        try:
            status = self._process.wait(2.0)
        except subprocess.TimeoutExpired:  # it closed its pipe but lives: of no use to anyone
            self._process.kill()
            status = self._process.wait()
        self._listener.join(1.0)
        how = f"exited with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += " (out of memory? the kernel kills the largest process)" if status == -signal.SIGKILL else ""
        words = self._tail.decode(errors="replace").strip()
        how += f"; its last words: {words[-600:]}" if words else ""
        return WorkerDied(f"{self!r} {how}", status if status >= 0 else None, -status if status < 0 else None)
