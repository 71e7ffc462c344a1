"""A device that can be told to stop: what waits for one of its workers ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from dstack_lab.devices.base import Device, Leases, Worker


class Stopped(RuntimeError):
    """A worker was asked for after `Stoppable.stop`."""


class Stoppable:
    """Stand in for a device: the same workers, all of which `stop` ends, from any thread.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._stopped = False
        self._workers: list[Worker] = []

    def stop(self) -> None:
        """Kill the workers and start no more; who waits for one gets `WorkerDied`, who starts one `Stopped`."""
        with self._lock:
            self._stopped = True
            for worker in self._workers:
                # Only a signal: closing a worker's pipes under a thread that reads them is not safe.
                if worker.pid != os.getpid() and worker.alive:
                    os.kill(worker.pid, signal.SIGKILL)

    def start(self, model: str, gpu_pct: float, cores: Sequence[int] | None = None, **options: Any) -> Worker:
        """Start a worker as the device does.

        Raises
        ------
        Stopped
            After `stop`.
        """
        with self._lock:
            if self._stopped:
                raise Stopped(f"no worker for {model}: the device was told to stop")
            worker = self.device.start(model, gpu_pct, cores, **options)
            self._workers = [*(w for w in self._workers if w.alive), worker]
            return worker

    # A protocol's members are looked for in the class, so `__getattr__` alone would not make a Device.

    @property
    def name(self) -> str:
        """Of the device."""
        return self.device.name

    @property
    def mechanism(self) -> str:
        """Of the device."""
        return self.device.mechanism

    def shares(self) -> tuple[float, ...]:
        """Of the device."""
        return self.device.shares()

    def describe(self) -> str:
        """Of the device."""
        return self.device.describe()

    def leases(self) -> Leases:
        """Of the device."""
        return self.device.leases()

    def marks(self) -> tuple[str, ...]:
        """Of the device."""
        return self.device.marks()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)
