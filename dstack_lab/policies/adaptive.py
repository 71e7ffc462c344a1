"""D-STACK that watches its arrivals and plans anew when they have changed."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from dstack_lab.checks import count, non_negative
from dstack_lab.policies.base import Decision, GpuState, Wake
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.windows import PeriodPlan, plan_period
from dstack_lab.services import InfeasiblePlan, Plan

#: A rate has changed if its count is this many standard deviations (of Poisson arrivals) off, and off by this part.
SIGMAS, PART = 4.0, 0.15
#: Periods that are counted before a rate is judged, and after it has changed.
FRESH = 3


class AdaptiveDStack(DStack):
    """D-STACK whose windows follow the arrivals it sees; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    At the end of every period it counts the requests of the last `memory` periods. Where a count is
    far from what the windows are sized for, new windows are placed for the rates it saw, and take over
    after `switch_ms`: until then the old ones go on, so the GPU never waits for the change.

    *Needs to know* service times; rates only to begin with. *Wins* when rates step or drift, and when
    services come and go (a rate of zero is one). *Breaks* when bursts are as short as its memory: it
    then plans for what is over.

    Parameters
    ----------
    memory : int
        Periods over which arrivals are counted.
    switch_ms : float
        How long a changed share takes to be ready [ms]: seconds for a standby process under NVIDIA MPS,
        nothing for another green context.
    **options
        Those of `DStack`; `reject` is on, since rates may come that no plan holds.
    """

    def __init__(self, memory: int = 10, switch_ms: float = 0.0, **options: bool | float) -> None:
        super().__init__(**{"reject": True, **options})  # type: ignore[arg-type]
        self.memory, self.switch_ms = count("memory", memory, least=FRESH), non_negative("switch_ms", switch_ms)

    def reset(self, plan: Plan) -> None:
        """Begin with the rates of the plan."""
        super().reset(plan)
        self.plan = plan
        self.period_ms = max(service.slo_ms for service in plan.services)
        self.review_ms = self.period_ms
        self.rates = {a.service: a.rate_rps for a in plan.allocations}
        self.seen: deque[dict[str, int]] = deque([dict.fromkeys(self.rates, 0)], maxlen=self.memory + 1)
        self.coming: tuple[float, Plan, PeriodPlan] | None = None
        self.replanned_ms: list[float] = []  #: when windows were planned anew

    def decide(self, state: GpuState) -> list[Decision]:
        """Review the rates at a period's end, then schedule as D-STACK does."""
        now, wakes = state.now_ms, []
        if now >= self.review_ms:
            self._review(state, now)
            self.review_ms = now + self.period_ms
            wakes.append(Wake(self.review_ms))
        if self.coming is not None:
            if now >= self.coming[0]:
                self._adopt(self.coming[1], self.coming[2], now)
                self.coming = None
            else:
                wakes.append(Wake(self.coming[0]))
        return [*super().decide(state), *wakes]

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
        if not changed:
            return
        plan = replace(self.plan, allocations=tuple(replace(a, rate_rps=rates[a.service]) for a in self.plan.allocations))
        try:
            period = plan_period(plan, reject=True)
        except InfeasiblePlan:
            return  # not even a part of it fits: the old windows are as good as any
        self.rates = rates
        self.coming = (now + self.switch_ms, plan, period)
        self.replanned_ms.append(now)
        self.seen = deque([counts], maxlen=self.memory + 1)
