"""How far any schedule can be loaded, given when requests really come: a bound per request.

The batch-level `bound` lets a service fill the cheapest batch however rarely its requests come. A batch whose
requests are all in time cannot wait that long: they came within SLO - L of each other. Whoever came into a quiet
moment can only share a launch with few, and costs more GPU time, whatever the scheduler knows of the future.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dstack_lab.bounds import checked_services, granted_shares, service_tables
from dstack_lab.checks import positive, require
from dstack_lab.profiles import Profile
from dstack_lab.services import Service, ServiceTable
from dstack_lab.simulator import draw_arrivals
from dstack_lab.workloads import load_of, scaled

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A load that no schedule can pass.

    Parameters
    ----------
    load : float
        Part of the batch-level bound beyond which the requests need more than the whole GPU.
    needed : dict of float to float
        Load that was tried -> part of the GPU's time and space that its requests need at least.
    attainment : float
        Part of each service's requests that is to be in time.
    """

    load: float
    needed: dict[float, float]
    attainment: float

    def __str__(self) -> str:
        return f"no schedule keeps {self.attainment:.4g} of every service's requests within SLO beyond load {self.load:.3f}"


def least_area(times_ms: Array, slo_ms: float, table: ServiceTable, shares: Sequence[float]) -> Array:
    """Least GPU%·ms that each request costs any schedule that serves it in time.

    Parameters
    ----------
    times_ms : ndarray of shape (n,)
        Arrivals, ascending [ms].
    slo_ms : float
    table : ServiceTable
    shares : sequence of float
        GPU% that can be granted.

    Returns
    -------
    ndarray of shape (n,)
        Infinite where even alone, on the largest share, the request is late.

    Notes
    -----
    Of a launch at (b, g) let m <= b requests be in time. They came within w = SLO - L(b, g): all had come when
    it started, and none was older than w then. Charge its g·L(b, g) >= g·L(m, g) to those m alone. So a request
    costs at least the minimum of g·L(m, g)/m over all m and g for which m arrivals, itself among them, lie
    within SLO - L(m, g). It needs only that a larger batch never takes less time.
    """
    n = len(times_ms)
    least = np.full(n, np.inf)
    for batch in range(1, min(table.batch_max, n) + 1):
        span = np.full(n + batch - 1, np.inf)  # of the `batch` arrivals that end with each one
        span[batch - 1 : n] = times_ms[batch - 1 :] - times_ms[: n - batch + 1]
        tightest = sliding_window_view(span, batch).min(axis=1)  # of those that hold each request
        ms = np.array([table.at(batch, share) for share in shares])
        order = np.argsort(ms)
        area = np.minimum.accumulate((ms * np.asarray(shares))[order])
        last = np.searchsorted(ms[order], slo_ms - tightest, side="right") - 1
        least = np.minimum(least, np.where(last >= 0, area[np.maximum(last, 0)] / batch, np.inf))
    return least


def ceiling(
    services: Iterable[Service],
    profile: Profile,
    attainment: float = 0.99,
    *,
    seeds: Iterable[int] = (0, 1, 2),
    duration_ms: float = 10_000.0,
    shares: Iterable[float] | None = None,
    tolerance: float = 0.005,
) -> Ceiling:
    """Find the load that no schedule can pass, on the requests of the same seeds that `max_load` draws.

    Parameters
    ----------
    services : iterable of Service
        Their rates are the mix; all are scaled together.
    profile : Profile
        A larger batch must never take less time.
    attainment : float
        Part of each service's requests that is to be in time, above 0 and at most 1.
    seeds, duration_ms, shares, tolerance
        As for `max_load`.

    Returns
    -------
    Ceiling
        Its load is rounded up to the tolerance, so that it stays a bound.

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    InfeasiblePlan
        If a service meets its SLO at no batch and share.

    Notes
    -----
    In time needs at least `least_area` each; the cheapest part `attainment` of every service's requests is what a
    schedule may choose to serve. All of it has to fit into 100 GPU% from the first arrival to the last deadline.
    """
    found = checked_services(services, profile)
    require(0 < attainment <= 1, "attainment", attainment, "above 0, at most 1")
    granted = granted_shares(profile, found, None if shares is None else tuple(shares), None)
    tables, runs = service_tables(found, profile), tuple(seeds)
    positive("duration_ms", duration_ms)
    positive("tolerance", tolerance)
    unit = load_of(found, profile, granted)

    def needs(load: float) -> float:
        asked, used = scaled(found, load / unit), 0.0
        drawn = [draw_arrivals(asked, duration_ms, seed) for seed in runs]
        for k, (service, table) in enumerate(zip(asked, tables, strict=True)):
            costs = [least_area(times[k], service.slo_ms, table, granted) for times in drawn]
            cost = np.sort(np.concatenate(costs))  # the seeds' requests count together
            used += float(cost[: int(np.ceil(attainment * len(cost) - 1e-9))].sum())
        return used / (len(runs) * 100 * (duration_ms + max(s.slo_ms for s in asked)))

    seen = {1.0: needs(1.0)}
    low, high = 0.0, 1.0
    while seen[high] <= 1:  # short runs end with a drain, so that even a load of 1 may fit
        low, high = high, high + 0.25
        seen[high] = needs(high)
    while high - low > tolerance:
        middle = (low + high) / 2
        seen[middle] = needs(middle)
        low, high = (middle, high) if seen[middle] <= 1 else (low, middle)
    return Ceiling(high, dict(sorted(seen.items())), attainment)
