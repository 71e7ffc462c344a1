"""Temporal sharing: the whole GPU for one batch at a time."""

from __future__ import annotations

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, Wake
from dstack_lab.services import Plan
from dstack_lab.state import INFINITE


class Temporal(Policy):
    """One batch at a time at 100 GPU%, earliest deadline first.

    *Rule*: of the services with a batch ready, the one whose oldest request is due first (Liu and Layland,
    1973, without preemption) takes the whole GPU until its batch ends. The batch is the largest b with
    ``2 · L(b, 100 %) <= SLO``, the saturated batch of Nexus (SOSP 2019): a request that just misses a
    launch is still in time with the next. Work-conserving: an idle GPU takes what waits, it never drops.

    *Needs to know* the service times at 100 %. *Wins* when networks use the whole GPU, or when one
    service is alone. *Breaks* when networks cannot use the GPU: their knees lie below 100 %, and what
    is above the knee is paid for and idle.

    Parameters
    ----------
    drop_late : bool
        Drop requests that can no longer meet their deadline, instead of serving them late.
    """

    needs_pct = 100.0

    def __init__(self, drop_late: bool = False) -> None:
        self.drop_late = drop_late

    def reset(self, plan: Plan) -> None:
        """Choose each service's batch for the whole GPU."""
        self.share = plan.shares[-1]
        self.batch = {}
        for service, table in zip(plan.services, plan.tables, strict=True):
            fits = [b for b in range(1, table.batch_max + 1) if 2 * table.at(b, self.share) <= service.slo_ms]
            self.batch[service.name] = max(fits, default=1)

    def decide(self, state: GpuState) -> list[Decision]:
        """Launch the ready service whose oldest deadline is nearest."""
        if state.free_pct < 100:
            return []
        if self.drop_late:
            hopeless = [Drop(s.name, n) for s in state.services if s.ready and (n := s.late(s.service_ms(1, self.share)))]
            if hopeless:
                return [*hopeless, Wake(state.now_ms)]
        best, nearest = None, INFINITE
        for service in state.services:
            if service.due_ms < nearest:
                best, nearest = service, service.due_ms
        if best is None:
            return []
        return [Launch(best.name, self.share, best.queued(self.batch[best.name]))]

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the whole GPU."""
        return {a.service: (plan.shares[-1],) for a in plan.allocations}
