"""Nexus: squishy bin packing decides the batches, early drop keeps them in time."""

from __future__ import annotations

from collections.abc import Sequence

from dstack_lab.checks import positive
from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, ServiceView, Wake
from dstack_lab.policies.batching import drop_lost
from dstack_lab.policies.packing import pack
from dstack_lab.services import Plan

#: Service times are planned this many times longer; rates that leave this range of the planned ones ask for a new plan.
PADDING, LOWER, UPPER = 1.15, 0.8, 1.1


class Nexus(Policy):
    """Services take turns on the whole GPU, with batches sized for the cycle in which they take turns.

    *Rule*, after Shen et al. (SOSP 2019): batches come from squishy bin packing (`packing.pack`). Round
    robin over the services, one batch at a time at 100 %; nobody waits for a turn while the GPU is
    idle. Early drop: a batch of the target size must finish before the deadline of its oldest request;
    requests for which it would not are dropped, and if fewer remain the target shrinks. Every epoch the
    rates are compared with those planned for.

    *Needs to know* service times at 100 %, SLOs and rates. *Wins* under overload: efficient batches
    and no time spent on what is late anyway. *Breaks* when networks cannot use the whole GPU, and on
    bursts: what a smaller batch could have saved is dropped.

    On one GPU, what the packing would put on further GPUs stays, with the batch found there; the load
    is then more than the GPU, and early drop sheds it.

    Parameters
    ----------
    drop_late : bool, optional
        True drops only requests that can no longer be in time even alone, False drops none. By
        default what the system does: early drop.
    epoch_ms : float
        How often the batches may be planned anew [ms].
    """

    needs_pct = 100.0

    def __init__(self, drop_late: bool | None = None, epoch_ms: float = 30_000.0) -> None:
        self.drop_late, self.epoch_ms = drop_late, positive("epoch_ms", epoch_ms)

    def reset(self, plan: Plan) -> None:
        """Pack for the rates of the plan."""
        self.share, self.plan = plan.shares[-1], plan
        self.turn, self.epoch_end_ms = 0, self.epoch_ms
        self.taken = dict.fromkeys([a.service for a in plan.allocations], 0)  # launched or dropped
        self.counted = dict(self.taken)
        self._pack([a.rate_rps for a in plan.allocations])

    def _pack(self, rates: Sequence[float]) -> None:
        self.rates = dict(zip(self.taken, rates, strict=True))
        self.nodes = pack(self.plan.services, self.plan.tables, rates, self.share, PADDING)
        self.batch = dict.fromkeys(self.taken, 1)
        for node in reversed(self.nodes):  # of a service on several GPUs, the first node's: its saturated batch
            self.batch.update(node.batches)

    def decide(self, state: GpuState) -> list[Decision]:
        """Launch the next service in turn that has something to serve."""
        if state.now_ms >= self.epoch_end_ms:
            self._new_epoch(state)
        if state.free_pct < 100:
            return []
        if self.drop_late and (lost := drop_lost(state, self.share)):
            for drop in lost:
                if isinstance(drop, Drop):
                    self.taken[drop.service] += drop.requests
            return lost
        decisions: list[Decision] = []
        services = state.services
        for step in range(len(services)):
            view = services[(self.turn + step) % len(services)]
            if not view.ready:
                continue
            late, batch = self._early_drop(view) if self.drop_late is None else (0, view.queued(self.batch[view.name]))
            if late:
                decisions.append(Drop(view.name, late))
            self.taken[view.name] += late + batch
            if batch:
                self.turn = (view.index + 1) % len(services)
                return [*decisions, Launch(view.name, self.share, batch)]
        return [*decisions, Wake(state.now_ms)] if decisions else []

    def _early_drop(self, view: ServiceView) -> tuple[int, int]:
        """Requests to drop and batch to launch: the largest batch, up to the target, that is left and in time."""
        waiting = view.waiting
        for batch in range(min(self.batch[view.name], waiting), 0, -1):
            late = view.late(view.service_ms(batch, self.share))
            if waiting - late >= batch:
                return late, batch
        return waiting, 0

    def _new_epoch(self, state: GpuState) -> None:
        """Plan anew if rates have changed."""
        seconds = (state.now_ms - self.epoch_end_ms + self.epoch_ms) / 1000
        came = {view.name: self.taken[view.name] + view.waiting for view in state.services}
        rates = {name: (came[name] - self.counted[name]) / seconds for name in came}
        self.counted, self.epoch_end_ms = came, state.now_ms + self.epoch_ms
        if any(not LOWER * self.rates[name] <= rate <= UPPER * self.rates[name] for name, rate in rates.items()):
            self._pack(list(rates.values()))

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Only the whole GPU."""
        return {a.service: (plan.shares[-1],) for a in plan.allocations}
