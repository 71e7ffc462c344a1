"""Lanes side by side at run time: each service keeps its own busy, and who falls behind borrows from who can wait."""

from __future__ import annotations

import math

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, ServiceView
from dstack_lab.policies.windows import EPSILON, PeriodPlan
from dstack_lab.services import Allocation, Plan
from dstack_lab.state import NS_PER_MS

#: A batch is launched for its oldest request if it is at least this part of what waits; else some are better given up.
ENOUGH = 0.8
#: One more request is given up only if the batch that is left is served faster, per request, by this factor.
WORTH = 1.02
#: Whoever lends must have time to serve what will wait when the loan ends: this many times its service time.
SAFE = 1.1
#: Launches of a service at once: one in its own lane, one beside it.
MOST = 2


class LaneLender:
    """Launch in every lane as soon as requests wait, and lend lanes to who would be late in its own.

    1. *Own lane*: an idle lane launches all that waits, or as much as its oldest request can wait for. If that
       is little, the oldest are given up until what is left is served fastest, request by request.
    2. *Loan*: what would be late in its own lane, or after the launch that runs there, is launched at another
       share, if that is nobody's, or if the owners of idle lanes can wait until that launch has ended.

    Parameters
    ----------
    plan : Plan
    period : PeriodPlan
        Its shares, the lanes, add up to 100 % at most.
    drop : bool
        Give up requests. Without it a batch is no smaller than the one that keeps up with the rate, and once the
        oldest request is lost all that waits goes with it.
    """

    def __init__(self, plan: Plan, period: PeriodPlan, drop: bool) -> None:
        self.drop = drop
        self.points: dict[str, Allocation] = {a.service: a for a in period.allocations}
        self.own = [a.gpu_pct for a in period.allocations]
        self.others = [beside(plan, own) for own in self.own]
        self.rates = [a.rate_rps / 1000 for a in plan.allocations]
        # a hair less, as `decide` takes it: the sums of shares such as 100/7 round
        self.needs_pct = min(self.own + [shares[0] for shares in self.others if shares]) - EPSILON

    def decide(self, state: GpuState) -> list[Decision]:
        """Loans, the earliest deadline first; then every lane that is idle."""
        now, free = state.now_ms, state.free_pct + EPSILON
        decisions: list[Decision] = []
        gone = set[int]()  # lanes that are lent, and whose service has borrowed
        if behind := self._behind(state, now):
            idle = [view for view in state.services if not view.in_flight]
            for view in behind:
                if (loan := self._loan(state, view, now, free, idle)) is None:
                    continue
                share, lenders = loan
                decisions.append(Launch(view.name, share, view.queued(view.batch_max), "opportunistic"))
                free -= share
                gone.update(lender.index for lender in (view, *lenders))
                idle = [other for other in idle if other.index not in gone]
        for index in sorted(state.startable):
            if self.own[index] <= free and index not in gone:
                chosen = self._own_lane(state.services[index], now)
                if type(chosen[-1]) is Launch:
                    free -= self.own[index]
                decisions += chosen
        return decisions

    def _behind(self, state: GpuState, now: float) -> list[ServiceView]:
        """Services whose oldest request is late if all that waits has to go through the own lane."""
        ends = [now] * len(self.own)
        for view, _, _, _, end_ns in state._running.values():
            ends[view.index] = max(ends[view.index], end_ns / NS_PER_MS)
        found = []
        for view in state.services:
            if view.ready and view.in_flight < MOST:
                ms = view.service_ms(view.queued(view.batch_max), self.own[view.index])
                if ends[view.index] + ms > view.oldest_deadline_ms:
                    found.append(view)
        found.sort(key=lambda view: (view.oldest_deadline_ms, view.index))
        return found

    def _loan(
        self, state: GpuState, view: ServiceView, now: float, free: float, idle: list[ServiceView]
    ) -> tuple[float, list[ServiceView]] | None:
        """Smallest other share at which all that waits is in time, and who lends for it; None if there is none."""
        batch, slack = view.queued(view.batch_max), view.oldest_deadline_ms - now
        spare = free
        for other in idle:
            if other is not view:
                spare -= self.own[other.index]
        for share in self.others[view.index]:
            if share > free:
                break
            if not view.in_flight and share < self.own[view.index]:
                continue  # its own lane is idle: only a wider one helps
            ms = view.service_ms(batch, share)
            if ms > slack or any(of is view and held == share for of, held, *_ in state._running.values()):
                continue  # a device has one worker for each share of a service
            lenders = self._lenders(view, share - max(spare, 0.0), now + ms, ms, idle)
            if lenders is not None:
                return share, lenders
        return None

    def _lenders(
        self, borrower: ServiceView, missing: float, end: float, ms: float, idle: list[ServiceView]
    ) -> list[ServiceView] | None:
        """Owners of idle lanes, the widest first, that give up `missing` GPU% until `end`; None if they cannot."""
        lenders: list[ServiceView] = []
        for view in sorted(idle, key=lambda view: (-self.own[view.index], view.index)):
            if missing <= 0:
                break
            if view is borrower:
                continue
            waits = view.queued(view.batch_max)
            deadline = view.oldest_deadline_ms if waits else end - ms + view.slo_ms
            batch = min(view.batch_max, max(1, math.ceil(waits + self.rates[view.index] * ms)))
            if end + SAFE * view.service_ms(batch, self.own[view.index]) <= deadline:
                lenders.append(view)
                missing -= self.own[view.index]
        return lenders if missing <= 0 else None

    def _own_lane(self, view: ServiceView, now: float) -> list[Decision]:
        """Launch what waits, without the oldest requests if they would make too small a batch."""
        share, waits = self.own[view.index], view.queued(view.batch_max)
        batch = _in_time(view, waits, share, view.oldest_deadline_ms - now)
        if batch >= ENOUGH * waits:
            return [Launch(view.name, share, batch, "planned")]
        if not self.drop:
            planned = min(waits, self.points[view.name].batch)
            return [Launch(view.name, share, max(batch, planned) if batch else waits, "planned")]
        lost, batch = self._cut(view, now, share)
        decisions: list[Decision] = [Drop(view.name, lost)] if lost else []
        return [*decisions, Launch(view.name, share, batch, "planned")] if batch else decisions

    def _cut(self, view: ServiceView, now: float, share: float) -> tuple[int, int]:
        """How many of the oldest requests to give up, and the batch to launch then; all and none if all are lost."""
        waits = view.waiting
        best, lost, kept = 0.0, waits, 0
        for given_up in range(waits):
            rest = min(view.batch_max, waits - given_up)
            batch = _in_time(view, rest, share, view.deadline_ms(given_up) - now)
            if batch and batch > WORTH * best * (ms := view.service_ms(batch, share)):
                best, lost, kept = batch / ms, given_up, batch
            if batch == rest:
                break
        return lost, kept


def _in_time(view: ServiceView, batch: int, share: float, slack_ms: float) -> int:
    """Largest batch, up to this one, that takes no longer than that."""
    while batch and view.service_ms(batch, share) > slack_ms:
        batch -= 1
    return batch


def beside(plan: Plan, own_pct: float) -> tuple[float, ...]:
    """Shares beside its own lane's that a service may get: the next smaller, the next larger, and about twice as much."""
    smaller, larger = (s for s in plan.shares if s < own_pct), (s for s in plan.shares if s > own_pct)
    twice = min(plan.shares, key=lambda s: (abs(s - 2 * own_pct), s))
    found = {max(smaller, default=own_pct), min(larger, default=own_pct), twice} - {own_pct}
    return tuple(sorted(found))
