"""What every device offers, so that the profiler and the runner need not know which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from dstack_lab.protocol import Message


class WorkerError(RuntimeError):
    """A worker did not do what was asked."""


class WorkerDied(WorkerError):
    """A worker's process is gone.

    Parameters
    ----------
    message : str
        How it ended, and its last words.
    exit_code : int or None
        Exit status; None if a signal ended it.
    signal : int or None
        Number of the signal that ended it.
    """

    def __init__(self, message: str, exit_code: int | None = None, signal: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.signal = signal


class WorkerTimeout(WorkerError):
    """A worker did not answer in time; it may still be running."""


class WorkerFailed(WorkerError):
    """A worker answered that it could not do it.

    Parameters
    ----------
    message : str
        Its words.
    kind : str
        One of `dstack_lab.protocol.ERRORS`.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker(Protocol):
    """A network loaded at a share, ready to serve batches (see `dstack_lab.protocol`)."""

    model: str
    gpu_pct: float

    @property
    def pid(self) -> int:
        """Process that serves."""

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""

    def fileno(self) -> int:
        """Descriptor that becomes readable when an answer came, or when the worker died."""

    def send(self, message: Message) -> None:
        """Hand over a request."""

    def poll(self) -> list[Message]:
        """Return the answers that are here, oldest first; never waits."""

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Wait for the next answer; None after `timeout_s` seconds."""

    def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a request and wait for its answer."""

    def wait_ready(self, timeout_s: float = ...) -> Message:
        """Wait until the network is loaded and warm."""

    def close(self, timeout_s: float = ...) -> None:
        """End in good order; by force after `timeout_s` seconds."""

    def kill(self) -> None:
        """End at once."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Leases(Protocol):
    """Keeps launches that run at the same time apart."""

    def take(self, worker: Any) -> None:
        """Give `worker` what its share stands for, for itself alone."""

    def give(self, worker: Any) -> None:
        """Take it back."""


@runtime_checkable
class Device(Protocol):
    """Where shares are real. Constructing one touches nothing."""

    @property
    def name(self) -> str:
        """One word: ``"cpu"``, ``"mps"``, ``"green"``."""

    @property
    def mechanism(self) -> str:
        """How a share is made real, for `Provenance`."""

    def shares(self) -> tuple[float, ...]:
        """GPU% that can be granted, in rising order."""

    def describe(self) -> str:
        """Name of the hardware, for `Provenance`."""

    def leases(self) -> Leases:
        """Who computes where, for one run."""

    def marks(self) -> tuple[str, ...]:
        """Reservations about numbers recorded here and now, each as ``"kind: sentence"``."""

    def start(
        self,
        model: str,
        gpu_pct: float,
        cores: Sequence[int] | None = None,
        *,
        batches: Sequence[int] = (),
        weights: str | None = None,
        seed: int = 0,
        memory_mib: float | None = None,
    ) -> Worker:
        """Start a worker and return at once; `Worker.wait_ready` waits for it."""
