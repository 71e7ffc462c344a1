"""Squishy bin packing: which services share a GPU in turns, and with which batches (Nexus)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dstack_lab.policies.batching import saturated_batch
from dstack_lab.services import Service, ServiceTable


@dataclass(frozen=True, slots=True)
class Turn:
    """One service's part of a duty cycle: `batch` requests in `service_ms` once a cycle, `rate_rps` of them a second."""

    service: str
    slo_ms: float
    rate_rps: float
    batch: int
    service_ms: float
    table: ServiceTable


@dataclass(frozen=True, slots=True)
class Node:
    """A GPU whose services take turns once in `duty_ms`."""

    duty_ms: float
    turns: tuple[Turn, ...]

    @property
    def occupancy(self) -> float:
        """Part of the cycle that batches run."""
        return sum(turn.service_ms for turn in self.turns) / self.duty_ms

    @property
    def batches(self) -> dict[str, int]:
        """Batch by service."""
        return {turn.service: turn.batch for turn in self.turns}


def pack(
    services: Sequence[Service],
    tables: Sequence[ServiceTable],
    rates_rps: Sequence[float],
    gpu_pct: float = 100.0,
    padding: float = 1.0,
) -> list[Node]:
    """Pack services onto GPUs; after Nexus (Shen et al., SOSP 2019).

    1. As many whole GPUs to a service as its rate fills with saturated batches (the largest b with
       ``2·L(b) <= SLO``).
    2. Its residual rate r gets the largest b with ``L(b) + b/r <= SLO`` and a duty cycle of b/r: the
       time in which such a batch gathers.
    3. Residuals are merged, the fullest first, each into the GPU that is fullest then: the cycle is the
       shorter of the two, batches shrink to what gathers in it. A merge must leave every batch within
       the cycle, and cycle + batch within each SLO.

    Parameters
    ----------
    services, tables, rates_rps : sequences
        In the same order.
    gpu_pct : float
        Share that batches run at.
    padding : float
        Service times are taken to be this many times longer.
    """
    whole: list[Node] = []
    residual: list[Node] = []
    for service, table, rate in zip(services, tables, rates_rps, strict=True):
        batch = saturated_batch(table, service.slo_ms, gpu_pct, padding)
        ms = padding * table.at(batch, gpu_pct)
        gpus = int(rate * ms / 1000 / batch + 1e-9)
        whole += [Node(ms, (Turn(service.name, service.slo_ms, 1000 * batch / ms, batch, ms, table),))] * gpus
        rest = rate - gpus * 1000 * batch / ms
        if rest > 1e-9:
            residual.append(_alone(service, table, rest, batch, gpu_pct, padding))
    packed: list[Node] = []
    for node in sorted(residual, key=lambda n: -n.occupancy):
        merged = [(m, at) for at, other in enumerate(packed) if (m := _merge(other, node, gpu_pct, padding)) is not None]
        if merged:
            best, at = max(merged, key=lambda pair: pair[0].occupancy)
            packed[at] = best
        else:
            packed.append(node)
    return whole + packed


def _alone(service: Service, table: ServiceTable, rate: float, most: int, gpu_pct: float, padding: float) -> Node:
    """Node of a residual rate by itself."""
    times = {b: padding * table.at(b, gpu_pct) for b in range(1, most + 1)}
    batch = max((b for b, ms in times.items() if ms + 1000 * b / rate <= service.slo_ms), default=1)
    duty = 1000 * batch / rate
    if times[batch] + duty > service.slo_ms:  # too rare to wait for: a request is served within its SLO, alone
        duty = max(service.slo_ms - times[batch], times[batch])
    return Node(duty, (Turn(service.name, service.slo_ms, rate, batch, times[batch], table),))


def _merge(one: Node, other: Node, gpu_pct: float, padding: float) -> Node | None:
    """Both nodes on one GPU, or None if that breaks a cycle or an SLO."""
    duty = min(one.duty_ms, other.duty_ms)
    turns = []
    for turn in one.turns + other.turns:
        batch = max(1, math.ceil(turn.rate_rps * duty / 1000 - 1e-9))
        if batch > turn.batch:
            return None
        ms = padding * turn.table.at(batch, gpu_pct)
        if duty + ms > turn.slo_ms + 1e-9:
            return None
        turns.append(Turn(turn.service, turn.slo_ms, turn.rate_rps, batch, ms, turn.table))
    node = Node(duty, tuple(turns))
    return node if node.occupancy <= 1 + 1e-9 else None
