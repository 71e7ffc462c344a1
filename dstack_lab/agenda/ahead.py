"""Workers that load while others are measured: starting one takes ten times as long as measuring it."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from dstack_lab.devices import Device, Worker

#: Workers that load side by side; each computes on one core of the host meanwhile.
MOST = 8


class Ahead:
    """A device that starts the next workers together, and hands each out when it is asked for.

    All of a group are loaded before the first is handed out, and idle until then: nothing loads while
    one is measured.

    Parameters
    ----------
    device : Device
    coming : sequence of tuple
        Network and share of the workers that will be asked for, in order.
    most : int
        Workers in a group.
    timeout_s : float
        Longest wait for a group [s].
    **options
        Further arguments of every start.
    """

    def __init__(
        self, device: Device, coming: Sequence[tuple[str, float]], most: int = MOST, timeout_s: float = 240.0, **options: Any
    ) -> None:
        self.device, self.coming, self.most, self.timeout_s, self.options = device, list(coming), most, timeout_s, options
        self.name, self.mechanism = device.name, device.mechanism
        self.waiting: dict[tuple[str, float], Worker] = {}

    def shares(self) -> tuple[float, ...]:
        """As the device."""
        return self.device.shares()

    def describe(self) -> str:
        """As the device."""
        return self.device.describe()

    def marks(self) -> tuple[str, ...]:
        """As the device."""
        return self.device.marks()

    def leases(self) -> Any:
        """As the device."""
        return self.device.leases()

    def start(self, model: str, gpu_pct: float, cores: Sequence[int] | None = None, **options: Any) -> Worker:
        """Return a worker that is loaded, or about to be; see `Device.start`."""
        options |= self.options
        wanted = model, gpu_pct
        if wanted not in self.waiting:
            if wanted not in self.coming:  # the second worker of a point whose first one failed
                return self.device.start(model, gpu_pct, cores, **options)
            at = self.coming.index(wanted)
            group, self.coming = self.coming[at : at + self.most], self.coming[at + self.most :]
            for one in group:
                self.waiting[one] = self.device.start(*one, **options)
            self._wait(time.monotonic() + self.timeout_s)
        return self.waiting.pop(wanted)

    def _wait(self, end_s: float) -> None:
        """Wait until every worker has said something; what it says is for whoever gets it."""
        silent = {worker.fileno() for worker in self.waiting.values()}
        while silent and (left_s := end_s - time.monotonic()) > 0:
            silent -= set(select.select(list(silent), [], [], left_s)[0])

    def close(self) -> None:
        """End the workers that nobody asked for."""
        while self.waiting:
            self.waiting.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
