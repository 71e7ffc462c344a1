"""The books of a run: queues, shares in use and the log of launches, for the simulator and the runner alike.

Times are integer nanoseconds. Requests are never objects: a service's queue is its array of arrival
times and the position of its head, and a launch takes the oldest requests, so a launch is a range.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.provenance import Provenance
from dstack_lab.services import Plan
from dstack_lab.state import INFINITE, NEVER_NS, NS_PER_MS, Drop, GpuState, Launch, ServiceView
from dstack_lab.trace_tables import launches_table, requests_table, services_table
from dstack_lab.traces import EVENTS, OUTCOMES, Trace

#: Room for the rounding of shares such as 33.33 three times.
SHARE_SLACK = 0.02
#: Numbers per launch in the log; the start is the fourth, the end the fifth, the share the sixth.
FIELDS, START, END, SHARE = 7, 3, 4, 5
#: Rows that are added to the log at once.
BLOCK = 1024


class PolicyError(RuntimeError):
    """A policy broke a rule.

    Parameters
    ----------
    message : str
        Names the policy, the time, the decision and the rule.
    trace : Trace, optional
        The run up to that decision.
    """

    def __init__(self, message: str, trace: Trace | None = None) -> None:
        super().__init__(message)
        self.trace = trace


class Ledger:
    """Queues and shares of one run.

    Parameters
    ----------
    plan : Plan
    arrivals_ms : list of numpy.ndarray
        Sorted arrival times of each service [ms].
    wait_ms : list of float
        How long the oldest request of each service may wait before its batch counts as ready [ms].
    oversubscribe : bool
        Whether launches may hold more than 100 GPU% together.
    factors : iterator of float, optional
        Actual over predicted service time of each launch, without end.
    """

    def __init__(
        self,
        plan: Plan,
        arrivals_ms: list[NDArray[np.float64]],
        wait_ms: Iterable[float],
        oversubscribe: bool = False,
        factors: Iterator[float] | None = None,
    ) -> None:
        self.factors = factors
        self.plan = plan
        self.arrivals_ns: list[NDArray[np.int64]] = []
        views = []
        asked = zip(plan.services, plan.allocations, plan.tables, arrivals_ms, strict=True)
        for index, (service, allocation, table, times) in enumerate(asked):
            queue: array[int] = array("q", np.rint(times * NS_PER_MS).astype(np.int64).tobytes())
            queue.extend([NEVER_NS] * (table.batch_max + 1))
            self.arrivals_ns.append(np.frombuffer(queue, dtype=np.int64)[: times.size])  # the same memory
            views.append(ServiceView(index, service, allocation, table, queue))
        self.state = GpuState(tuple(views))
        self.oversubscribe = oversubscribe
        self.waiting_total = sum(times.size for times in self.arrivals_ns)  # not yet launched or dropped, arrived or not
        self._log = array("d")  # service, head, batch, start, end, share, note: one row of `FIELDS` a launch
        self._fresh: list[float] = []  # rows that `log` has yet to add: a list grows faster, an array is smaller
        self._launched = 0
        self._failed: set[int] = set()  # launches whose requests went back to the queue
        self._hidden: dict[str, tuple[array[int], int]] = {}
        self._dropped: list[tuple[int, int, int]] = []  # service, head, count
        self._notes: dict[str, int] = {"": 0}
        self.events: list[tuple[float, str, str, str]] = []
        for view, wait in zip(views, wait_ms, strict=True):
            view.wait_ns = round(min(wait, 1e12) * NS_PER_MS)
            self.refresh(view)

    def refresh(self, view: ServiceView) -> int:
        """Recompute when `view`'s next batch is ready; return that instant [ns] if it lies ahead, else -1."""
        queue, head = view._arrivals, view._head
        at, first = queue[head + view.batch - 1], queue[head]
        if first != NEVER_NS and first + view.wait_ns < at:
            at = first + view.wait_ns
        view._ready_ns = at
        if at <= self.state.now_ns:
            view.ready, view.due_ms = True, (first + view.slo_ns) / NS_PER_MS
            if not view.in_flight:
                self.state.startable[view.index] = view
            return -1
        view.ready, view.due_ms = False, INFINITE
        self.state.startable.pop(view.index, None)
        return -1 if at == NEVER_NS else at

    def launch(self, decision: Launch) -> tuple[ServiceView, int, int]:
        """Start a batch now; return its view, its number and its end [ns], which policies do not see if not as predicted.

        Raises
        ------
        ValueError
            If the decision breaks a rule; the message says which.
        """
        name, share, batch, note = decision
        state = self.state
        view = state.by_name.get(name)
        if view is None:
            raise ValueError(f"service must be one of {sorted(state.by_name)}")
        head, now = view._head, state.now_ns
        if not 1 <= batch <= view.batch_max:
            raise ValueError(f"batch must be 1 to {view.batch_max}")
        if view._arrivals[head + batch - 1] > now:
            raise ValueError(f"batch must be at most the {view.waiting} requests that wait")
        if (share > state.free_pct + SHARE_SLACK and not self.oversubscribe) or not 1 <= share <= 100:
            raise ValueError(f"gpu_pct must be from 1 to the {max(state.free_pct, 0):g} % that are free")
        cost = view._service_ns.get((batch, share)) or view.remember_ns(batch, share)
        predicted = end = now + cost
        if self.factors is not None:
            end = now + max(1, round(cost * next(self.factors)))
        code = self._notes.get(note)
        if code is None:
            code = self._notes[note] = len(self._notes)
        number = self._launched
        self._launched = number + 1
        self._fresh += (view.index, head, batch, now, end, share, code)
        if not number % BLOCK:
            self._write()
        state._running[number] = (view, share, batch, now, predicted)
        state.free_pct -= share
        view._head = head + batch
        view.in_flight += 1
        state.startable.pop(view.index, None)
        self.waiting_total -= batch
        return view, number, end

    def drop(self, decision: Drop) -> ServiceView:
        """Give up the oldest requests of a service; return its view.

        Raises
        ------
        ValueError
            If the service is unknown or fewer requests wait.
        """
        view = self.state.by_name.get(decision.service)
        if view is None:
            raise ValueError(f"service must be one of {sorted(self.state.by_name)}")
        if not 1 <= decision.requests <= view.waiting:
            raise ValueError(f"requests must be 1 to the {view.waiting} requests that wait")
        self._dropped.append((view.index, view._head, decision.requests))
        view._head += decision.requests
        self.waiting_total -= decision.requests
        return view

    def finish(self, number: int, end_ns: int | None = None, granted_pct: float | None = None) -> ServiceView:
        """End a launch and free its share. Return its service's view.

        `end_ns` replaces the predicted end [ns], `granted_pct` the share it asked for.
        """
        state = self.state
        view, share, _, _, _ = state._running.pop(number)
        view.in_flight -= 1
        if view.ready and not view.in_flight:
            state.startable[view.index] = view
        state.free_pct = state.free_pct + share if state._running else 100.0  # exact again whenever the GPU is empty
        if end_ns is not None:
            self._write()[number * FIELDS + END] = end_ns
        if granted_pct is not None:
            self._write()[number * FIELDS + SHARE] = granted_pct
        return view

    def regrant(self, number: int, gpu_pct: float) -> None:
        """Let a launch begin now, at this share: it may have waited for a worker, and got another than it asked for."""
        state = self.state
        view, share, batch, since, _ = state._running[number]
        if gpu_pct == share and since == state.now_ns:
            return
        cost = view._service_ns.get((batch, gpu_pct)) or view.remember_ns(batch, gpu_pct)
        state._running[number] = (view, gpu_pct, batch, state.now_ns, state.now_ns + cost)
        state.free_pct += share - gpu_pct
        log, row = self._write(), number * FIELDS
        log[row + START], log[row + SHARE] = state.now_ns, gpu_pct

    def _write(self) -> array[float]:
        """Return the whole log."""
        self._log.fromlist(self._fresh)
        self._fresh.clear()
        return self._log

    def requeue(self, number: int) -> bool:
        """Undo a launch that failed: its requests wait again. Return whether they do.

        A queue has one head: while requests of a later launch are out of it, those of an earlier one cannot go back.
        Nothing changes then.
        """
        view, _, batch, _, _ = self.state._running[number]
        first = self.first_of(number)
        if view._head != first + batch:
            return False
        self.finish(number)
        self._failed.add(number)
        view._head = first
        self.waiting_total += batch
        return True

    def cut(self, number: int, requests: int) -> None:
        """Give up the oldest requests of a launch that failed; one that has no other ends."""
        view, share, batch, since, end = self.state._running[number]
        log, row = self._write(), number * FIELDS
        self._dropped.append((view.index, int(log[row + 1]), requests))
        if requests == batch:
            self.finish(number)
            self._failed.add(number)
        else:
            log[row + 1] += requests
            log[row + 2] -= requests
            self.state._running[number] = (view, share, batch - requests, since, end)

    def first_of(self, number: int) -> int:
        """Position of a launch's first request in its service's queue."""
        return int(self._write()[number * FIELDS + 1])

    def abandon(self, view: ServiceView) -> None:
        """Drop all requests of a hidden service, those to come too."""
        _, head = self._hidden[view.name]
        rest = self.arrivals_ns[view.index].size - head
        self._dropped.append((view.index, head, rest))
        self.waiting_total -= rest

    def hide(self, view: ServiceView) -> None:
        """Show policies an empty queue: nobody can serve it just now."""
        if view.name not in self._hidden:
            self._hidden[view.name] = (view._arrivals, view._head)
            view._arrivals, view._head = array("q", [NEVER_NS] * (view.batch_max + 1)), 0
            self.refresh(view)

    def show(self, view: ServiceView) -> None:
        """Undo `hide`."""
        if view.name in self._hidden:
            view._arrivals, view._head = self._hidden.pop(view.name)
            self.refresh(view)

    def finished(self) -> NDArray[np.float64]:
        """Rows of the launches that ended so far, a copy: service, first request, batch, start and end [ns], GPU%, note."""
        log = np.array(self._write(), dtype=float).reshape(-1, FIELDS)
        return log[np.isin(np.arange(len(log)), [*self.state._running, *self._failed], invert=True)]

    def to_trace(self, duration_ms: float, policy: str, seed: int, provenance: Provenance) -> Trace:
        """Write the books as a `Trace`; launches still running count as not served."""
        rows = self._write()
        log = np.frombuffer(rows, dtype=float).reshape(-1, FIELDS) if rows else np.empty((0, FIELDS))
        number = np.arange(len(log))
        ended = np.isin(number, [*self.state._running, *self._failed], invert=True)
        log, number = log[ended], number[ended]
        service, batch, note = log[:, [0, 2, 6]].T.astype(np.int64)
        start, end = log[:, START] / NS_PER_MS, log[:, END] / NS_PER_MS
        launches = launches_table(self.plan, number, service, start, end, log[:, SHARE].copy(), batch, note, self._notes)
        requests = self._requests(number, log)
        events = pd.DataFrame(self.events, columns=list(EVENTS))
        return Trace(services_table(self.plan), requests, launches, duration_ms, policy, seed, provenance, events)

    def _requests(self, number: NDArray[np.int64], log: NDArray[np.float64]) -> pd.DataFrame:
        """Spread the launches over their requests, service after service; a launch holds a range of them."""
        sizes = [times.size for times in self.arrivals_ns]
        total = sum(sizes)
        arrival, start, finish = np.empty(total), np.full(total, np.nan), np.full(total, np.nan)
        launch, outcome = np.full(total, -1, dtype=np.int32), np.full(total, OUTCOMES.index("unserved"), dtype=np.int8)
        offset = np.concatenate(([0], np.cumsum(sizes)))
        for index, times in enumerate(self.arrivals_ns):
            arrival[offset[index] : offset[index + 1]] = times
            mine = np.flatnonzero(log[:, 0] == index)
            batch = log[mine, 2].astype(np.int64)
            rows = np.repeat(offset[index] + log[mine, 1].astype(np.int64) + batch - np.cumsum(batch), batch)
            rows += np.arange(rows.size)
            launch[rows] = np.repeat(number[mine], batch)
            outcome[rows] = OUTCOMES.index("served")
            start[rows] = np.repeat(log[mine, 3], batch)
            finish[rows] = np.repeat(log[mine, END], batch)
        for index, first, requests in self._dropped:
            outcome[offset[index] + first : offset[index] + first + requests] = OUTCOMES.index("dropped")
        for instants in (arrival, start, finish):
            instants /= NS_PER_MS
        return requests_table(self.plan, sizes, arrival, start, finish, launch, outcome)
