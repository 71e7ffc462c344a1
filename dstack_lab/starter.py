"""A thread that starts and ends workers, so that a run's loop never waits for one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import NamedTuple

from dstack_lab.devices.base import Device, Worker

#: Service, share and number among the workers of both.
Place = tuple[str, float, int]


class Order(NamedTuple):
    """A worker that is to come: a service at a share, for the `starts`-th time in a row."""

    service: str
    model: str
    gpu_pct: float
    batches: tuple[int, ...]
    starts: int = 1
    standby: bool = False
    copy: int = 0  #: which of the workers of that service at that share

    @property
    def key(self) -> Place:
        """Its place in the fleet."""
        return self.service, self.gpu_pct, self.copy


class Arrival(NamedTuple):
    """What became of an order: a worker that loads its network now, or why there is none."""

    order: Order
    worker: Worker | None
    error: Exception | None
    common: bool  #: the error is that of all workers
    generation: int


class Starter:
    """Do one job after another; what comes of them is had from `arrivals` when `fileno` is readable.

    Parameters
    ----------
    device : Device
    seed : int
        Of weights and inputs.
    options : dict
        Further arguments of `Device.start`.
    """

    def __init__(self, device: Device, seed: int, options: dict[str, object]) -> None:
        self.device, self.seed, self.options = device, seed, options
        self.generation = 0  #: of the workers; a new one begins when all are started anew
        self._alive: set[Worker] = set()
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._done: SimpleQueue[Arrival] = SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = ThreadPoolExecutor(1, "starter")

    def fileno(self) -> int:
        """Descriptor that becomes readable when an order was carried out."""
        return self._bell

    def start(self, order: Order) -> Worker:
        """Start a worker now, from the calling thread."""
        options = {"batches": order.batches, "seed": self.seed, **self.options}
        worker = self.device.start(order.model, order.gpu_pct, **options)  # type: ignore[arg-type]
        with self._lock:
            self._alive.add(worker)
        return worker

    def replace(self, old: Worker | None, order: Order) -> None:
        """End `old` by force, then start another in its place."""
        generation = self.generation

        def job() -> None:
            try:
                self._end(old)
            finally:
                self._carry_out([order], generation)

        self._submit(job)

    def retire(self, worker: Worker, force: bool = False) -> None:
        """End a worker: an idle one in good order, another by force."""
        self._submit(lambda: self._end(worker, force))

    def restart(self, orders: Sequence[Order], recover: Callable[[], None]) -> None:
        """End all workers by force, let the device `recover`, and start these instead."""
        self.generation += 1
        generation = self.generation

        def job() -> None:
            try:
                self._end_all()
                recover()
            except Exception as error:
                self._post(Arrival(orders[0], None, error, True, generation))
            else:
                self._carry_out(orders, generation)

        self._submit(job)

    def arrivals(self) -> list[Arrival]:
        """What was carried out since the last call; of workers that were ended meanwhile nothing is told."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        found: list[Arrival] = []
        with contextlib.suppress(Empty):
            while True:
                found.append(self._done.get_nowait())
        return [arrival for arrival in found if arrival.generation == self.generation]

    def close(self, force: bool) -> None:
        """Finish the job in hand, end all workers, and end the thread."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._end_all(force)
        os.close(self._bell)

    def _submit(self, job: Callable[[], object]) -> None:
        self._thread.submit(job)

    def _carry_out(self, orders: Iterable[Order], generation: int) -> None:
        for order in orders:
            if self._closing.is_set() or generation != self.generation:
                return
            try:
                self._post(Arrival(order, self.start(order), None, False, generation))
            except Exception as error:  # what a device says in vain here, the loop books
                self._post(Arrival(order, None, error, False, generation))

    def _post(self, arrival: Arrival) -> None:
        self._done.put(arrival)
        os.eventfd_write(self._bell, 1)

    def _end(self, worker: Worker | None, force: bool = True) -> None:
        if worker is None:
            return
        try:
            (worker.kill if force else worker.close)()
        finally:
            with self._lock:
                self._alive.discard(worker)

    def _end_all(self, force: bool = True) -> None:
        with self._lock:
            workers = list(self._alive)
        for worker in workers:
            self._end(worker, force)
