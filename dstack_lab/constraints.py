"""What an operating point is worth, what it must keep, and which constraint keeps a service from a better one.

A point is a batch b and a GPU% g with service time L(b, g). It is feasible for a service of SLO s and
rate r if a request that just misses a launch is still served in time: it waits for its batch to fill,
(b-1)/r, or for the previous launch, L, and then for its own, so max((b-1)/r, L) + L <= s; and if one
launch at a time keeps up, r·L <= b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import require
from dstack_lab.services import ServiceTable

Array = NDArray[np.float64]
OBJECTIVES = ("efficacy", "capacity")

#: Constraints of one service, in the order of `_asks`; what else can bind are the edges of the search and the whole GPU.
CONSTRAINTS = ("SLO: wait", "SLO: fill", "rate")
EDGES = ("largest batch", "smallest share", "largest share")
BINDINGS = (*CONSTRAINTS, *EDGES, "GPU total", "none")

#: Scores closer than this are equal, so that rounding binds nothing.
EQUAL = 1e-9

Number = TypeVar("Number", float, Array)


def points(table: ServiceTable, shares: Sequence[float]) -> tuple[Array, Array, Array]:
    """Service times [ms] by batch and share, as `ServiceTable.at` gives them, with their axes shaped to broadcast."""
    share = np.asarray(shares, dtype=float)
    low = share.astype(np.intp)
    left, right = table.ms[:, low - 1], table.ms[:, np.minimum(low, 99)]
    return left + (share - low) * (right - left), np.arange(1.0, table.batch_max + 1)[:, None], share[None, :]


def scores(table: ServiceTable, shares: Sequence[float], objective: str) -> Array:
    """Objective of every point, shape (batch_max, shares): larger is better.

    ``efficacy`` is b / (L² g): throughput per latency and GPU%. ``capacity`` is b / (g L): requests
    per GPU%·ms, so the largest is the smallest area.
    """
    return score_of(*points(table, shares), objective)


def feasible(table: ServiceTable, shares: Sequence[float], slo_ms: float, rate_rps: float) -> NDArray[np.bool_]:
    """Points that keep the SLO and the rate, shape (batch_max, shares)."""
    ms, batch, _ = points(table, shares)
    return fits(ms, batch, slo_ms, rate_rps)


def binding(
    table: ServiceTable, shares: Sequence[float], slo_ms: float, rate_rps: float, batch: int, gpu_pct: float, objective: str
) -> str:
    """Say what keeps a service from a better-scoring point than the one it has.

    Parameters
    ----------
    table : ServiceTable
        Of the service's model.
    shares : sequence of float
        GPU% that can be granted, ascending.
    slo_ms, rate_rps : float
        What the service asks for.
    batch, gpu_pct : int, float
        The point.
    objective : {"efficacy", "capacity"}
        What makes a point better.

    Returns
    -------
    str
        ``GPU total`` if the service alone could have a better point: all together need <= 100 %.
        ``none`` if no point is better: the objective's own optimum. Otherwise what forbids the
        nearest better point (in steps of batch and share; of equally near ones the best):
        ``SLO: wait``, the SLO with the previous launch's wait, 2L <= s; ``SLO: fill``, the SLO
        with the batch's own filling, (b-1)/r + L <= s; ``rate``, r·L <= b; or, if it breaks none of
        these, the edge it lies beyond: ``largest batch`` of the profile, ``smallest share`` or
        ``largest share`` that can be granted. If it breaks several, the one it breaks most.

    Notes
    -----
    One step beyond an edge is 1 GPU%, or one request with the service time continued: in a straight
    line from the last two batches, and beyond 1 and 100 GPU% in a straight line of logarithms.
    """
    wide, pcts = _widened(table, shares)
    batches = np.arange(1.0, len(wide) + 1)[:, None]
    value = score_of(wide, batches, pcts, objective)
    better = value > (1 + EQUAL) * score_of(table.at(batch, gpu_pct), batch, gpu_pct, objective)
    if not better.any():
        return "none"
    broken = ~fits(wide, batches, slo_ms, rate_rps)
    if (better & ~broken)[:-1, 1:-1].any():
        return "GPU total"
    i, j = np.nonzero(better)
    steps = np.abs(i + 1 - batch) + np.abs(j - 1 - shares.index(gpu_pct))
    nearest = np.lexsort((-value[i, j], steps))[0]
    b, k = int(i[nearest]), int(j[nearest])
    if broken[b, k]:
        return broken_most(float(wide[b, k]), b + 1, slo_ms, rate_rps)
    return EDGES[0] if b == table.batch_max else EDGES[1] if k == 0 else EDGES[2]


def score_of(ms: Number, batch: Number, share: Number, objective: str) -> Number:
    """Objective of points whose service times [ms] are known; see `scores`."""
    require(objective in OBJECTIVES, "objective", objective, f"one of {OBJECTIVES}")
    area = ms * share
    return batch / (area * ms if objective == "efficacy" else area)


def _asks(ms: Number, batch: Number, slo_ms: float, rate_rps: float) -> tuple[tuple[Number, Number | float], ...]:
    """Need and limit of each of `CONSTRAINTS`."""
    gap_ms = 1000 / max(rate_rps, 1e-300)  # finite: the first request of a batch waits for no other, at any rate
    return (ms + ms, slo_ms), ((batch - 1) * gap_ms + ms, slo_ms), (rate_rps * ms, 1000 * batch)


def fits(ms: Array, batch: Array, slo_ms: float, rate_rps: float) -> NDArray[np.bool_]:
    """Whether points whose service times [ms] are known keep the SLO and the rate."""
    wait, fill, rate = (need <= limit for need, limit in _asks(ms, batch, slo_ms, rate_rps))
    return np.asarray(wait & fill & rate)


def verdicts(ms: Array, batch: Array, slo_ms: float, rate_rps: float) -> NDArray[np.int64]:
    """Place in `CONSTRAINTS` of what each point breaks most, the first of equals, -1 where it breaks nothing; shape of `ms`."""
    asks = np.stack([np.broadcast_to(need / limit, ms.shape) for need, limit in _asks(ms, batch, slo_ms, rate_rps)])
    most = (asks >= (1 - EQUAL) * asks.max(axis=0)).argmax(axis=0)
    return np.where(fits(ms, batch, slo_ms, rate_rps), -1, most)


def broken_most(ms: float, batch: int, slo_ms: float, rate_rps: float) -> str:
    """Return the constraint that a point breaks most, the first of equals, or "none"."""
    asks = _asks(ms, float(batch), slo_ms, rate_rps)
    if all(need <= limit for need, limit in asks):
        return "none"
    parts = [need / limit for need, limit in asks]
    return next(name for name, part in zip(CONSTRAINTS, parts, strict=True) if part >= (1 - EQUAL) * max(parts))


def _widened(table: ServiceTable, shares: Sequence[float]) -> tuple[Array, Array]:
    """Service times with one batch more and one share more at either end, shape (batch_max + 1, shares + 2), and the shares."""
    low, high, full = shares[0], shares[-1], table.ms
    inner, _, _ = points(table, [max(1.0, low - 1), *shares, min(100.0, high + 1)])
    if low <= 1:
        inner[:, 0] = full[:, 0] ** 2 / full[:, 1]
    if high >= 100:
        inner[:, -1] = full[:, -1] ** 2 / full[:, -2]
    more = np.maximum(inner[-1] - inner[-2], 0) if len(inner) > 1 else 0.0
    ends = max(1.0, low - 1) if low > 1 else 0.5, min(100.0, high + 1) if high < 100 else 100 * 100 / 99
    return np.vstack([inner, inner[-1] + more]), np.array([ends[0], *shares, ends[1]])
