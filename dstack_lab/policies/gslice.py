"""GSLICE: a fixed slice of the GPU for each service, batches and slices that adapt."""

from __future__ import annotations

from dstack_lab.checks import non_negative, positive
from dstack_lab.policies.base import Decision, GpuState, Launch, Policy, ServiceView
from dstack_lab.policies.batching import Stopwatch, adapted_batch, drop_lost
from dstack_lab.services import InfeasiblePlan, Plan

#: Weight of the newest sample in the estimated arrival rate.
NEWEST = 0.1
#: A recommended share closer than this to the present one [GPU%] is ignored; others need this many equal ones in a row.
IGNORED_PCT, AGREEING = 3.0, 5


class Gslice(Policy):
    """Disjoint shares in proportion to the knees; each service runs in its own, undisturbed.

    *Rule*, after Dhakal, Kulkarni, Ramakrishnan (SoCC 2020). Shares: each network's knee, scaled down
    together if they exceed 100 %. Batch: learnt from how long batches take; within 10 % of the limit it
    stays, above it shrinks by the excess over the time per request, below it grows by the headroom over
    it, to 64 at most. Share: after each batch one is recommended, in proportion to time over SLO or
    to arrival rate over throughput, whichever asks for more; a difference below 3 % is ignored, and the
    fifth equal recommendation in a row is applied, one service at a time. On a device the switch is to
    a prepared standby, so the GPU never waits for it. It never drops.

    *Needs to know* the knees, and service times of batches that it has not seen full. *Wins* by isolation:
    a service within its slice is not disturbed, and networks that cannot use the GPU run side by side.
    *Breaks* when load moves between services faster than slices do: what is idle in one slice serves
    nobody else; and by its own thrift: a batch that takes all of the SLO leaves requests no time to wait.

    Parameters
    ----------
    shares : dict of str to float, optional
        Slices to start from [GPU%] instead of those in proportion to the knees; together at most 100.
    resize : bool
        Whether recommendations are applied.
    slo_part : float
        Part of the SLO that a batch may take; the system's is all of it, which leaves none for waiting.
    drop_late : bool
        Drop requests that can no longer meet their deadline; the system itself never does.
    switch_ms : float
        How long the standby of a new share takes to be ready [ms]: until then the old share serves, and nobody
        else is resized. Seconds for a process under NVIDIA MPS, nothing for another green context.
    """

    def __init__(
        self,
        shares: dict[str, float] | None = None,
        resize: bool = True,
        slo_part: float = 1.0,
        drop_late: bool = False,
        switch_ms: float = 0.0,
    ) -> None:
        self.switch_ms = non_negative("switch_ms", switch_ms)
        self.start, self.resize, self.drop_late = shares, resize, drop_late
        self.slo_part = positive("slo_part", slo_part)

    def reset(self, plan: Plan) -> None:
        """Cut the GPU."""
        self.steps = plan.shares
        self.share = self._slices(plan)
        self.batch = {a.service: a.batch for a in plan.allocations}
        self.watch = Stopwatch()
        self.wish = {a.service: (0.0, 0) for a in plan.allocations}  # share recommended last, how often in a row
        self.standby: tuple[float, str, float] | None = None  # when it is ready, whose, at which share
        self.taken = dict.fromkeys(self.share, 0)
        self.rate = {a.service: (0.0, 0, a.rate_rps / 1000) for a in plan.allocations}  # until when, requests by then, per ms

    def _slices(self, plan: Plan) -> dict[str, float]:
        """Share of each service: grantable, together at most 100."""
        if self.start is not None:
            slices = {a.service: self.start.get(a.service, 0.0) for a in plan.allocations}
        else:
            knees = [t.knee_pct(a.batch) for a, t in zip(plan.allocations, plan.tables, strict=True)]
            scale = min(1.0, 100 / sum(knees))
            wanted = zip(plan.allocations, knees, strict=True)
            slices = {
                a.service: max([s for s in plan.shares if s <= k * scale + 1e-9], default=plan.shares[0]) for a, k in wanted
            }
        if sum(slices.values()) > 100 + 1e-6 or min(slices.values()) < 1:
            raise InfeasiblePlan(f"Gslice: slices {slices} must each be at least 1 GPU% and together at most 100")
        return slices

    def decide(self, state: GpuState) -> list[Decision]:
        """Learn from what ended, then launch every service whose slice is idle."""
        if self.standby is not None and state.now_ms >= self.standby[0]:
            self.share[self.standby[1]], self.standby = self.standby[2], None
        for view, batch, took in self.watch.finished(state):
            limit = self.slo_part * view.slo_ms
            self._count(view, state.now_ms)
            full = batch >= self.batch[view.name] or took > limit  # else it says nothing of a full batch
            if self.resize and full:
                self._recommend(view.name, batch, took, limit, state.now_ms)
            elif self.resize:  # what a full batch would take
                target = min(self.batch[view.name], view.batch_max)
                self._recommend(view.name, target, view.service_ms(target, self.share[view.name]), limit, state.now_ms)
            self.batch[view.name] = min(adapted_batch(self.batch[view.name], batch, took, limit), view.batch_max)
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        launches: list[Decision] = []
        free = state.free_pct
        for view in state.services:
            share = self.share[view.name]
            if view.ready and not view.in_flight and share <= free + 1e-6:  # after a switch a larger slice still runs out
                batch = view.queued(self.batch[view.name])
                self.watch.start(state, view.name, batch)
                launches.append(Launch(view.name, share, batch))
                free -= share
                self.taken[view.name] += batch
        return launches

    def _count(self, view: ServiceView, now: float) -> None:
        """Follow the arrival rate."""
        since, before, rate = self.rate[view.name]
        came = self.taken[view.name] + view.waiting
        sample = max(came - before, 0) / (now - since)
        self.rate[view.name] = (now, came, rate + NEWEST * (sample - rate))

    def _recommend(self, name: str, batch: int, took: float, limit: float, now: float = 0.0) -> None:
        """Count how often the same share is recommended; apply the fifth in a row."""
        if self.standby is not None:
            return  # one at a time
        present = self.share[name]
        ideal = present * max(took / limit, self.rate[name][2] * took / batch)
        ideal = min((s for s in self.steps if s >= ideal - 1e-9), default=self.steps[-1])
        if abs(ideal - present) < IGNORED_PCT:
            self.wish[name] = (0.0, 0)
            return
        last, times = self.wish[name]
        self.wish[name] = (ideal, times + 1 if ideal == last else 1)
        if self.wish[name][1] < AGREEING:
            return
        room = 100 - sum(self.share.values()) + present
        fits = [s for s in self.steps if s <= min(ideal, room) + 1e-9]
        if fits and (fits[-1] > present) == (ideal > present):
            self.standby = (now + self.switch_ms, name, fits[-1])
            if not self.switch_ms:
                self.share[name], self.standby = fits[-1], None
        self.wish = dict.fromkeys(self.wish, (0.0, 0))  # one service at a time: the others look again

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Its slice, and all that it may be resized to: standbys are prepared."""
        slices = self._slices(plan)
        return {name: tuple(sorted({s, *plan.shares})) if self.resize else (s,) for name, s in slices.items()}

    def first_shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Its slice."""
        return {name: (share,) for name, share in self._slices(plan).items()}
