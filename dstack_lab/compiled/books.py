"""The books of a compiled run: the arrays that a kernel reads and writes, and the trace they become.

Requests of all services lie in one array, service after service, and a launch writes what becomes of
its requests at once: no log of requests, no second pass. An arrival is an integer [ns] until its
request is launched or dropped, and a float [ms] in the same eight bytes from then on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.compiled.jit import jit
from dstack_lab.provenance import Provenance
from dstack_lab.services import Plan
from dstack_lab.state import NS_PER_MS
from dstack_lab.trace_tables import launches_table, requests_table, services_table
from dstack_lab.traces import EVENTS, OUTCOMES, Trace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Outcome = tuple[int, int, list[str]]

#: How a kernel returns: the run is over; the log has no room for another turn; something only Python can explain.
DONE, FULL, BROKEN = range(3)
#: Beyond this instant [ns], 26 days, milliseconds as floats no longer tell nanoseconds apart.
LAST_NS = 2 * 10**15
SERVED, DROPPED, UNSERVED = (OUTCOMES.index(word) for word in ("served", "dropped", "unserved"))
GROWTH = 1.5


class Queues(NamedTuple):
    """Requests by service, and what became of them."""

    arrival_ns: Integers
    arrival_ms: Floats  # the same memory
    head: Integers  # by service: position of its oldest request that is neither launched nor dropped
    stop: Integers  # by service: end of its part
    start_ms: Floats
    finish_ms: Floats
    launch: NDArray[np.int32]
    outcome: NDArray[np.int8]


class Log(NamedTuple):
    """One row a launch."""

    service: NDArray[np.int32]
    batch: Integers
    start_ms: Floats
    end_ms: Floats
    share: Floats
    note: NDArray[np.int8]


@jit
def _to_ns(times_ms: Floats, out: Integers) -> bool:
    """Round to nanoseconds as the Python engine does; return whether they ascend from 0 and are not too far."""
    before = np.int64(0)
    for k in range(times_ms.size):
        at = np.rint(times_ms[k] * NS_PER_MS)
        if not before <= at <= LAST_NS:
            return False
        out[k] = before = np.int64(at)
    return True


@jit
def _close(queues: Queues) -> None:
    """Mark what was never launched."""
    for i in range(queues.head.size):
        for k in range(queues.head[i], queues.stop[i]):
            queues.arrival_ms[k] = queues.arrival_ns[k] / NS_PER_MS
            queues.start_ms[k] = queues.finish_ms[k] = np.nan
            queues.launch[k] = -1
            queues.outcome[k] = UNSERVED


class Books:
    """Arrays of one run.

    Parameters
    ----------
    plan : Plan
    arrivals_ms : list of numpy.ndarray
        Arrival times of each service [ms]; emptied, so that they need not lie in memory twice.

    Attributes
    ----------
    sound : bool
        Whether the arrivals ascend and lie within reach of a compiled run.
    """

    def __init__(self, plan: Plan, arrivals_ms: list[Floats]) -> None:
        self.plan = plan
        self.sizes = [times.size for times in arrivals_ms]
        self.total = sum(self.sizes)
        stop = np.cumsum(self.sizes, dtype=np.int64)
        head = stop - np.asarray(self.sizes, dtype=np.int64)
        arrival = np.empty(self.total, dtype=np.int64)
        self.sound = True
        for i in range(len(self.sizes)):
            self.sound = _to_ns(arrivals_ms[i], arrival[head[i] : stop[i]]) and self.sound
            arrivals_ms[i] = np.empty(0)
        self.queues = Queues(
            arrival,
            arrival.view(np.float64),
            head,
            stop,
            np.empty(self.total),
            np.empty(self.total),
            np.empty(self.total, dtype=np.int32),
            np.zeros(self.total, dtype=np.int8),
        )
        room = max(1024, self.total // 6)
        self.log = Log(
            np.empty(room, dtype=np.int32),
            np.empty(room, dtype=np.int64),
            np.empty(room),
            np.empty(room),
            np.empty(room),
            np.empty(room, dtype=np.int8),
        )

    def resize(self, rows: int | None = None) -> None:
        """Make room for more launches, or for exactly `rows`; in place, so that a log is never in memory twice."""
        rows = int(GROWTH * self.log.batch.size) + 1024 if rows is None else rows
        for column in self.log:
            column.resize(rows, refcheck=False)

    def to_trace(self, launches: int, notes: list[str], duration_ms: float, policy: str, seed: int, made: Provenance) -> Trace:
        """Return the trace of a run of `launches`, in the columns and types of `Ledger.to_trace`."""
        _close(self.queues)
        self.resize(launches)
        log, queues, plan = self.log, self.queues, self.plan
        table = launches_table(
            plan, np.arange(launches), log.service, log.start_ms, log.end_ms, log.share, log.batch, log.note, notes
        )
        requests = requests_table(
            plan, self.sizes, queues.arrival_ms, queues.start_ms, queues.finish_ms, queues.launch, queues.outcome
        )
        events = pd.DataFrame([], columns=list(EVENTS))
        return Trace(services_table(plan), requests, table, duration_ms, policy, seed, made, events)
