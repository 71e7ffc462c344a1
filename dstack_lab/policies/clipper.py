"""Clipper: a prediction server that finds its batches by trying."""

from __future__ import annotations

import math

import numpy as np

from dstack_lab.checks import count, non_negative, require
from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, ServiceView, Wake
from dstack_lab.policies.batching import Stopwatch, drop_lost
from dstack_lab.services import Allocation, Plan
from dstack_lab.state import INFINITE

MODES = ("aimd", "regression")
#: A batch that missed shrinks to this part; a batch is planned for this part of the time left.
BACK_OFF, BUDGET = 0.9, 0.92


class Clipper(Policy):
    """One batch at a time at 100 GPU%, earliest deadline first; each service learns its own batch.

    *Rule*, after Crankshaw et al. (NSDI 2017). ``mode="aimd"``, of the paper: one request more after a
    full batch that took no longer than the SLO, a tenth less after one that did. ``mode="regression"``,
    of the published code: the budget is 92 % of the time to the earliest deadline. If it is longer than
    any batch has taken, try one request more than ever before (from 10 on about a tenth more, with
    noise), else the largest batch whose mean + 3 standard deviations, by a straight line through all
    batches so far, is within it. Requests already expired are dropped.

    *Needs to know* only SLOs: no profile. *Wins* where service times are unknown or drift. *Breaks* when
    networks cannot use the whole GPU; aimd because it looks at the time of a batch, not at the time a
    request has waited; regression because a queue whose oldest request is nearly due leaves a budget for
    one request, which is too slow to ever catch up: overloaded once, or cold under load, it stays there.

    Parameters
    ----------
    mode : {"aimd", "regression"}
    delay_ms : float
        How long the oldest request may wait for company [ms]; the paper suggests 2 at moderate load.
    drop_late : bool, optional
        Drop requests that can no longer meet their deadline. By default what the system does: aimd
        drops nothing, regression what has expired.
    seed : int
        Of the noise in its steps.
    """

    needs_pct = 100.0

    def __init__(self, mode: str = "aimd", delay_ms: float = 0.0, drop_late: bool | None = None, seed: int = 0) -> None:
        require(mode in MODES, "mode", mode, f"one of {MODES}")
        self.mode, self.drop_late = mode, drop_late
        self.delay_ms, self.seed = non_negative("delay_ms", delay_ms), count("seed", seed, least=0)

    def reset(self, plan: Plan) -> None:
        """Forget what was learnt."""
        self.share = plan.shares[-1]
        self.watch = Stopwatch()
        self.batch = {s.name: 1 for s in plan.services}
        self.learnt = {s.name: Regression() for s in plan.services}
        self.rng = np.random.default_rng(self.seed)

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """The delay."""
        return self.delay_ms

    def decide(self, state: GpuState) -> list[Decision]:
        """Learn from the batch that ended, then launch the nearest deadline."""
        for view, batch, took in self.watch.finished(state):
            self._learn(view, batch, took)
        if state.free_pct < 100:
            return []
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        if self.drop_late is None and self.mode == "regression":
            expired = [Drop(s.name, n) for s in state.services if s.oldest_deadline_ms < state.now_ms and (n := s.late())]
            if expired:
                return [*expired, Wake(state.now_ms)]
        best = min(state.services, key=lambda s: s.due_ms)
        if best.due_ms == INFINITE:
            return []
        batch = best.queued(min(self._most(best, best.oldest_deadline_ms - state.now_ms), best.batch_max))
        self.watch.start(state, best.name, batch)
        return [Launch(best.name, self.share, batch)]

    def _learn(self, view: ServiceView, batch: int, took: float) -> None:
        self.learnt[view.name].add(batch, took)
        if took > view.slo_ms:
            self.batch[view.name] = max(1, int(BACK_OFF * self.batch[view.name]))
        elif batch == self.batch[view.name]:  # an unfilled batch says nothing of a full one
            self.batch[view.name] = min(batch + 1, view.batch_max)

    def _most(self, view: ServiceView, left_ms: float) -> int:
        """Largest batch to launch now."""
        if self.mode == "aimd":
            return self.batch[view.name]
        learnt, budget = self.learnt[view.name], BUDGET * left_ms
        if budget <= learnt.longest_ms:
            return learnt.within(budget)
        seen = learnt.largest
        return seen + 1 if seen < 10 else max(seen + 1, round(seen * self.rng.normal(1.1, 0.05)))

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the whole GPU."""
        return {a.service: (plan.shares[-1],) for a in plan.allocations}


class Regression:
    """Least squares of service time on batch, from running sums."""

    def __init__(self) -> None:
        self.n, self.largest, self.longest_ms = 0, 0, 0.0
        self._b = self._t = self._bb = self._bt = self._tt = 0.0

    def add(self, batch: int, took_ms: float) -> None:
        """Count one more batch."""
        self.n, self.largest, self.longest_ms = self.n + 1, max(self.largest, batch), max(self.longest_ms, took_ms)
        self._b, self._t = self._b + batch, self._t + took_ms
        self._bb, self._bt, self._tt = self._bb + batch**2, self._bt + batch * took_ms, self._tt + took_ms**2

    def within(self, budget_ms: float) -> int:
        """Largest batch whose mean + 3 standard deviations is within the budget, at least 1; 1 if no line can be drawn."""
        spread = self._bb - self._b**2 / self.n if self.n else 0.0
        if spread <= 1e-9:
            return 1
        slope = (self._bt - self._b * self._t / self.n) / spread
        fixed = (self._t - slope * self._b) / self.n
        rest = self._tt - fixed * self._t - slope * self._bt  # squared residuals
        margin = 3 * math.sqrt(max(rest, 0.0) / self.n)
        if slope <= 1e-12:
            return self.largest if fixed + margin <= budget_ms else 1
        return max(1, int((budget_ms - margin - fixed) / slope + 1e-9))
