"""D-STACK: a planned cut of the GPU, launches by who has to begin first, and a scoreboard that keeps it fair."""

from __future__ import annotations

from collections.abc import Iterable

from dstack_lab.checks import non_negative
from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, ServiceView, Wake
from dstack_lab.policies.calendar import Booking, Calendar
from dstack_lab.policies.fair_parts import fairly_reduced
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.slot_plan import cut_slots
from dstack_lab.policies.slots import MEMORY, SlotKeeper
from dstack_lab.policies.windows import EPSILON, PeriodPlan, ladders, plan_period
from dstack_lab.services import Allocation, Plan


class DStack(Policy):
    """Dynamic, fair spatio-temporal scheduling; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    1. *Planned*: the GPU is cut into equal slots, as many as make fewest requests late in a trial on drawn arrivals
       (`cut_slots`). Any service may use any slot, a hot one several: none idles while somebody waits.
    2. *Dynamic*: whenever a slot is free, the service that has to begin first to be in time launches all that waits,
       or as much as its oldest request can wait for (`SlotKeeper`).
    3. *Fair*: among services that should have begun already, the one that received least GPU%·ms over the last
       10 periods goes first.

    Without ``pool`` it follows the windows of the paper instead: each service owns launch windows at its knee share,
    often enough for its SLO, that never need more than 100 GPU% (`plan_period`), side by side in lanes or in turn.
    Whenever GPU% is free and a batch is ready, it is launched if it ends before any window that needs its share;
    an empty window is given away.

    *Needs to know* service times and rates. *Wins* when knees lie well below 100 %: several networks
    run side by side at shares they can use. *Breaks* when one network fills the GPU, or when the
    service times or rates it was told are wrong: it then cuts the GPU, and batches, for what does not come.

    Parameters
    ----------
    planned, opportunistic, fair : bool
        Switch an ingredient off, for ablations. Without `fair`, deadlines alone say who goes first.
    patience : float
        Without `pool`, part of its slack (SLO less service time) that the oldest request of an unfilled batch waits
        before the batch counts as ready for an opportunistic launch; 0 launches whatever waits.
    reject : bool
        Under overload, give up requests that are lost, and the oldest where the batch that is left answers more in
        time; windows are planned for the part of the load that fits. Without it an overload is an `InfeasiblePlan`.
    beside : bool
        Run services side by side. Without it windows take turns; with it, but without `pool`, every service has a
        lane of its own where lanes hold the load (`lanes`).
    pool : bool
        Cut the GPU into slots for all. It takes `planned`, `opportunistic` and `beside`.

    Raises
    ------
    ValueError
        If `patience` is negative.
    """

    def __init__(
        self,
        planned: bool = True,
        opportunistic: bool = True,
        fair: bool = True,
        patience: float = 0.25,
        reject: bool = False,
        beside: bool = True,
        pool: bool = True,
    ) -> None:
        self.planned, self.opportunistic, self.fair = planned, opportunistic, fair
        self.patience = non_negative("patience", patience)
        self.reject, self.beside, self.pool = reject, beside, pool

    def reset(self, plan: Plan) -> None:
        """Cut the GPU into slots or place the windows; that may lower shares or batches to make them fit."""
        self.keeper: SlotKeeper | None = None
        if self._pools(plan):
            self._keep(SlotKeeper(plan, cut_slots(plan, self.reject), self.reject, self.fair))
        else:
            names, longest = [s.name for s in plan.services], max(s.slo_ms for s in plan.services)
            self.scores = Scoreboard(names, longest, MEMORY)
            self._adopt(plan, self._period(plan), 0.0)

    def _pools(self, plan: Plan) -> bool:
        """Whether slots are for all; windows do not know that launches slow each other down."""
        return knows(plan) or (self.pool and self.beside and self.planned and self.opportunistic)

    def _period(self, plan: Plan) -> PeriodPlan:
        """Windows of a plan; beyond the bound those who ask for more than a fair part of the GPU give way."""
        return plan_period(fairly_reduced(plan) if self.reject else plan, self.reject, self.beside)

    def _keep(self, keeper: SlotKeeper) -> None:
        """Follow slots."""
        self.keeper, self.needs_pct = keeper, keeper.needs_pct

    def _adopt(self, plan: Plan, period: PeriodPlan, now: float) -> None:
        """Follow the windows of `period` from `now` on."""
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

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """Part of its SLO, in slots, or of its slack that a request waits for company."""
        if self.keeper is not None:
            return self.keeper.slots.wait_part * slo_ms
        return self.patience * max(slo_ms - allocation.service_ms, 0.0)

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """That of each service's slots, or from the share of its windows up to the plan's."""
        if self._pools(plan):
            shares = cut_slots(plan, self.reject).gpu_pct
            return {service.name: (share,) for service, share in zip(plan.services, shares, strict=True)}
        return {name: tuple(sorted(ladder)) for name, ladder in ladders(plan, self._period(plan)).items()}

    def copies(self, plan: Plan) -> int:
        """Slots that one service may use at once."""
        return max(cut_slots(plan, self.reject).copies) if self._pools(plan) else 1

    def decide(self, state: GpuState) -> list[Decision]:
        """Fill slots; or planned windows first, then whatever fits before the next ones."""
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
