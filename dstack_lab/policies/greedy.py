"""The two extremes between which fairness lies: most requests, and most for the one who has least."""

from __future__ import annotations

from dstack_lab.policies.base import Decision, GpuState, Launch, Policy, ServiceView
from dstack_lab.policies.batching import drop_lost
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.slots import EPSILON
from dstack_lab.services import Plan

#: Periods (of the longest SLO) that fairness remembers.
MEMORY = 10


class MaxThroughput(Policy):
    """Greedy: whoever serves most requests per GPU% and ms goes first.

    *Rule*: of the ready batches that fit into the free GPU%, at the plan's shares, launch the one with
    the largest b/(g·L), again and again: the greedy order of Dantzig (1957) for a knapsack. A service runs
    one batch at a time.

    *Needs to know* service times. *Wins* in requests per second, all services together, and nothing
    else. *Breaks* fairness: under overload expensive networks starve.

    Parameters
    ----------
    drop_late : bool
        Drop requests that can no longer meet their deadline.
    """

    #: Whether a batch that fits may pass one that does not.
    passes = True

    def __init__(self, drop_late: bool = False) -> None:
        self.drop_late = drop_late

    def reset(self, plan: Plan) -> None:
        """Take the shares of the plan."""
        self.share = {a.service: a.gpu_pct for a in plan.allocations}
        self.needs_pct = min(self.share.values()) - EPSILON  # sums of shares such as 100/7 round

    def decide(self, state: GpuState) -> list[Decision]:
        """Fill the GPU with the batches that fit, in order."""
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        ready = [s for s in state.services if s.ready and not s.in_flight]
        launches: list[Decision] = []
        free = state.free_pct + EPSILON
        for view in sorted(ready, key=self._order):
            share = self.share[view.name]
            if share <= free:
                free -= share
                launches.append(Launch(view.name, share, view.queued(view.batch)))
            elif not self.passes:
                break
        return launches

    def _order(self, view: ServiceView) -> tuple[float, ...]:
        """Most requests per GPU%·ms first, of the batch it could launch now."""
        batch, share = view.queued(view.batch), self.share[view.name]
        return (-batch / (share * view.service_ms(batch, share)),)

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Those of the plan."""
        return {a.service: (a.gpu_pct,) for a in plan.allocations}


class MaxMin(MaxThroughput):
    """Max-min fair: whoever received least GPU time goes first, and is waited for.

    *Rule*, after max-min fairness (Bertsekas and Gallager, Data Networks, 1992): of the ready services,
    the one that received least GPU%·ms over the last 10 periods (a period is the longest SLO) launches at
    the plan's share. If its share is not free yet, nobody passes it, so a service with a large share is
    not starved by those with small ones.

    *Needs to know* service times. *Wins* in fairness: backlogged services get equal GPU time. *Breaks*
    in efficiency: GPU% idles while the least served waits for its share, and equal GPU time is not
    equal service.

    Parameters
    ----------
    drop_late : bool
        Drop requests that can no longer meet their deadline.
    """

    passes = False

    def reset(self, plan: Plan) -> None:
        """Take the shares of the plan; nobody has received anything."""
        super().reset(plan)
        self.scores = Scoreboard(self.share, max(s.slo_ms for s in plan.services), MEMORY)

    def decide(self, state: GpuState) -> list[Decision]:
        """Launch the least served, in order, until one does not fit."""
        decisions = super().decide(state)
        for launch in decisions:
            if isinstance(launch, Launch):
                service_ms = state.by_name[launch.service].service_ms(launch.batch, launch.gpu_pct)
                self.scores.add(state.now_ms, launch.service, launch.gpu_pct * service_ms)
        return decisions

    def _order(self, view: ServiceView) -> tuple[float, ...]:
        """Least GPU time received first, then the earliest deadline."""
        return self.scores.received[view.name], view.due_ms
