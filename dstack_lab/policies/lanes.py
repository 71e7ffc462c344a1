"""Lanes: how wide a share each service needs if all run side by side all the time, by the queue that forms in each.

In a lane a service launches whatever waits as soon as its last batch has ended. The batch is then the
requests that came during the last one, which makes a Markov chain: b' ~ Poisson(r·L(b, g)) plus what did
not fit. Its stationary distribution says which part of the requests is late, and so which lane to widen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from dstack_lab.services import Allocation, Plan, Service, ServiceTable

#: Lanes are good enough if at most this part of any service's requests would be late.
LATE = 0.05
#: The same where requests that are lost can be dropped: that saves most of the others, which the chain does not know.
LATE_IF_DROPPED = 0.2
#: What breaks ties between lanes that hardly make anyone late: the part of the SLO that two batches take.
TIE = 1e-6
#: Queues are followed up to this many times the largest batch.
DEPTH = 1.5


def late_part(table: ServiceTable, gpu_pct: float, slo_ms: float, rate_rps: float) -> float:
    """Part of a service's requests that are late in a lane of its own, if arrivals are Poisson and none is dropped.

    Parameters
    ----------
    table : ServiceTable
    gpu_pct : float
        Share of the lane.
    slo_ms, rate_rps : float

    Returns
    -------
    float
        0 to 1. Exact but for two things: who joins a queue of `DEPTH` times the largest batch counts as late,
        and so does all but one batchful of a queue longer than a batch.
    """
    return _late_part(tuple(table.at(b, gpu_pct) for b in range(1, table.batch_max + 1)), slo_ms, rate_rps)


@lru_cache(maxsize=4096)
def _late_part(times_ms: tuple[float, ...], slo_ms: float, rate_rps: float) -> float:
    ms = np.array(times_ms)
    most = max(1, int(np.searchsorted(np.maximum.accumulate(ms), slo_ms, side="right")))  # a longer batch is late anyway
    if ms[0] > slo_ms:
        return 1.0
    if rate_rps == 0:
        return 0.0
    deepest = int(np.ceil(DEPTH * most)) + 1
    queue = np.arange(deepest + 1)  # requests that wait when a batch ends; with none, the next is launched as it comes
    batch = np.clip(queue, 1, most)
    took = ms[batch - 1]
    left = np.maximum(queue - most, 0)
    arrived = queue[None, :] - left[:, None]
    chance = _poisson(arrived, (rate_rps * took / 1000)[:, None])
    chance[:, -1] += 1 - chance.sum(axis=1)
    stationary = _stationary(chance)
    # who comes during a batch waits for its end, at a uniform part of it, and then for its own batch
    slack = np.clip((slo_ms - took[None, :]) / took[:, None], 0, 1)
    in_batch = np.minimum(1.0, most / np.maximum(queue, 1))
    in_batch[-1] = 0.0  # as deep as it is followed: the queue grows
    came = stationary[:, None] * chance * np.maximum(arrived, 0)
    alone = stationary[0]  # served at once
    in_time = (came * slack * in_batch[None, :]).sum() + alone
    return max(0.0, float(1 - in_time / (came.sum() + alone)))  # rounding may end a hair below


def _poisson(k: NDArray[np.int64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of `k` arrivals; 0 for negative `k`."""
    at = np.maximum(k, 0)
    return np.where(k < 0, 0.0, np.exp(at * np.log(mean) - mean - gammaln(at + 1)))


def _stationary(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stationary distribution of a Markov chain whose rows sum to 1."""
    n = len(chance)
    equations = chance.T - np.eye(n)
    equations[-1] = 1.0
    return np.clip(np.linalg.solve(equations, np.eye(n)[-1]), 0, None)


def lanes(
    plan: Plan, part: float | Sequence[float] = 1.0, least: Sequence[int] | None = None
) -> tuple[tuple[Allocation, ...], float]:
    """Shares that add up to 100 % at most and make the service that suffers most suffer least.

    Parameters
    ----------
    plan : Plan
    part : float or sequence of float
        Part of the rates to size the lanes for, of all or of each service.
    least : sequence of int, optional
        Position in the plan's shares that each lane is at least as wide as; 0 by default.

    Returns
    -------
    points : tuple of Allocation
        A lane for each service: its share, and the smallest batch that keeps up with its whole rate.
    late : float
        Largest part of a service's requests that are late.
    """
    shares, count = plan.shares, len(plan.services)
    parts = [part] * count if isinstance(part, int | float) else part
    rates = [x * a.rate_rps for x, a in zip(parts, plan.allocations, strict=True)]

    def suffers(k: int, i: int) -> float:
        service, table = plan.services[k], plan.tables[k]
        again = 2 * _point(service, table, shares[i], rates[k]).service_ms / service.slo_ms
        return late_part(table, shares[i], service.slo_ms, rates[k]) + TIE * again

    chosen = [0] * count if least is None else list(least)
    if sum(shares[i] for i in chosen) > 100 + TIE:
        return (), 1.0
    pain = [suffers(k, i) for k, i in enumerate(chosen)]
    left = 100.0 - sum(shares[i] for i in chosen)
    while True:
        can = [
            (-pain[k], shares[i], k)
            for k, i in enumerate(chosen)
            if i + 1 < len(shares) and shares[i + 1] - shares[i] <= left + TIE
        ]
        if not can:
            break
        k = min(can)[2]
        left -= shares[chosen[k] + 1] - shares[chosen[k]]
        chosen[k] += 1
        pain[k] = suffers(k, chosen[k])
    points = tuple(
        _point(s, t, shares[i], a.rate_rps)
        for s, t, i, a in zip(plan.services, plan.tables, chosen, plan.allocations, strict=True)
    )
    return points, max(pain)


def _point(service: Service, table: ServiceTable, gpu_pct: float, rate_rps: float) -> Allocation:
    """Smallest batch that keeps up with the rate and leaves time for the one before it; else the largest that leaves time."""
    batch = 1
    for b in range(1, table.batch_max + 1):
        ms = table.at(b, gpu_pct)
        if 2 * ms > service.slo_ms:
            break
        batch = b
        if 1000 * b >= rate_rps * ms:
            break
    return Allocation(service.name, gpu_pct, batch, table.at(batch, gpu_pct), rate_rps)
