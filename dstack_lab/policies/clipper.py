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
#: Batches of one size that say enough of it; up to this size exploring adds 1, then a part of normal distribution.
ENOUGH, ADDS, GROWS = 5, 10, (0.1, 0.05)
#: One tick of the clock [ms]: a request due now is lost.
TICK_MS = 1e-6


class Clipper(Policy):
    """One batch at a time at 100 GPU%, earliest deadline first; each service learns its own batch.

    *Rule*, after Crankshaw et al. (NSDI 2017). ``mode="aimd"``, of the paper: one request more after a
    full batch that took no longer than the SLO, a tenth less after one that did. ``mode="regression"``,
    of the published code: the budget is 92 % of the time to the earliest deadline. If it is longer than
    any batch has taken, explore: choose the largest batch ever chosen until that was seen five times (or
    was too large for the queue), then one request more, from 10 on about a tenth more, with noise. Else
    choose what a straight line predicts for the budget (`Regression`). Expired requests are dropped.

    *Needs to know* only SLOs: no profile. *Wins* where service times are unknown or drift. *Breaks* when
    networks cannot use the whole GPU; aimd because it looks at the time of a batch, not at the time a
    request has waited; regression because a queue whose oldest request is nearly due leaves a budget for
    one request, which is too slow to ever catch up: overloaded once, or cold under load, it stays there.

    *Differs* from the published code, which fits its line by ridge regression (here by least squares), knows
    no largest batch (here the largest that was profiled), and keeps a process for each network. Here they
    take turns; side by side, in each other's way, the regression collapses at lower loads still.

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
            expired = [Drop(s.name, n) for s in state.services if s.oldest_deadline_ms <= state.now_ms and (n := s.late(TICK_MS))]
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
        chosen = learnt.within(budget) if budget <= learnt.longest_ms else learnt.explore(self.rng)
        learnt.largest = max(learnt.largest, min(chosen, view.batch_max))
        return chosen

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the whole GPU."""
        return {a.service: (plan.shares[-1],) for a in plan.allocations}


class Regression:
    """A straight line of batch on service time: one point per size seen, at its mean + 3 pooled standard deviations."""

    def __init__(self) -> None:
        self.largest, self.longest_ms = 1, 0.0  #: largest batch ever chosen, longest time ever taken
        self._seen: dict[int, tuple[int, float, float]] = {}  # size -> how often, mean, sum of squares about it

    def add(self, batch: int, took_ms: float) -> None:
        """Count one more batch."""
        n, mean, squares = self._seen.get(batch, (0, 0.0, 0.0))
        step = (took_ms - mean) / (n + 1)
        self._seen[batch] = (n + 1, mean + step, squares + n * (n + 1) * step**2)
        self.longest_ms = max(self.longest_ms, took_ms)

    def explore(self, rng: np.random.Generator) -> int:
        """Batch to try: the largest so far until it was seen often enough, or if it never was, a larger one."""
        largest = self.largest
        if 0 < self._seen.get(largest, (0,))[0] < ENOUGH:
            return largest
        return largest + 1 if largest < ADDS else int(largest * (1 + max(rng.normal(*GROWS), 0.0)))

    def within(self, budget_ms: float) -> int:
        """Batch that the line predicts for the budget, at least 1; without two different times, the mean of those seen."""
        if not self._seen:
            return 1
        often = [(n, squares / n) for n, _, squares in self._seen.values() if n >= ENOUGH]
        pooled = sum((n - 1) * variance for n, variance in often) / max(1, sum(n for n, _ in often) - len(self._seen))
        times = np.array([mean for _, mean, _ in self._seen.values()]) + 3 * math.sqrt(pooled)
        sizes = np.array([*self._seen], dtype=float)
        away = times - times.mean()
        spread = float(away @ away)
        slope = float(away @ sizes) / spread if spread > 1e-12 else 0.0
        return max(1, int(sizes.mean() + slope * (budget_ms - times.mean()) + 1e-9))
