"""The words between an engine and a policy: what a policy sees, and what it may answer.

The same objects serve the simulator and real devices. A policy reads a `GpuState` and returns
`Launch`, `Drop` and `Wake`; it changes nothing itself, and sees nothing of the future.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

from dstack_lab.services import Allocation, Service, ServiceTable
from dstack_lab.work import Work

NS_PER_MS = 1_000_000
#: Later than any event: 292 years in nanoseconds.
NEVER_NS = 2**63 - 1
INFINITE = float("inf")


class Launch(NamedTuple):
    """Start one batch: the oldest requests of a service.

    Parameters
    ----------
    service : str
        Name of the service.
    gpu_pct : float
        Share it holds until it ends, 1 to what is free.
    batch : int
        Requests, 1 to those that wait, at most the largest profiled batch.
    note : str
        The policy's word for it, kept in the trace.
    """

    service: str
    gpu_pct: float
    batch: int
    note: str = ""


class Drop(NamedTuple):
    """Give up the oldest requests of a service.

    Parameters
    ----------
    service : str
        Name of the service.
    requests : int
        How many, 1 to those that wait.
    """

    service: str
    requests: int


class Wake(NamedTuple):
    """Call `decide` again, whatever happens before.

    Parameters
    ----------
    at_ms : float
        When, on the clock of the run [ms]; later than now.
    """

    at_ms: float


class Running(NamedTuple):
    """A launch that has not ended.

    Parameters
    ----------
    service : str
        Name of the service.
    gpu_pct : float
        Share that it holds.
    batch : int
        Requests.
    since_ms, until_ms : float
        When it began, and when it is predicted to end [ms].
    """

    service: str
    gpu_pct: float
    batch: int
    since_ms: float
    until_ms: float


class ServiceView:
    """One service as a policy sees it.

    Attributes
    ----------
    name, index : str, int
        Its name, and its place in `GpuState.services`.
    slo_ms : float
    gpu_pct, batch : float, int
        Share and batch of the plan.
    batch_max : int
        Largest batch that has a known service time.
    ready : bool
        A batch is full, or the oldest request has waited the policy's limit.
    due_ms : float
        Deadline of the oldest request while `ready` [ms], else infinite: what earliest deadline
        first sorts by.
    in_flight : int
        Launches of this service that have not ended.
    """

    __slots__ = (
        *("_arrivals", "_clock", "_columns", "_head", "_ready_ns", "_service_ns", "_table"),
        *("batch", "batch_max", "due_ms", "gpu_pct", "in_flight", "index", "name", "ready", "slo_ms", "slo_ns", "wait_ns"),
    )

    def __init__(self, index: int, service: Service, allocation: Allocation, table: ServiceTable, arrivals: array[int]) -> None:
        self.index = index
        self.name = service.name
        self.slo_ms = service.slo_ms
        self.slo_ns = round(service.slo_ms * NS_PER_MS)
        self.gpu_pct = allocation.gpu_pct
        self.batch = allocation.batch
        self.ready = False
        self.due_ms = INFINITE
        self.in_flight = 0
        self.wait_ns = 0
        self.batch_max = table.batch_max
        self._table = table
        self._arrivals = arrivals  # [ns], ascending, then NEVER_NS often enough to index a batch ahead
        self._head = 0  # the oldest request that is neither launched nor dropped
        self._ready_ns = NEVER_NS
        self._service_ns: dict[tuple[int, float], int] = {}
        self._columns: dict[float, list[float]] = {}  # GPU% -> service time by batch [ms]
        self._clock: GpuState

    @property
    def waiting(self) -> int:
        """Requests that have arrived and are neither launched nor dropped."""
        arrivals, head, now = self._arrivals, self._head, self._clock.now_ns
        reach = 16
        while arrivals[min(head + reach, len(arrivals) - 1)] <= now:  # queues are short: gallop from the head
            reach *= 4
        return bisect_right(arrivals, now, head, min(head + reach, len(arrivals) - 1)) - head

    def queued(self, limit: int) -> int:
        """Return how many requests wait, counted up to `limit`: cheaper than `waiting`."""
        arrivals, head, now = self._arrivals, self._head, self._clock.now_ns
        if arrivals[head + limit - 1] <= now:
            return limit
        return bisect_right(arrivals, now, head, head + limit) - head

    @property
    def arrived(self) -> int:
        """Requests that have come since the run began: what an estimator of rates counts."""
        return self._head + self.waiting

    @property
    def oldest_arrival_ms(self) -> float:
        """Arrival of the oldest waiting request [ms]; infinite if none waits."""
        ns = self._arrivals[self._head]
        return ns / NS_PER_MS if ns <= self._clock.now_ns else INFINITE

    @property
    def oldest_deadline_ms(self) -> float:
        """Deadline of the oldest waiting request [ms]; infinite if none waits."""
        ns = self._arrivals[self._head]
        return (ns + self.slo_ns) / NS_PER_MS if ns <= self._clock.now_ns else INFINITE

    def deadline_ms(self, position: int) -> float:
        """Deadline of a waiting request, the oldest at position 0 [ms]."""
        return (self._arrivals[self._head + position] + self.slo_ns) / NS_PER_MS

    def late(self, margin_ms: float = 0.0) -> int:
        """Return how many waiting requests have a deadline before now + `margin_ms`."""
        last = self._clock.now_ns + round(margin_ms * NS_PER_MS) - self.slo_ns - 1
        return min(bisect_right(self._arrivals, last, self._head) - self._head, self.waiting)

    def service_ms(self, batch: int, gpu_pct: float) -> float:
        """Predicted service time of a batch at a share [ms]."""
        column = self._columns.get(gpu_pct)
        if column is not None and 0 < batch <= self.batch_max:
            return column[batch]
        asked = self._table.at(batch, gpu_pct)
        self._columns[gpu_pct] = [0.0, *(self._table.at(b, gpu_pct) for b in range(1, self.batch_max + 1))]
        return asked

    def become_ready(self) -> None:
        """For engines: a batch is full, or its oldest request has waited."""
        self.ready, self.due_ms = True, self.oldest_deadline_ms
        if not self.in_flight:
            self._clock.startable[self.index] = self

    def remember_ns(self, batch: int, gpu_pct: float) -> int:
        """Service time in whole nanoseconds, at least 1; remembered because engines ask for it at each launch."""
        ns = self._service_ns[batch, gpu_pct] = max(1, round(self._table.at(batch, gpu_pct) * NS_PER_MS))
        return ns

    def __repr__(self) -> str:
        return f"<{self.name}: {self.waiting} waiting{', ready' if self.ready else ''}, {self.in_flight} in flight>"


class GpuState:
    """The GPU as a policy sees it at one instant.

    Attributes
    ----------
    now_ns : int
        The clock [ns].
    free_pct : float
        GPU% that no launch holds.
    services : tuple of ServiceView
    startable : dict of ServiceView
        Those with a batch that is `ready` and none in flight, by index, in no order: with many services
        it is shorter to look through.
    """

    __slots__ = ("_helper", "_running", "by_name", "free_pct", "now_ns", "services", "startable")

    def __init__(self, services: tuple[ServiceView, ...]) -> None:
        self.now_ns = 0
        self.free_pct = 100.0
        self.services = services
        self.by_name = {view.name: view for view in services}
        self.startable: dict[int, ServiceView] = {}
        self._running: dict[int, tuple[ServiceView, float, int, int, int]] = {}  # by number of the launch
        self._helper: Callable[..., Work] | None = None  # who does what is to be done apart, where time is real
        for view in services:
            view._clock = self

    @property
    def now_ms(self) -> float:
        """The clock [ms]."""
        return self.now_ns / NS_PER_MS

    @property
    def running(self) -> list[Running]:
        """Launches that have not ended, oldest first."""
        return [Running(v.name, g, b, s / NS_PER_MS, e / NS_PER_MS) for v, g, b, s, e in self._running.values()]

    def apart(self, function: Callable[..., Any], *arguments: Any) -> Work:
        """Have something computed that takes long, a plan say, without holding up the launches of a real run.

        A simulation computes it at once, in no simulated time. A real run of a policy with ``works_apart = True`` gives it
        to another process and asks the policy again when it is done; what is submitted meanwhile waits for its turn. That
        process is started before the run and ends with it.

        Parameters
        ----------
        function : callable
            Of a module that another process can import: not of a notebook's cell, nor a lambda. So are the classes of its
            arguments and of what it returns.
        *arguments : object
            Those of `function`.

        Returns
        -------
        Work
            Its ``done`` says whether it has come to its end; then ``result()`` returns what `function` returned, or
            raises what it raised.
        """
        if self._helper is not None:
            return self._helper(function, *arguments)
        work = Work()
        try:
            work.end(function(*arguments))
        except Exception as error:
            work.end(error=error)
        return work

    def __getitem__(self, service: str) -> ServiceView:
        return self.by_name[service]
