"""D-STACK: planned windows, opportunistic launches between them, and a scoreboard that keeps it fair."""

from __future__ import annotations

from collections.abc import Iterable

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, ServiceView, Wake
from dstack_lab.policies.calendar import Booking, Calendar
from dstack_lab.policies.fair_parts import fairly_reduced
from dstack_lab.policies.lane_keeper import LaneKeeper
from dstack_lab.policies.lending import LaneLender, beside
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.shared_lanes import share_lanes
from dstack_lab.policies.windows import EPSILON, PeriodPlan, ladders, plan_period
from dstack_lab.services import Allocation, Plan

#: The scoreboard remembers this many periods.
MEMORY = 10


class DStack(Policy):
    """Dynamic, fair spatio-temporal scheduling; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    1. *Planned*: each service owns launch windows at its knee share, often enough for its SLO; the
       windows of a period never need more than 100 GPU% (`plan_period`): side by side in lanes, or in turn.
    2. *Opportunistic*: whenever GPU% is free and a batch is ready, it is launched if it ends before any
       planned window that needs its share. Planned windows are never delayed; an empty one is given away.
       A lane launches whatever waits, and an idle one is lent to who would be late in its own (`LaneLender`).
    3. *Fair*: among the ready, the service that received least GPU%·ms over the last 10 periods goes
       first, then the earliest deadline.

    Where the plan knows of ``contention``, services may share lanes in turns instead: as many lanes as launches
    beside each other are worth what they cost each other (`share_lanes`), one for all in the extreme.

    *Needs to know* service times and rates. *Wins* when knees lie well below 100 %: several networks
    run side by side at shares they can use. *Breaks* when one network fills the GPU, or when the
    service times it was told are wrong: its windows then no longer fit.

    Parameters
    ----------
    planned, opportunistic, fair : bool
        Switch an ingredient off, for ablations. Without `fair`, the earliest deadline goes first.
    patience : float
        Part of its slack (SLO less service time) that the oldest request of an unfilled batch waits
        before the batch counts as ready for an opportunistic launch; 0 launches whatever waits, as lanes
        that are lent always do.
    reject : bool
        Under overload, plan windows for the part of the load that fits and drop requests that are lost, or
        that a planned batch started now would not serve in time: serving the freshest in full batches answers far
        more in time than small batches of the oldest. Without it an overload is an `InfeasiblePlan`.
    beside : bool
        Give every service a lane of its own where lanes hold the load (`lanes`): their widths are chosen
        jointly, by the queues that will form in them. Without it windows take turns.
    lend : bool
        Lend lanes. Without it a lane's windows are kept for its service, as windows in turn are.
    """

    def __init__(
        self,
        planned: bool = True,
        opportunistic: bool = True,
        fair: bool = True,
        patience: float = 0.25,
        reject: bool = False,
        beside: bool = True,
        lend: bool = True,
    ) -> None:
        self.planned, self.opportunistic, self.fair = planned, opportunistic, fair
        self.patience, self.reject, self.beside, self.lend = patience, reject, beside, lend

    def reset(self, plan: Plan) -> None:
        """Place the windows, or lanes that services share; may lower shares or batches to make them fit."""
        names, longest = [s.name for s in plan.services], max(s.slo_ms for s in plan.services)
        self.scores = Scoreboard(names, longest, MEMORY)
        if knows(plan):
            self._keep(LaneKeeper(share_lanes(plan, self.reject), self.reject))
        else:
            self._adopt(plan, self._period(plan), 0.0)

    def _period(self, plan: Plan) -> PeriodPlan:
        """Windows of a plan; beyond the bound those who ask for more than a fair part of the GPU give way."""
        return plan_period(fairly_reduced(plan) if self.reject else plan, self.reject, self.beside)

    def _keep(self, keeper: LaneKeeper | LaneLender) -> None:
        """Follow lanes."""
        self.keeper: LaneKeeper | LaneLender | None = keeper
        self.point, self.needs_pct = keeper.points, keeper.needs_pct

    def _adopt(self, plan: Plan, period: PeriodPlan, now: float) -> None:
        """Follow the windows of `period` from `now` on, or its lanes."""
        if self._lends(period):
            self._keep(LaneLender(plan, period, self.reject))
            return
        self.keeper = None
        self.point = {a.service: a for a in period.allocations}
        self.ladder = ladders(plan, period)
        self.calendar = Calendar(period, now)
        self.blocked: list[Booking] = []  # windows whose time has come but whose share is not free yet
        self.woken_ms = -1.0
        self.own = {name: a.gpu_pct for name, a in self.point.items()}
        self.needs_pct = min(self.own.values()) - EPSILON
        # then no window ever waits for another; launches of an earlier plan may hold less than their windows now
        self.side_by_side = now == 0 and _added(self.own.values()) <= 100

    def _lends(self, period: PeriodPlan) -> bool:
        """Whether the windows are lanes that are lent: no window ever waits for another."""
        lanes = self.lend and self.beside and _added(a.gpu_pct for a in period.allocations) <= 100
        return lanes and self.planned and self.opportunistic

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """Part of the slack that a request spends waiting for company; nothing in a lane of its own."""
        if isinstance(self.keeper, LaneLender):
            return 0.0
        return self.patience * max(slo_ms - allocation.service_ms, 0.0)

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """From the share of each service's windows up to the plan's."""
        if knows(plan):
            return {p.service: (p.gpu_pct,) for lane in share_lanes(plan, self.reject).lanes for p in lane.points}
        period = self._period(plan)
        if self._lends(period):
            return {a.service: tuple(sorted((a.gpu_pct, *beside(plan, a.gpu_pct)))) for a in period.allocations}
        return {name: tuple(sorted(ladder)) for name, ladder in ladders(plan, period).items()}

    def decide(self, state: GpuState) -> list[Decision]:
        """Planned windows first, then whatever fits before the next ones."""
        if self.keeper is not None:
            return self.keeper.decide(state)
        now = state.now_ms
        if self.reject:
            late = [Drop(s.name, n) for s in state.services if (n := s.late(self.point[s.name].service_ms))]
            if late:
                return [*late, Wake(now)]
        launches: list[Launch] = []
        if self.planned and (self.blocked or self.calendar.next_ms <= now + EPSILON):
            self._open_windows(state, now, launches)
        if self.opportunistic and state.startable and state.free_pct >= self.needs_pct:
            self._fill(state, now, launches)
        if self.planned and self.calendar.next_ms > self.woken_ms:
            self.woken_ms = self.calendar.next_ms
            return [*launches, Wake(self.woken_ms)]
        return launches  # type: ignore[return-value]

    def _open_windows(self, state: GpuState, now: float, launches: list[Launch]) -> None:
        """Launch the windows whose time has come; empty ones, and ones whose service runs already, are given away."""
        due, self.blocked = self.blocked + self.calendar.take_due(now), []
        started = set[str]()  # a window that was blocked and the next one of its service may be due together
        for window in due:
            service = state[window.service]
            if service.in_flight or window.service in started or not (batch := self._batch(service, now, window.gpu_pct)):
                continue
            if not service.ready and service.oldest_deadline_ms >= window.next_end_ms:
                continue  # the next window serves it in time, with a fuller batch
            if window.gpu_pct <= state.free_pct - _sum(launches) + EPSILON:
                self.scores.add(now, service.name, window.gpu_pct * service.service_ms(batch, window.gpu_pct))
                launches.append(Launch(service.name, window.gpu_pct, batch, "planned"))
                started.add(window.service)
            elif now < window.end_ms:  # on a real device an earlier launch may run longer than predicted
                self.blocked.append(window)

    def _fill(self, state: GpuState, now: float, launches: list[Launch]) -> None:
        """Launch ready services, the least served first, where they are gone before a planned window needs their share."""
        ready, taken, reserved = [*state.startable.values()], 0.0, 0.0
        if launches:
            taken = _sum(launches)
            started = {launch.service for launch in launches}
            ready = [s for s in ready if s.name not in started]
            if not ready:
                return
        if self.blocked:
            reserved = _added([w.gpu_pct for w in self.blocked])
        others = self.own[ready[0].name]
        if len(ready) > 1:
            received = self.scores.received
            ready.sort(key=lambda s: (received[s.name] if self.fair else 0.0, s.due_ms, s.index))
            others = _added([self.own[s.name] for s in ready])
        free = state.free_pct - taken - reserved + EPSILON
        for service in ready:
            own = self.own[service.name]
            others -= own
            for share in self.ladder[service.name]:  # more than its window's share only if nobody else waits for it
                if share > (free - others if share > own else free):
                    continue
                batch = self._batch(service, now, share)
                ms = service.service_ms(batch, share)
                end = now + ms
                if end <= self.calendar.next_ms or not self.planned or self._fits(state, service, share + taken, end):
                    self.scores.add(now, service.name, share * ms)
                    launches.append(Launch(service.name, share, batch, "opportunistic"))
                    taken += share
                    free -= share
                    break

    def _fits(self, state: GpuState, service: ServiceView, share: float, end: float) -> bool:
        """Whether every planned window until `end` gets its share beside `share` more."""
        if self.side_by_side:
            idle = _added([self.own[s.name] for s in state.services if not s.in_flight and s is not service])
            if idle + share <= state.free_pct:  # even if all others began now
                return True
        return self.calendar.leaves_room(state, service, share, end)

    def _batch(self, service: ServiceView, now: float, share: float) -> int:
        """All that waits up to the planned batch; more of it if the oldest request is still in time."""
        planned = self.point[service.name].batch
        batch = service.queued(planned)
        if batch == planned:
            batch = service.queued(service.batch_max)
            limit = service.oldest_deadline_ms - now
            while batch > planned and service.service_ms(batch, share) > limit:
                batch -= 1
        return batch


def knows(plan: Plan) -> bool:
    """Whether a plan expects launches to slow each other down."""
    return plan.contention is not None and plan.contention.slowdown > 0


def _sum(launches: list[Launch]) -> float:
    return _added([launch.gpu_pct for launch in launches])


def _added(shares: Iterable[float]) -> float:
    """Sum from left to right, as the compiled form does: `sum` rounds in another way from Python 3.12 on."""
    total = 0.0
    for share in shares:
        total += share
    return total
