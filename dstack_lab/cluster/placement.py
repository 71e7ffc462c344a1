"""Which services, shares and replicas on which GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dstack_lab.checks import count, require
from dstack_lab.cluster.demand import HEAVY, METHODS, demands
from dstack_lab.cluster.gpus import Cluster
from dstack_lab.cluster.limits import checked_on, even_split
from dstack_lab.cluster.packing import FULL, Row
from dstack_lab.cluster.search import Search, sped_up
from dstack_lab.constraints import OBJECTIVES
from dstack_lab.services import InfeasiblePlan, Plan, Service

OVERLOADS = ("refuse", "reject")
#: Into so many equal parts is a rate cut: halves, thirds, quarters and fifths are exact.
GRAINS = 60
#: Schedulable at this many times the rates, so that bursts fit; the first with which a placement is found is taken.
HEADROOMS = (1.5, 1.3, 1.15, 1.07, 1.0)
#: The test for temporal scheduling is strict: where nothing passes it, passing it with parts of the rates will do.
PARTS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True, slots=True)
class Replica:
    """A service on one GPU.

    Parameters
    ----------
    service, gpu : str
    part : float
        Part of the service's requests that it is to serve; over all replicas they sum to 1.
    rate_rps : float
        That part of the rate, or of what is planned of it [requests/s].
    demand_pct : float
        GPU% of its GPU that the rate needs on average, at the cheapest feasible point.
    """

    service: str
    gpu: str
    part: float
    rate_rps: float
    demand_pct: float


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Services on the GPUs of a cluster, and a plan for each GPU.

    Parameters
    ----------
    services : tuple of Service
    cluster : Cluster
    replicas : tuple of Replica
        By GPU, then in the order of the services.
    plans : dict of str to Plan
        By name of the GPU; one that serves nothing has none. Its services have Poisson arrivals of their replica's rate.
    method : {"dstack", "temporal", "exclusive"}
    planned : float
        Part of every rate that replicas and plans are sized for; below 1 only where the rest may be rejected.
    """

    services: tuple[Service, ...]
    cluster: Cluster
    replicas: tuple[Replica, ...]
    plans: dict[str, Plan]
    method: str
    planned: float = 1.0

    @property
    def demand_pct(self) -> dict[str, float]:
        """GPU% that each GPU's services need at their cheapest points."""
        found = dict.fromkeys(self.cluster.names, 0.0)
        for replica in self.replicas:
            found[replica.gpu] += replica.demand_pct
        return found

    @property
    def peak_pct(self) -> float:
        """Demand of the busiest GPU [GPU%]: what the search minimises."""
        return max(self.demand_pct.values())

    def of(self, service: str) -> tuple[Replica, ...]:
        """Replicas of a service.

        Raises
        ------
        ValueError
            If there is no such service.
        """
        names = [s.name for s in self.services]
        require(service in names, "service", service, f"one of {names}")
        return tuple(r for r in self.replicas if r.service == service)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per replica: where it is, its part of the requests, rate and demand, its share and batch there."""
        device = dict(zip(self.cluster.names, (p.provenance.device for p in self.cluster.profiles()), strict=True))
        rows = []
        for r in self.replicas:
            point = self.plans[r.gpu][r.service]
            row = {"gpu": r.gpu, "device": device[r.gpu], "service": r.service, "part": r.part, "rate_rps": r.rate_rps}
            rows.append({**row, "demand_pct": r.demand_pct, "gpu_pct": point.gpu_pct, "batch": point.batch})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        busy = ", ".join(f"{gpu} {pct:.0f} %" for gpu, pct in self.demand_pct.items())
        part = "" if self.planned == 1 else f" for {self.planned:.0%} of the rates"
        head = f"Placement by {self.method}{part} on {self.cluster.device} ({busy})"
        return f"{head}\n{self.to_frame().round(3).to_string(index=False)}"


def place(
    services: Iterable[Service],
    cluster: Cluster,
    method: str = "dstack",
    objective: str = "efficacy",
    max_replicas: int | None = None,
    overload: str = "refuse",
) -> Placement:
    """Place services on the GPUs of a cluster, as evenly as can be.

    The *demand* of a replica is its rate times the least area [GPU%·ms per request] of the points that
    keep SLO and rate on its GPU. The search minimises the demand of the busiest GPU, then of the second
    busiest and so on, by a few first placements (services one by one, the largest first, each to the least
    busy GPU; and a linear program's, rounded) and moves, swaps, splits and merges between two GPUs. A rate is split
    over replicas where a GPU is too small for it, or where that relieves the busier of two GPUs by 3 GPU% or more.
    What cannot be scheduled together on a GPU is searched around: first at 1.5 times the rates, so that bursts
    find room, then at less. The same input gives the same placement.

    Parameters
    ----------
    services : iterable of Service
        A service whose model a GPU's profile lacks, or whose SLO is too short for it, is placed elsewhere.
    cluster : Cluster
    method : {"dstack", "temporal", "exclusive"}
        For whom a GPU's services must be schedulable. ``dstack``: at any shares, such that slots keep up with
        them (`cut_slots`). ``temporal``: at the whole GPU, one launch at a time, such that batches that keep every deadline
        exist. ``exclusive``: one service per GPU, at the whole of it.
    objective : {"efficacy", "capacity"}
        What the operating points of each GPU's plan are chosen for, as in `optimize`.
    max_replicas : int, optional
        Most GPUs that one service may be on.
    overload : {"refuse", "reject"}
        What to do with rates that no placement was found for. ``reject`` places the largest twentieth of all of
        them that one was found for; all requests come all the same, and the schedulers drop what is too late.

    Returns
    -------
    Placement

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    InfeasiblePlan
        If no placement was found: says which services ask for how much GPU, and the demand on each GPU of the best one.

    Notes
    -----
    One service has at most one replica per GPU. The search is local: it may miss a placement that exists.
    """
    found = checked_on(services, cluster)
    require(method in METHODS, "method", method, f"one of {METHODS}")
    require(objective in OBJECTIVES, "objective", objective, f"one of {OBJECTIVES}")
    require(overload in OVERLOADS, "overload", overload, f"one of {OVERLOADS}")
    most = len(cluster) if max_replicas is None else count("max_replicas", max_replicas)
    for twentieths in range(20, 1, -1) if overload == "reject" else ():
        try:
            placed = _whole(sped_up(found, twentieths / 20), cluster, method, objective, most)
        except InfeasiblePlan:
            continue
        return replace(placed, services=found, planned=twentieths / 20)
    part = 0.05 if overload == "reject" else 1.0
    return replace(_whole(sped_up(found, part), cluster, method, objective, most), services=found, planned=part)


def _whole(found: tuple[Service, ...], cluster: Cluster, method: str, objective: str, most: int) -> Placement:
    """Place all of the rates."""
    grains = GRAINS * -(-len(cluster) // 20)
    kinds, which = cluster.kinds()
    costs = np.array([demands(found, kind, method, grains) for kind in kinds])
    _require_served(found, costs)
    for headroom in HEADROOMS + (PARTS if method == "temporal" else ()):
        more = costs
        if headroom > 1:
            more = np.array([demands(sped_up(found, headroom), kind, method, grains) for kind in kinds])
            if (more[:, :, 1] >= HEAVY).all(axis=0).any():
                continue
        search = Search(found, cluster, method, objective, headroom, more, most)
        parts = None if method == "exclusive" else _linear(more[list(which)], [s.rate_rps for s in found])
        rows = search.run(parts)
        if rows is None:
            continue
        plans = {gpu: search.plan(gpu, row) for gpu, row in enumerate(rows) if any(row)}
        # less load need not be easier: its batches are smaller
        peak = max(sum(costs[which[gpu], m, k] for m, k in enumerate(row)) for gpu, row in enumerate(rows))
        if peak <= FULL and all(plans.values()):
            return _placement(found, cluster, rows, costs, plans, method)
    raise InfeasiblePlan(_too_much(found, cluster, search, costs, method))


def _linear(costs: np.ndarray, rates: Sequence[float]) -> np.ndarray:
    """Part of each rate by GPU, shape (services, gpus), with which the GPUs are loaded most evenly at least areas."""
    grains = costs.shape[2] - 1
    rate = np.asarray(rates)[None, :, None] * np.arange(1, grains + 1) / grains
    area = np.where(costs[:, :, 1:] < HEAVY, costs[:, :, 1:] / rate * 1000, np.inf).min(axis=2).T
    return even_split(area, rates, np.ones(len(costs), dtype=np.int64))[1]


def _require_served(services: Sequence[Service], costs: np.ndarray) -> None:
    """Raise for services that no GPU serves, not even a grain of their rate."""
    for m, service in enumerate(services):
        if (costs[:, m, 1] >= HEAVY).all():
            raise InfeasiblePlan(
                f"{service.name} asks for slo_ms = {service.slo_ms:g} at {service.rate_rps:g}/s, but no GPU of the cluster "
                "has a batch and share that meet it; relax the SLO or lower the rate"
            )


def _placement(
    services: tuple[Service, ...],
    cluster: Cluster,
    rows: Sequence[Row],
    costs: np.ndarray,
    plans: dict[int, Plan | None],
    method: str,
) -> Placement:
    replicas = []
    for gpu, (name, row, kind) in enumerate(zip(cluster.names, rows, cluster.kinds()[1], strict=True)):
        for m, (service, k) in enumerate(zip(services, row, strict=True)):
            if k:
                rate = plans[gpu][service.name].rate_rps  # type: ignore[index]  # all of them were planned
                replicas.append(Replica(service.name, name, k / (costs.shape[2] - 1), rate, float(costs[kind, m, k])))
    by_name = {cluster.names[gpu]: plan for gpu, plan in plans.items() if plan is not None}
    return Placement(services, cluster, tuple(replicas), by_name, method)


def _too_much(services: Sequence[Service], cluster: Cluster, search: Search, costs: np.ndarray, method: str) -> str:
    """Say which services ask for how much over the cluster, and the demand on each GPU of the best placement found."""
    grains, which, gpus = costs.shape[2] - 1, cluster.kinds()[1], len(cluster)
    asks = []
    for m, service in enumerate(services):
        cost = costs[:, m, 1:]
        cheapest = np.where(cost < HEAVY, cost / np.arange(1, grains + 1) * grains, np.inf).min()
        asks.append(f"{service.name} {service.rate_rps:g}/s = {cheapest:.0f} %")
    text = f"no {method} placement on {gpus} GPU{'s' * (gpus > 1)} was found; in GPU% of the GPU where it costs least, "
    text += f"the services ask for {', '.join(asks)}"
    if method == "exclusive" and len(services) > gpus:
        return f"{text}; each of the {len(services)} services needs a GPU of its own"
    held = []
    for name, kind, row in zip(cluster.names, which, search.rows, strict=True):
        inside = [(s.name, k, float(costs[kind, m, k])) for m, (s, k) in enumerate(zip(services, row, strict=True)) if k]
        each = ", ".join(f"{k / grains:.0%} of {n}: {_pct(c)}" for n, k, c in inside) or "nothing"
        held.append(f"{name} {_pct(sum(c for _, _, c in inside))} ({each})")
    text += f"; the most even placement tried needs {'; '.join(held)}"
    if search.refused:
        why = {"dstack": "no slots keep up with that", "temporal": "one launch at a time would miss deadlines"}
        text += f"; {why.get(method, 'no operating points keep that')}"
    return f"{text}: add a GPU, lower a rate or relax an SLO"


def _pct(demand: float) -> str:
    return f"{demand:.0f} %" if demand < HEAVY else "more than one launch at a time serves"
