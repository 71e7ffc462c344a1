"""D-STACK that watches its arrivals and its launches, and plans anew when they are not as it was told."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from dstack_lab.checks import count, non_negative
from dstack_lab.contention import Contention
from dstack_lab.policies.base import Decision, GpuState, Wake
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.slot_plan import cut_slots
from dstack_lab.policies.slots import SlotKeeper
from dstack_lab.policies.slowness import SlownessWatch
from dstack_lab.policies.windows import EPSILON, PeriodPlan, plan_period
from dstack_lab.services import InfeasiblePlan, Plan
from dstack_lab.tables import ServiceTable

#: A rate has changed if its count is this many standard deviations (of Poisson arrivals) off, and off by this part.
SIGMAS, PART = 4.0, 0.15
#: What launches cost each other has changed if it is this much off, and how long one takes alone by this part.
COSTS, LASTS = 0.04, 0.07
#: Periods that are counted before a rate is judged, and after it has changed.
FRESH = 3


class AdaptiveDStack(DStack):
    """D-STACK whose plan follows what it sees; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    At the end of every period it counts the requests of the last `memory` periods, and looks at how long
    launches took, alone and beside others (`SlownessWatch`). Where a count is far from what the plan is sized
    for, or launches cost each other more or less than it knows of, it plans anew for what it saw. The new plan takes over
    after `switch_ms`: until then the old one goes on, so the GPU never waits for the change.

    *Needs to know* service times, roughly; rates only to begin with. *Wins* when rates step or drift, when
    services come and go (a rate of zero is one), and when launches slow each other down. *Breaks* when
    bursts are as short as its memory: it then plans for what is over.

    Parameters
    ----------
    memory : int
        Periods over which arrivals are counted.
    switch_ms : float
        How long a changed share takes to be ready [ms]: seconds for a standby process under NVIDIA MPS,
        nothing for another green context.
    learns : bool
        Whether it learns from how long launches take; if not, it believes what it was told.
    **options
        Those of `DStack`; `reject` is on, since rates may come that no plan holds.
    """

    def __init__(self, memory: int = 10, switch_ms: float = 0.0, learns: bool = True, **options: bool | float) -> None:
        super().__init__(**{"reject": True, **options})  # type: ignore[arg-type]
        self.memory, self.switch_ms = count("memory", memory, least=FRESH), non_negative("switch_ms", switch_ms)
        self.learns = learns

    def reset(self, plan: Plan) -> None:
        """Begin with the rates of the plan."""
        super().reset(plan)
        self.plan = plan
        self.wait_part = None if self.keeper is None else self.keeper.slots.wait_part
        self.most = self.copies(plan)
        self.period_ms = max(service.slo_ms for service in plan.services)
        self.review_ms = self.period_ms
        self.rates = {a.service: a.rate_rps for a in plan.allocations}
        self.seen: deque[dict[str, int]] = deque([dict.fromkeys(self.rates, 0)], maxlen=self.memory + 1)
        self.coming: tuple[float, Plan, PeriodPlan | SlotKeeper] | None = None
        self.replanned_ms: list[float] = []  #: when it planned anew
        told = Contention(slowdown=0) if plan.contention is None else plan.contention
        self.contention = told  #: what it believes launches cost each other
        self.factors: dict[str, float] = {}  #: what it believes a launch alone takes, over what it was told
        self.watch = SlownessWatch(told.exponent)
        self.needs_pct = plan.shares[0] - EPSILON  # engines ask once: later slots may be narrower than the first ones

    def decide(self, state: GpuState) -> list[Decision]:
        """Review the rates at a period's end, then schedule as D-STACK does."""
        now, wakes = state.now_ms, []
        if self.learns:
            self.watch.look(state)
        if now >= self.review_ms:
            self._review(state, now)
            self.review_ms = now + self.period_ms
            wakes.append(Wake(self.review_ms))
        if self.coming is not None:
            if now + EPSILON >= self.coming[0]:  # clocks count whole nanoseconds
                _, plan, made = self.coming
                if isinstance(made, SlotKeeper):
                    self._keep(made)
                else:
                    self._adopt(plan, made, now)
                self.coming = None
            else:
                wakes.append(Wake(self.coming[0]))
        decisions = super().decide(state)
        if self.learns:
            self.watch.launched(state, decisions)
        return [*decisions, *wakes]

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """All: nobody knows which ones the rates will ask for."""
        return {a.service: plan.shares for a in plan.allocations}

    def first_shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Those that the windows of the plan's own rates use."""
        return super().shares(plan)

    def _review(self, state: GpuState, now: float) -> None:
        """Plan anew if a service's arrivals differ from what its windows are sized for by more than chance."""
        counts = {service.name: service.arrived for service in state.services}
        self.seen.append(counts)
        periods = len(self.seen) - 1
        if self.coming is not None or periods < FRESH:
            return
        rates, changed = {}, False
        for name, rate in self.rates.items():
            expected = rate * periods * self.period_ms / 1000
            off = abs(counts[name] - self.seen[0][name] - expected)
            stepped = off > SIGMAS * math.sqrt(max(expected, 1.0)) and off > PART * expected
            since = FRESH if stepped else periods  # after a step the older counts are of another rate
            rates[name] = max(0, counts[name] - self.seen[-1 - since][name]) * 1000 / (since * self.period_ms)
            changed = changed or stepped
        learnt = self._learnt()
        if changed or learnt:
            self._plan_anew(rates if changed else self.rates, now)
            self.seen = deque([counts], maxlen=self.memory + 1)

    def _learnt(self) -> bool:
        """Whether launches take other times than the plan was made for; if so, believe what was seen."""
        if not (self.learns and self.watch.enough):
            return False
        known, seen = self.contention.slowdown, self.watch.slowdown
        costs = known if seen is None or abs(seen - known) <= COSTS else seen
        factors = self.watch.factors(known if seen is None else seen)
        self.watch.forget(1 / self.memory)
        moved = any(abs(f / self.factors.get(name, 1.0) - 1) > LASTS for name, f in factors.items())
        if costs == known and not moved:
            return False
        self.contention = replace(self.contention, slowdown=costs)
        self.factors = factors
        return True

    def _plan_anew(self, rates: dict[str, float], now: float) -> None:
        """Make a plan for these rates and the service times believed now."""
        points, tables = [], []
        for a, alone in zip(self.plan.allocations, self.plan.tables, strict=True):
            table = ServiceTable(alone.ms * self.factors.get(a.service, 1.0))
            points.append(replace(a, rate_rps=rates[a.service], service_ms=table.at(a.batch, a.gpu_pct)))
            tables.append(table)
        plan = replace(self.plan, allocations=tuple(points), tables=tuple(tables), contention=self.contention)
        made: PeriodPlan | SlotKeeper
        try:
            if self._pools(plan):
                # engines ask how long to wait for company once, and devices how many workers to prepare
                slots = cut_slots(plan, True, tuple(a.rate_rps for a in points), self.wait_part)
                made = SlotKeeper(plan, slots, self.reject, self.fair, self.most)
            else:
                made = plan_period(plan, True, self.beside)
        except InfeasiblePlan:
            return  # not even a part of it fits: the old plan is as good as any
        self.rates = rates
        self.coming = (now + self.switch_ms, plan, made)
        self.replanned_ms.append(now)
