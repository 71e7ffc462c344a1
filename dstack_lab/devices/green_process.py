"""The parent's side of the process that holds all tenants of a GPU: one worker object a tenant."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence

from dstack_lab.checks import count, percent, require
from dstack_lab.devices.base import WorkerDied, WorkerFailed, WorkerTimeout
from dstack_lab.devices.green_driver import without_mps
from dstack_lab.devices.process import WorkerProcess
from dstack_lab.devices.spawn import end, keep_tail
from dstack_lab.protocol import Lines, Message, encode

#: The host is given the worker's room, which lies above this one.
PROGRAM = "from dstack_lab import worker; from dstack_lab.devices import green_host; green_host.main(worker)"

BACKEND = "dstack_lab.devices.green_backend:GreenBackend"

#: So many hardware queues that streams of different tenants need not wait in one: read when CUDA starts.
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}


class Host:
    """The one process for all tenants of a device; ends with its last tenant, or with this process.

    Parameters
    ----------
    device : int
    fine : bool
    """

    _live: dict[tuple[int, bool], Host] = {}  # noqa: RUF012

    def __init__(self, device: int, fine: bool) -> None:
        self.tenants = 0
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", PROGRAM, f"--device={device}", f"--backend={BACKEND}", f"--control={theirs.fileno()}"]
        command += [f"--parent={os.getpid()}", *(["--fine"] if fine else [])]
        command += ["--parent-signal"] if threading.current_thread() is threading.main_thread() else []
        stack = contextlib.ExitStack()  # left when the process has ended
        env = stack.enter_context(without_mps()) | ENVIRONMENT
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                bufsize=0,
                env=env,
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent only
            )
        self.finalizer = weakref.finalize(self, _end_host, self.process, self._control, stack)  # also at interpreter exit
        self.tail = bytearray()
        assert self.process.stderr is not None
        self.listener = threading.Thread(target=keep_tail, args=(self.process.stderr, self.tail), daemon=True)
        self.listener.start()

    @classmethod
    def of(cls, device: int, fine: bool) -> Host:
        """Return the living host of a device, or start one.

        Raises
        ------
        ValueError
            If the device lives with another `fine`: the two splits would overlap.
        """
        for (number, other), host in list(cls._live.items()):
            if not host.alive:
                del cls._live[number, other]
            elif number == device:
                require(other == fine, "fine", fine, f"{other} while workers of that split of device {device} live: close them")
        if (device, fine) not in cls._live:
            cls._live[device, fine] = cls(device, fine)
        return cls._live[device, fine]

    @property
    def alive(self) -> bool:
        """Whether it can take in tenants."""
        return self.finalizer.alive and self.process.poll() is None

    def admit(self, message: Message) -> socket.socket:
        """Start a tenant and return the channel to it.

        Raises
        ------
        WorkerDied
            If the process has ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [encode(message)], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise WorkerDied(f"the process of all tenants ended before {message['model']} began ({error})") from error
        self.tenants += 1
        return ours

    def leave(self, timeout_s: float) -> None:
        """Count a tenant out; the last one ends the process, by force after `timeout_s` seconds."""
        self.tenants -= 1
        if self.tenants <= 0 and self.finalizer.alive:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
            self.kill()

    def kill(self) -> None:
        """End the process and with it all tenants; twice is fine."""
        self.finalizer()
        self.listener.join(1.0)


def _end_host(process: subprocess.Popen[bytes], control: socket.socket, stack: contextlib.ExitStack) -> None:
    with stack:
        control.close()
        end(process)


