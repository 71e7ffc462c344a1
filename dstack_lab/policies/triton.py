"""NVIDIA Triton Inference Server: dynamic batching, one instance of each model, no partition."""

from __future__ import annotations

from dstack_lab.checks import count, non_negative
from dstack_lab.policies.base import Decision, GpuState, Launch, Policy, Wake
from dstack_lab.policies.batching import drop_lost
from dstack_lab.services import Allocation, Plan


class Triton(Policy):
    """First come, first served within each model; a batch of whatever waits; all models at once.

    *Rule* (Triton's documented dynamic batcher, rate limiter off): each model has one instance and one
    queue. With ``delay_ms = 0`` a free instance takes everything queued, up to the largest batch. With a
    delay it waits until the largest batch is there or the oldest request has waited that long. Instances
    of different models run at the same time, without a partition: they contend.

    *Needs to know* nothing: no service times, no SLO, no rates. *Wins* in simplicity, and at low load:
    nothing ever waits that could run. *Breaks* under overload: it never drops and knows no deadline, so
    batches grow to the largest, queues without limit, and every service drags down all others.

    Parameters
    ----------
    max_batch : int, optional
        Largest batch; by default the largest that was profiled.
    delay_ms : float
        How long the oldest request may wait for its batch to fill [ms] (``max_queue_delay``).
    drop_late : bool
        Drop requests that can no longer meet their deadline; the system itself never does.
    """

    oversubscribes = True

    def __init__(self, max_batch: int | None = None, delay_ms: float = 0.0, drop_late: bool = False) -> None:
        self.max_batch = None if max_batch is None else count("max_batch", max_batch)
        self.delay_ms = non_negative("delay_ms", delay_ms)
        self.drop_late = drop_late
        self.every_arrival = self.delay_ms > 0  # the largest batch may fill at any arrival

    def reset(self, plan: Plan) -> None:
        """Forget the last run."""
        self.share = plan.shares[-1]
        self.most = {
            a.service: min(self.max_batch or t.batch_max, t.batch_max) for a, t in zip(plan.allocations, plan.tables, strict=True)
        }
        self.woken_ms = dict.fromkeys(self.most, -1.0)

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """The delay."""
        return self.delay_ms

    def decide(self, state: GpuState) -> list[Decision]:
        """Give every free instance its queue, or what is left of the delay."""
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        decisions: list[Decision] = []
        for view in state.services:
            if view.in_flight or not (batch := view.queued(self.most[view.name])):
                continue
            limit = view.oldest_arrival_ms + self.delay_ms
            if batch == self.most[view.name] or limit <= state.now_ms + 1e-6:
                decisions.append(Launch(view.name, self.share, batch))
            elif limit > self.woken_ms[view.name]:
                self.woken_ms[view.name] = limit
                decisions.append(Wake(limit))
        return decisions

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the whole GPU."""
        return {a.service: (plan.shares[-1],) for a in plan.allocations}
