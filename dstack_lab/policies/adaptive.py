"""D-STACK that watches its arrivals and its launches, and plans anew when they are not as it was told."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from dstack_lab.arrivals import Poisson
from dstack_lab.checks import count, non_negative
from dstack_lab.contention import Contention
from dstack_lab.policies.base import Decision, GpuState, Wake
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.slot_plan import cut_slots
from dstack_lab.policies.slots import SlotKeeper, Slots
from dstack_lab.policies.slowness import SlownessWatch
from dstack_lab.policies.windows import EPSILON, PeriodPlan, plan_period
from dstack_lab.services import InfeasiblePlan, Plan
from dstack_lab.tables import ServiceTable
from dstack_lab.work import Work, WorkLost

#: A rate has changed if its count is this many standard deviations (of Poisson arrivals) off, and off by this part.
SIGMAS, PART = 4.0, 0.15
#: What launches cost each other has changed if it is this much off, and how long one takes alone by this part.
COSTS, LASTS = 0.04, 0.07
#: Periods that are counted before a rate is judged, and after it has changed.
FRESH = 3


class _Asked(NamedTuple):
    """A plan that is being made."""

    work: Work
    since_ms: float
    plan: Plan
    rates: dict[str, float]
    counts: dict[str, int]  # arrivals when it was asked for


class AdaptiveDStack(DStack):
    """D-STACK whose plan follows what it sees; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    At the end of every period it counts the requests of the last `memory` periods, and looks at how long
    launches took, alone and beside others (`SlownessWatch`). Where a count is far from what the plan is sized
    for, or launches cost each other more or less than it knows of, it plans anew for what it saw. The new plan takes over
    after `switch_ms`: until then the old one goes on, so the GPU never waits for the change.

    In a real run plans are made in a process beside the loop (`GpuState.apart`), and the old plan goes on meanwhile too. If
    a service came, left or changed its rate meanwhile, so that the old plan is as near to what came as the new one, the new
    one is thrown away and another one made at the next period's end. Simulated plans take `plans_in_ms`.

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
    plans_in_ms : float
        How long it takes, at least, to have a plan that was asked for [ms]: all that planning costs in a simulation, to
        study what slow planning does. A real run takes as long as it takes.
    **options
        Those of `DStack`; `reject` is on, since rates may come that no plan holds.
    """

    works_apart = True

    def __init__(
        self,
        memory: int = 10,
        switch_ms: float = 0.0,
        learns: bool = True,
        plans_in_ms: float = 0.0,
        **options: bool | float,
    ) -> None:
        super().__init__(**{"reject": True, **options})  # type: ignore[arg-type]
        self.memory, self.switch_ms = count("memory", memory, least=FRESH), non_negative("switch_ms", switch_ms)
        self.learns, self.plans_in_ms = learns, non_negative("plans_in_ms", plans_in_ms)

    def reset(self, plan: Plan) -> None:
        """Begin with the rates of the plan."""
        super().reset(plan)
        # plans are made without arrivals, which may be long, or of a class that no other process knows
        self.plan = replace(plan, services=tuple(replace(s, arrivals=Poisson(1.0)) for s in plan.services))
        self.wait_part = None if self.keeper is None else self.keeper.slots.wait_part
        self.most = self.copies(plan)
        self.period_ms = max(service.slo_ms for service in plan.services)
        self.review_ms = self.period_ms
        self.rates = {a.service: a.rate_rps for a in plan.allocations}
        self.seen: deque[dict[str, int]] = deque([dict.fromkeys(self.rates, 0)], maxlen=self.memory + 1)
        self.asked: _Asked | None = None
        self.again = False  # the plan that was asked for last came too late
        self.coming: tuple[float, Plan, PeriodPlan | Slots] | None = None
        self.replanned_ms: list[float] = []  #: when it had a new plan
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
        if self.asked is not None and self.asked.work.done:
            if now + EPSILON >= (ready := self.asked.since_ms + self.plans_in_ms):
                self._receive(state, self.asked, now)
            else:
                wakes.append(Wake(ready))
        if self.coming is not None:
            if now + EPSILON >= self.coming[0]:  # clocks count whole nanoseconds
                _, plan, made = self.coming
                if isinstance(made, Slots):
                    self._keep(SlotKeeper(plan, made, self.reject, self.fair, self.most))
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
        if self.asked is not None or self.coming is not None or periods < FRESH:
            return
        rates, changed = {}, False
        for name, rate in self.rates.items():
            stepped = _off(counts[name] - self.seen[0][name], rate * periods * self.period_ms / 1000)
            since = FRESH if stepped else periods  # after a step the older counts are of another rate
            rates[name] = max(0, counts[name] - self.seen[-1 - since][name]) * 1000 / (since * self.period_ms)
            changed = changed or stepped
        learnt = self._learnt()
        if changed or learnt or self.again:
            self._plan_anew(state, rates if changed or self.again else self.rates, counts)
            self.again = False
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

    def _plan_anew(self, state: GpuState, rates: dict[str, float], counts: dict[str, int]) -> None:
        """Have a plan made for these rates and the service times believed now."""
        points, tables = [], []
        for a, alone in zip(self.plan.allocations, self.plan.tables, strict=True):
            table = ServiceTable(alone.ms * self.factors.get(a.service, 1.0))
            points.append(replace(a, rate_rps=rates[a.service], service_ms=table.at(a.batch, a.gpu_pct)))
            tables.append(table)
        plan = replace(self.plan, allocations=tuple(points), tables=tuple(tables), contention=self.contention)
        if self._pools(plan):
            # engines ask how long to wait for company once, and devices how many workers to prepare
            work = state.apart(cut_slots, plan, True, tuple(a.rate_rps for a in points), self.wait_part)
        else:
            work = state.apart(plan_period, plan, True, self.beside)
        self.asked = _Asked(work, state.now_ms, plan, rates, counts)

    def _receive(self, state: GpuState, asked: _Asked, now: float) -> None:
        """Have the plan that was asked for take over, unless it is of no use."""
        self.asked = None
        try:
            made = asked.work.result()
        except (InfeasiblePlan, WorkLost):
            return  # not even a part of it fits, or nobody can tell: the old plan is as good as any
        if self._overtaken(state, asked, now):
            self.again = True
            return
        self.rates = asked.rates
        self.coming = (now + self.switch_ms, asked.plan, made)
        self.replanned_ms.append(now)

    def _overtaken(self, state: GpuState, asked: _Asked, now: float) -> bool:
        """Whether a service's arrivals since then are off the new plan by more than chance, and as much off the old one."""
        gone = (now - asked.since_ms) / 1000
        for service in state.services:
            name = service.name
            came, planned, known = service.arrived - asked.counts[name], asked.rates[name] * gone, self.rates[name] * gone
            if _off(came, planned) and abs(came - known) <= abs(came - planned) + PART * max(planned, known):
                return True
        return False


def _off(came: int, expected: float) -> bool:
    """Whether more or fewer requests came than chance explains."""
    off = abs(came - expected)
    return off > SIGMAS * math.sqrt(max(expected, 1.0)) and off > PART * expected
