"""gpulet: the GPU cut into at most two parts, each shared in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dstack_lab.policies.base import Decision, GpuState, Launch, Policy
from dstack_lab.policies.batching import drop_lost, saturated_batch
from dstack_lab.services import Plan, Service, ServiceTable
from dstack_lab.state import INFINITE

PARTITIONS = (20.0, 40.0, 50.0, 60.0, 80.0, 100.0)
#: A step to a larger partition must serve at least this many times as much; rates are planned this much larger.
WORTH, SAFETY = 1.05, 1.1


class Part(NamedTuple):
    """One of at most two partitions."""

    number: int
    gpu_pct: float


def throughput_rps(table: ServiceTable, slo_ms: float, gpu_pct: float) -> float:
    """Requests per second of saturated batches (the largest b with 2·L <= SLO); 0 if not even one request fits."""
    if 2 * table.at(1, gpu_pct) > slo_ms:
        return 0.0
    batch = saturated_batch(table, slo_ms, gpu_pct)
    return 1000 * batch / table.at(batch, gpu_pct)


def ideal_partition(table: ServiceTable, slo_ms: float, rate_rps: float) -> float:
    """Smaller of the partition that the rate requires and the most efficient one.

    The most efficient is where the step from the partition below gains most, if that is 5 % or more;
    the required one the smallest that serves the rate.
    """
    served = [throughput_rps(table, slo_ms, p) for p in PARTITIONS]
    required = next((p for p, x in zip(PARTITIONS, served, strict=True) if x >= rate_rps), 100.0)
    first = next((at for at, x in enumerate(served) if x > 0), len(PARTITIONS) - 1)
    efficient, best = PARTITIONS[first], WORTH
    for at in range(first + 1, len(PARTITIONS)):
        if served[at - 1] and (gain := served[at] / served[at - 1]) >= best:
            efficient, best = PARTITIONS[at], gain
    return min(required, efficient)


def split(services: Sequence[Service], tables: Sequence[ServiceTable], rates_rps: Sequence[float]) -> dict[str, Part]:
    """Partition of each service, by name.

    The service with the largest ideal partition cuts the GPU there; the rest, by falling ideal, go to the
    part where they leave least idle (best fit), or, if they fit nowhere, where least is in use. If some
    do not fit, larger cuts are tried; the cut whose fuller part is least full is kept.
    """
    rates = [SAFETY * rate for rate in rates_rps]
    ideals = [ideal_partition(t, s.slo_ms, r) for s, t, r in zip(services, tables, rates, strict=True)]
    order = sorted(range(len(services)), key=lambda i: (-ideals[i], -rates[i]))
    best: tuple[float, dict[str, Part]] | None = None
    for cut in [p for p in PARTITIONS if p >= ideals[order[0]]]:
        parts = [cut] if cut == 100 else [cut, 100 - cut]
        used = [0.0] * len(parts)
        place: dict[str, Part] = {}
        for i in order:
            serves = [throughput_rps(tables[i], services[i].slo_ms, p) for p in parts]
            needs = [rates[i] / x if x else INFINITE for x in serves]
            fits = [at for at in range(len(parts)) if used[at] + needs[at] <= 1 + 1e-9]
            after = [u + n for u, n in zip(used, needs, strict=True)]
            at = max(fits, key=lambda a: after[a]) if fits else min(range(len(parts)), key=lambda a: after[a])
            used[at] = after[at]
            place[services[i].name] = Part(at, parts[at])
        if best is None or max(used) < best[0] - 1e-9:
            best = (max(used), place)
        if best[0] <= 1 + 1e-9:
            break
    assert best is not None
    return best[1]


class Gpulet(Policy):
    """At most two partitions; the services of each take turns in it, the earliest deadline first.

    *Rule*, after Choi et al. (USENIX ATC 2022): partitions of 20, 40, 50, 60, 80 or 100 %, two of which
    share a GPU. `split` decides who goes where, for rates 1.1 times the planned ones. A batch is the
    largest b with ``2·L(b, partition) <= SLO``, or what waits. It does not drop. The system's correction
    for interference between the two partitions is left out: it needs counters that a profile lacks.

    *Needs to know* service times by share, SLOs and rates. *Wins* when two networks complement each
    other, or one wants most of the GPU and the rest little. *Breaks* with many networks of small knees:
    two parts cannot hold them side by side; and when rates leave those it was split for.

    Parameters
    ----------
    drop_late : bool
        Drop requests that can no longer meet their deadline.
    """

    def __init__(self, drop_late: bool = False) -> None:
        self.drop_late = drop_late

    def reset(self, plan: Plan) -> None:
        """Cut the GPU and choose batches."""
        self.part = self._cut(plan)
        self.share = {name: part.gpu_pct for name, part in self.part.items()}
        services = zip(plan.services, plan.tables, strict=True)
        self.batch = {s.name: saturated_batch(t, s.slo_ms, self.share[s.name]) for s, t in services}

    def decide(self, state: GpuState) -> list[Decision]:
        """In each idle partition launch the nearest deadline."""
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        busy = {self.part[view.name] for view in state.services if view.in_flight}
        launches: list[Decision] = []
        for view in sorted(state.services, key=lambda s: s.due_ms):
            if view.ready and self.part[view.name] not in busy:
                busy.add(self.part[view.name])
                launches.append(Launch(view.name, self.share[view.name], view.queued(self.batch[view.name])))
        return launches

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """The partition of each service."""
        return {name: (part.gpu_pct,) for name, part in self._cut(plan).items()}

    def _cut(self, plan: Plan) -> dict[str, Part]:
        """Partition of each service, no larger than a share of the plan: a device may not grant 50 %, but 48.48 %."""
        parts = split(plan.services, plan.tables, [a.rate_rps for a in plan.allocations])
        least = min(plan.shares)
        if 2 * least > 100:  # nothing is granted side by side: all take turns
            return {name: Part(0, max(plan.shares)) for name in parts}
        return {
            name: part._replace(gpu_pct=max((s for s in plan.shares if s <= part.gpu_pct + 1e-9), default=least))
            for name, part in parts.items()
        }
