"""Uncontrolled sharing: every service on the whole GPU at once, as MPS does by default."""

from __future__ import annotations

from dstack_lab.checks import require
from dstack_lab.policies.base import Decision, GpuState, Launch, Policy
from dstack_lab.policies.batching import Stopwatch, adapted_batch, drop_lost, saturated_batch
from dstack_lab.services import Plan

BATCHES = ("alone", "plan", "adaptive")


class Uncontrolled(Policy):
    """Each service launches as if it were alone, at 100 GPU%, whatever runs beside it.

    *Rule*: a service without a batch in flight takes what waits, up to its batch; it never drops. That is
    the documented default of NVIDIA's Multi-Process Service (no ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE``):
    processes share the GPU, nobody divides it.

    *Needs to know* only the service times at 100 % alone, for the batch. *Wins* at low load, and where
    networks are so small that together they fit. *Breaks* when they do not: kernels of one wait for
    those of all others (`contention.Contention`), the service times that the batches were chosen for
    no longer hold, and a network of many small kernels suffers most from a neighbour with large ones.

    Parameters
    ----------
    batches : {"alone", "plan", "adaptive"}
        The largest batch that leaves time for a request that just missed a launch, if the service
        were alone; that of the plan; or learnt by GSLICE's rule from how long batches really take.
    drop_late : bool
        Drop requests that can no longer meet their deadline; the system itself never does.
    """

    oversubscribes = True

    def __init__(self, batches: str = "alone", drop_late: bool = False) -> None:
        require(batches in BATCHES, "batches", batches, f"one of {BATCHES}")
        self.batches, self.drop_late = batches, drop_late

    def reset(self, plan: Plan) -> None:
        """Choose each service's batch."""
        self.share = plan.shares[-1]
        self.watch = Stopwatch()
        self.batch = {a.service: a.batch for a in plan.allocations}
        if self.batches == "alone":
            services = zip(plan.services, plan.tables, strict=True)
            self.batch = {s.name: saturated_batch(t, s.slo_ms, self.share) for s, t in services}

    def decide(self, state: GpuState) -> list[Decision]:
        """Launch every service that waits and has no batch in flight."""
        if self.batches == "adaptive":
            for view, batch, took in self.watch.finished(state):
                self.batch[view.name] = min(adapted_batch(self.batch[view.name], batch, took, view.slo_ms), view.batch_max)
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        launches: list[Decision] = []
        for view in state.services:
            if view.ready and not view.in_flight:
                batch = view.queued(self.batch[view.name])
                self.watch.start(state, view.name, batch)
                launches.append(Launch(view.name, self.share, batch))
        return launches

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the whole GPU."""
        return {a.service: (plan.shares[-1],) for a in plan.allocations}
