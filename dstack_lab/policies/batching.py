"""Batch rules that several systems share, and what a policy can learn by watching."""

from __future__ import annotations

from collections.abc import Mapping

from dstack_lab.policies.base import Decision, Drop, GpuState, ServiceView, Wake
from dstack_lab.services import ServiceTable

#: GSLICE keeps a batch whose time is within this part of its limit, and never forms a larger one than this.
KEEP, LARGEST = 0.1, 64


def saturated_batch(table: ServiceTable, slo_ms: float, gpu_pct: float, padding: float = 1.0) -> int:
    """Largest b with ``2 · L(b, gpu_pct) · padding <= SLO``, at least 1.

    A request that just misses a launch is then in time with the next.
    """
    fits = [b for b in range(1, table.batch_max + 1) if 2 * padding * table.at(b, gpu_pct) <= slo_ms]
    return max(fits, default=1)


def adapted_batch(learnt: int, batch: int, took_ms: float, limit_ms: float) -> int:
    """Batch to use after one of `batch` requests took `took_ms`: GSLICE's rule.

    Within 10 % of the limit the size that was seen stays. Below, the batch grows by as many requests as the
    headroom holds at the present time per request, by at least one, to 64 at most; one that was not full
    teaches nothing. Above, what was learnt shrinks by the excess likewise, by at least one.
    """
    per_item = took_ms / batch
    if took_ms <= limit_ms and batch < learnt:
        return learnt
    if abs(took_ms - limit_ms) <= KEEP * limit_ms:
        return batch
    if took_ms > limit_ms:
        return max(1, learnt - max(1, int((took_ms - limit_ms) / per_item)))
    return max(batch, min(LARGEST, batch + max(1, int((limit_ms - took_ms) / per_item))))


def drop_lost(state: GpuState, gpu_pct: Mapping[str, float] | float) -> list[Decision]:
    """Give up requests that could not be in time even if launched alone now, and ask for another turn.

    The one rule under which all systems can be compared; empty if nothing is lost.
    """
    drops: list[Decision] = []
    for view in state.services:
        share = gpu_pct if isinstance(gpu_pct, int | float) else gpu_pct[view.name]
        if view.oldest_deadline_ms < state.now_ms + view.service_ms(1, share) and (n := view.late(view.service_ms(1, share))):
            drops.append(Drop(view.name, n))
    return [*drops, Wake(state.now_ms)] if drops else []


class Stopwatch:
    """How long batches take, of services that run one batch at a time: a policy is asked whenever one ends."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[float, int]] = {}

    def start(self, state: GpuState, service: str, batch: int) -> None:
        """Remember a launch that is made now."""
        self._running[service] = (state.now_ms, batch)

    def finished(self, state: GpuState) -> list[tuple[ServiceView, int, float]]:
        """(service, batch, time it took [ms]) of the batches that have ended since the last call."""
        ended = [name for name in self._running if not state[name].in_flight]
        rows = []
        for name in ended:
            since, batch = self._running.pop(name)
            if state.now_ms > since:
                rows.append((state[name], batch, state.now_ms - since))
        return rows