class GreenWorker(WorkerProcess):
    """A tenant of the process that holds all networks of a GPU.

    Ending one by force while it computes ends all: what runs on a GPU cannot be called back, and a
    fault of one tenant's kernel is a fault of the process.

    Parameters
    ----------
    device : int
    fine : bool
    model : str
    gpu_pct : float
        Share it stands for.
    units : int
        Groups it computes on.
    homes : sequence of tuple of int
        Groups to prepare for; it has the first until told otherwise.
    groups : tuple of int
        SMs of all groups, as the parent knows them.
    batches, weights, seed, pool
        As of `WorkerProcess`.
    precision, channels_last, graphs
        As of `green.Green`.
    """

    def __init__(
        self,
        device: int,
        fine: bool,
        model: str,
        gpu_pct: float,
        *,
        units: int,
        homes: Sequence[tuple[int, ...]],
        groups: tuple[int, ...],
        batches: Sequence[int] = (),
        weights: str | None = None,
        seed: int = 0,
        pool: int = 64,
        precision: str = "fp16",
        channels_last: bool = True,
        graphs: bool = True,
    ) -> None:
        require(isinstance(model, str) and bool(model), "model", model, "the name of a network")
        self.model, self.gpu_pct = model, percent("gpu_pct", gpu_pct)
        self.threads, self.cores, self.granted_sms = 1, None, None
        self.units, self.homes, self.groups, self.layout = units, tuple(homes), homes[0], groups
        batches = [count("batch", b) for b in batches]
        message: Message = {"model": model, "weights": weights, "seed": count("seed", seed, least=0), "batches": batches}
        message |= {"precision": precision, "channels_last": channels_last, "graphs": graphs}
        message |= {"homes": self.homes, "pool": max([count("pool", pool), *batches])}
        self.host = Host.of(device, fine)
        self._channel = self.host.admit(message)
        self._process, self._tail, self._listener = self.host.process, self.host.tail, self.host.listener
        # Not `end`, as of a worker with a process of its own.
        self._finalizer = weakref.finalize(self, _hang_up, self._channel, self.host)  # type: ignore[call-arg, arg-type]
        self._channel.setblocking(False)
        self._in = self._out = self._channel.fileno()
        self._readable = select.poll()
        self._readable.register(self._out, select.POLLIN)
        self._lines, self._inbox, self._ended = Lines(), deque[Message](), False
        self._team: list[int] = []
        self._owed = 1  # answers that will come: ready is the first

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return self._finalizer.alive and self.host.alive

    def use(self, groups: Iterable[int]) -> None:
        """Compute on these groups from the next request on."""
        self.groups = tuple(sorted(groups))

    def send(self, message: Message) -> None:
        """Hand over a request, with the groups it may use.

        Raises
        ------
        WorkerDied, WorkerTimeout
            As `WorkerProcess.send`.
        """
        if message.get("op") in ("run", "time", "warm"):
            message = {**message, "groups": self.groups}
            self._owed += 1
        super().send(message)

    def wait_ready(self, timeout_s: float = 300.0) -> Message:
        """Wait until the network is loaded and warm; return the ``ready`` message.

        Raises
        ------
        ValueError, WorkerFailed, WorkerDied, WorkerTimeout
            As `WorkerProcess.wait_ready`; also if the GPU was cut otherwise than the parent believes.
        """
        ready = super().wait_ready(timeout_s)
        found = tuple(ready["facts"].get("groups", self.layout))
        if found != self.layout:
            raise WorkerFailed(f"{self!r} has groups of {found} SMs, not {self.layout}: start this program anew", "failed")
        return ready

    def pin(self, cores: Iterable[int]) -> None:
        """Refuse: a tenant's share is its groups, see `use`.

        Raises
        ------
        ValueError
            Always.
        """
        require(False, "cores", tuple(cores), "left alone: a tenant of green contexts has groups of SMs")

    def close(self, timeout_s: float = 5.0) -> None:
        """Ask the tenant to stop, wait `timeout_s` seconds, then end it by force. Twice is fine."""
        if not self._finalizer.alive:
            return
        try:
            with contextlib.suppress(WorkerDied, WorkerTimeout):
                self.send({"op": "stop"})
                deadline_ms = timeout_s * 1e3
                while not self._ended and self._readable.poll(deadline_ms):
                    self._read()
            self._owed = 0 if self._ended else 1
        finally:
            self._leave(timeout_s)

    def kill(self) -> None:
        """End the tenant at once, and all others with it if it was computing. Twice is fine."""
        self._leave(0.0)

    def _leave(self, timeout_s: float) -> None:
        if not self._finalizer.detach():
            return
        if self._owed:
            self.host.kill()
        self._channel.close()
        self._ended, self._in, self._out = True, -1, -1
        self.host.leave(timeout_s)

    def _read(self) -> None:
        before = len(self._inbox)
        try:
            super()._read()
        except ConnectionResetError:  # it ended with a request unread
            self._ended = True
        self._owed -= len(self._inbox) - before


def _hang_up(channel: socket.socket, host: Host) -> None:
    """End a tenant that nobody holds any more."""
    channel.close()
    host.leave(0.0)
