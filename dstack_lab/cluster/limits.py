"""What no schedule on a cluster can pass, by linear programming over services and kinds of GPU.

With x_mq the goodput of service m on all GPUs of kind q, a_mq the least GPU%·ms of a request there (over
the points with L <= SLO) and n_q the number of those GPUs: sum over m of x_mq·a_mq <= n_q·100·1000 per
second for each kind, and sum over q of x_mq <= r_m. Equal GPUs need no variables of their own: what is
feasible for them together, split evenly, is feasible for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linprog

from dstack_lab.bounds import granted_shares, service_tables
from dstack_lab.checks import require
from dstack_lab.cluster.gpus import Cluster
from dstack_lab.constraints import points
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Service

Array = NDArray[np.float64]

#: GPU%·ms that one GPU has in a second.
PER_SECOND = 100_000.0


@dataclass(frozen=True, slots=True)
class ClusterBound:
    """What no schedule on a cluster can exceed.

    Parameters
    ----------
    rates_rps : dict of str to float
        Goodput of each service in the best mix [requests/s].
    area_pct_ms : dict of str to tuple of float
        Least GPU%·ms per request of each service, one number per GPU; infinite where it cannot be served.
    load : float
        Part of the cluster that the rates need at least; above 1 no schedule serves them all.
    """

    rates_rps: dict[str, float]
    area_pct_ms: dict[str, tuple[float, ...]]
    load: float

    @property
    def total_rps(self) -> float:
        """Goodput of all services together [requests/s]."""
        return sum(self.rates_rps.values())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per service, and one for all; ``area_pct_ms`` is that on the GPU where it is least."""
        rows = [{"service": n, "bound_rps": x, "area_pct_ms": min(self.area_pct_ms[n])} for n, x in self.rates_rps.items()]
        return pd.DataFrame([*rows, {"service": "all", "bound_rps": self.total_rps, "area_pct_ms": np.nan}])


def cluster_bound(services: Iterable[Service], cluster: Cluster) -> ClusterBound:
    """Return the provable upper bound on the goodput of a cluster, by linear programming.

    It holds for every schedule, on any placement and with any dispatch of single requests, whose launches
    keep one of the profile's shares from start to end on one GPU, if the service times are right. On one GPU
    it is the batch-level `bound`.

    Parameters
    ----------
    services : iterable of Service
        A service need not be known to every GPU's profile.
    cluster : Cluster

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    InfeasiblePlan
        If a service meets its SLO on no GPU.
    """
    found = checked_on(services, cluster)
    kinds, which = cluster.kinds()
    areas = least_areas(found, kinds)
    hopeless = [s for s, row in zip(found, areas, strict=True) if not np.isfinite(row).any()]
    if hopeless:
        asks = ", ".join(f"{s.name} within slo_ms = {s.slo_ms:g}" for s in hopeless)
        raise InfeasiblePlan(f"no GPU of the cluster serves {asks} at any batch and share; relax the SLO")
    rates, number = [s.rate_rps for s in found], np.bincount(which)
    pairs = np.argwhere(np.isfinite(areas))
    per_kind, per_service = _rows(areas, pairs)
    most = linprog(
        -np.ones(len(pairs)),
        A_ub=np.vstack([per_kind, per_service]),
        b_ub=np.concatenate([number * PER_SECOND, rates]),
        method="highs",
    )
    served = per_service @ np.asarray(most.x)
    load, _ = even_split(areas, rates, number)
    per_gpu = {s.name: tuple(float(row[q]) for q in which) for s, row in zip(found, areas, strict=True)}
    return ClusterBound({s.name: float(x) for s, x in zip(found, served, strict=True)}, per_gpu, load)


def least_areas(services: Sequence[Service], kinds: Sequence[Profile]) -> Array:
    """Least GPU%·ms per request, shape (services, kinds); infinite where a service cannot be served."""
    areas = np.full((len(services), len(kinds)), np.inf)
    for q, profile in enumerate(kinds):
        for m, service in enumerate(services):
            if service.model in profile.models:
                table = service_tables([service], profile)[0]
                ms, batch, share = points(table, granted_shares(profile, services, None, None))
                good = ms <= service.slo_ms
                areas[m, q] = float((share * ms / batch)[good].min()) if good.any() else np.inf
    return areas


def even_split(areas: Array, rates_rps: Sequence[float], number: NDArray[np.int64]) -> tuple[float, Array]:
    """Serve all rates with the kinds of GPU as evenly loaded as can be.

    Returns
    -------
    float
        The load of the busiest kind, as a part of it: the least that any split has.
    numpy.ndarray, shape (services, kinds)
        Part of each service's rate by kind; rows sum to 1. A corner of the feasible set, so that few services are split.
    """
    pairs = np.argwhere(np.isfinite(areas))
    per_kind, per_service = _rows(areas * np.asarray(rates_rps)[:, None], pairs)
    capacity = -(number * PER_SECOND)[:, None]
    solved = linprog(
        np.append(np.zeros(len(pairs)), 1.0),
        A_ub=np.hstack([per_kind, capacity]),
        b_ub=np.zeros(len(number)),
        A_eq=np.hstack([per_service, np.zeros((len(areas), 1))]),
        b_eq=np.ones(len(areas)),
        method="highs",
    )
    parts = np.zeros_like(areas)
    parts[pairs[:, 0], pairs[:, 1]] = np.asarray(solved.x)[:-1]
    return float(np.asarray(solved.x)[-1]), parts


def _rows(cost: Array, pairs: NDArray[np.int64]) -> tuple[Array, Array]:
    """Coefficients of the (service, kind) variables: the cost on each kind, and the sum of each service."""
    per_kind, per_service = np.zeros((cost.shape[1], len(pairs))), np.zeros((cost.shape[0], len(pairs)))
    each = np.arange(len(pairs))
    per_kind[pairs[:, 1], each] = cost[pairs[:, 0], pairs[:, 1]]
    per_service[pairs[:, 0], each] = 1.0
    return per_kind, per_service


def checked_on(services: Iterable[Service], cluster: Cluster) -> tuple[Service, ...]:
    """Return the services, each of a model that some GPU's profile holds, with distinct names."""
    require(isinstance(cluster, Cluster), "cluster", cluster, "a Cluster such as Cluster(gpus=4)")
    require(isinstance(services, Iterable), "services", services, "an iterable of Service objects")
    found = tuple(services)
    require(len(found) > 0, "services", found, "1 or more")
    models = sorted({model for profile in cluster.kinds()[0] for model in profile.models})
    for service in found:
        require(isinstance(service, Service), "services", service, "Service objects")
        require(service.model in models, f"model of {service.name}", service.model, f"one of {', '.join(models)}")
    names = [s.name for s in found]
    require(len(set(names)) == len(names), "service names", names, "distinct: give each Service a name of its own")
    return found
