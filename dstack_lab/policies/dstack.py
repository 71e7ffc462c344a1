"""D-STACK: planned windows, opportunistic launches between them, and a scoreboard that keeps it fair."""

from __future__ import annotations

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, ServiceView, Wake
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.windows import EPSILON_MS, Window, plan_period
from dstack_lab.services import Allocation, Plan

#: The scoreboard remembers this many periods.
MEMORY = 10


class DStack(Policy):
    """Dynamic, fair spatio-temporal scheduling; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    1. *Planned*: each service owns launch windows at its knee share, often enough for its SLO; the
       windows of a period never need more than 100 GPU% (`plan_period`).
    2. *Opportunistic*: whenever GPU% is free and a batch is ready, it is launched if it ends before any
       planned window that needs its share. Planned windows are never delayed; an empty one is given away.
    3. *Fair*: among the ready, the service that received least GPU%·ms over the last 10 periods goes
       first, then the earliest deadline.

    *Needs to know* service times and rates. *Wins* when knees lie well below 100 %: several networks
    run side by side at shares they can use. *Breaks* when one network fills the GPU, or when the
    service times it was told are wrong: its windows then no longer fit.

    Parameters
    ----------
    planned, opportunistic, fair : bool
        Switch an ingredient off, for ablations. Without `fair`, the earliest deadline goes first.
    patience : float
        Part of its slack (SLO less service time) that the oldest request of an unfilled batch waits
        before the batch counts as ready for an opportunistic launch; 0 launches whatever waits.
    reject : bool
        Under overload, plan windows for the part of the load that fits and drop requests that can no
        longer meet their deadline. Without it an overload is an `InfeasiblePlan`.
    """

    def __init__(
        self,
        planned: bool = True,
        opportunistic: bool = True,
        fair: bool = True,
        patience: float = 0.25,
        reject: bool = False,
    ) -> None:
        self.planned, self.opportunistic, self.fair = planned, opportunistic, fair
        self.patience, self.reject = patience, reject

    def reset(self, plan: Plan) -> None:
        """Place the windows; may lower shares or batches to make them fit."""
        period = plan_period(plan, self.reject)
        self.period_ms = period.period_ms
        self.point = {a.service: a for a in period.allocations}
        self.windows = period.windows
        self.cursor, self.cycle_ms = 0, 0.0  # the next window, and when its period began [ms]
        self.next_ms = self.windows[0].start_ms
        self.due: list[tuple[float, Window]] = []  # windows whose time has come, with the time they end
        self.woken_ms = -1.0
        self.scores = Scoreboard(self.point, self.period_ms, MEMORY)
        self.needs_pct = min(a.gpu_pct for a in period.allocations)

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """Part of the slack that a request spends waiting for company."""
        return self.patience * max(slo_ms - allocation.service_ms, 0.0)

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the share of each service's windows."""
        return {a.service: (a.gpu_pct,) for a in plan_period(plan, self.reject).allocations}

    def decide(self, state: GpuState) -> list[Decision]:
        """Planned windows first, then whatever fits before the next ones."""
        now = state.now_ms
        if self.reject:
            late = [Drop(s.name, n) for s in state.services if (n := s.late(s.service_ms(1, self.point[s.name].gpu_pct)))]
            if late:
                return [*late, Wake(now)]
        launches: list[Launch] = []
        if self.planned:
            self._open_windows(state, now, launches)
        if self.opportunistic and state.free_pct >= self.needs_pct:
            self._fill(state, now, launches)
        if self.planned and self.next_ms > self.woken_ms:
            self.woken_ms = self.next_ms
            return [*launches, Wake(self.next_ms)]
        return launches  # type: ignore[return-value]

    def _open_windows(self, state: GpuState, now: float, launches: list[Launch]) -> None:
        """Launch the windows whose time has come; empty ones, and ones whose service runs already, are given away."""
        while self.next_ms <= now + EPSILON_MS:
            window = self.windows[self.cursor]
            self.due.append((self.cycle_ms + window.end_ms, window))
            self._advance()
        blocked = []
        for until, window in self.due:
            service = state[window.service]
            batch = self._batch(service, now)
            if not batch or service.in_flight:
                continue
            if not service.ready and service.oldest_deadline_ms >= until + window.next_end_ms - window.end_ms:
                continue  # the next window serves it in time, with a fuller batch
            if window.gpu_pct <= state.free_pct - sum(launch.gpu_pct for launch in launches) + EPSILON_MS:
                self._launch(service, batch, now, "planned", launches)
            elif now < until:  # on a real device an earlier launch may run longer than predicted
                blocked.append((until, window))
        self.due = blocked

    def _fill(self, state: GpuState, now: float, launches: list[Launch]) -> None:
        """Launch ready services, the least served first, where they are gone before a planned window needs their share."""
        started = {launch.service for launch in launches}
        ready = [s for s in state.services if s.ready and not s.in_flight and s.name not in started]
        if len(ready) > 1:
            received = self.scores.received
            ready.sort(key=lambda s: (received[s.name] if self.fair else 0.0, s.oldest_deadline_ms))
        for service in ready:
            point = self.point[service.name]
            batch = self._batch(service, now)
            end = now + service.service_ms(batch, point.gpu_pct)
            if self._fits(state, point, end, launches):
                self._launch(service, batch, now, "opportunistic", launches)

    def _fits(self, state: GpuState, point: Allocation, end: float, launches: list[Launch]) -> bool:
        """Whether `point`'s share is free now and, beside every planned window that starts before `end`, until then."""
        share = point.gpu_pct + sum(launch.gpu_pct for launch in launches)
        if share > state.free_pct - sum(window.gpu_pct for _, window in self.due) + EPSILON_MS:
            return False
        if not self.planned or self.next_ms >= end:
            return True
        ahead = [w for w in self._windows_before(end) if w[2] != point.service]
        for start, _, _, _ in ahead:
            held = state.held_pct(start)  # by service; one that still runs gives its window away
            reserved = sum([pct for a, b, name, pct in ahead if a <= start < b and name not in held])
            if reserved + share + sum(held.values()) > 100 + EPSILON_MS:
                return False
        return True

    def _windows_before(self, end: float) -> list[tuple[float, float, str, float]]:
        """Planned windows that start before `end`: (start_ms, end_ms, service, gpu_pct)."""
        ahead, cursor, cycle = [], self.cursor, self.cycle_ms
        while (start := cycle + self.windows[cursor].start_ms) < end - EPSILON_MS:
            window = self.windows[cursor]
            ahead.append((start, cycle + window.end_ms, window.service, window.gpu_pct))
            cursor += 1
            if cursor == len(self.windows):
                cursor, cycle = 0, cycle + self.period_ms
        return ahead

    def _batch(self, service: ServiceView, now: float) -> int:
        """All that waits up to the planned batch; more of it if the oldest request is still in time."""
        point = self.point[service.name]
        batch = service.queued(point.batch)
        if batch == point.batch:
            batch = service.queued(service.batch_max)
            limit = service.oldest_deadline_ms - now
            while batch > point.batch and service.service_ms(batch, point.gpu_pct) > limit:
                batch -= 1
        return batch

    def _launch(self, service: ServiceView, batch: int, now: float, note: str, launches: list[Launch]) -> None:
        share = self.point[service.name].gpu_pct
        self.scores.add(now, service.name, share * service.service_ms(batch, share))
        launches.append(Launch(service.name, share, batch, note))

    def _advance(self) -> None:
        self.cursor += 1
        if self.cursor == len(self.windows):
            self.cursor, self.cycle_ms = 0, self.cycle_ms + self.period_ms
        self.next_ms = self.cycle_ms + self.windows[self.cursor].start_ms
