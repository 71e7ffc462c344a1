"""The operating point of each service by exhaustive search, and what one step away from it costs.

What a point must keep and what makes it better is told in `constraints`.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dstack_lab.bounds import Grants, bound_of, checked_services, granted_shares, service_tables, too_slow
from dstack_lab.checks import instance, require
from dstack_lab.constraints import EQUAL, OBJECTIVES, binding, broken_most, feasible, points, score_of, scores
from dstack_lab.contention import Contention
from dstack_lab.profiles import Profile
from dstack_lab.services import Allocation, InfeasiblePlan, Plan, Service, ServiceTable


def optimize(
    services: Iterable[Service],
    profile: Profile,
    objective: str = "efficacy",
    shares: Iterable[float] | None = None,
    overload: str = "raise",
    *,
    device: Grants | None = None,
    contention: Contention | None = None,
) -> Plan:
    """Choose the share and batch of each service, exactly, over all batches and grantable shares.

    Each service takes its best feasible point. If the points together ask for more than the whole
    GPU, the service that loses least moves to its next cheaper point, until they fit.

    Parameters
    ----------
    services : iterable of Service
    profile : Profile
        Holds every service's model.
    objective : {"efficacy", "capacity"}
        What a point is chosen for; see `constraints.scores`.
    shares : iterable of float, optional
        GPU% to choose from; those of the device, else those of the profile, by default.
    overload : {"raise", "reject"}
        If the rates together exceed what any schedule can serve: raise, or size the plan for the part
        that fits, the same part of every rate (ask the policy to drop late requests then). The `bound`
        would serve more requests in all by starving the expensive services.
    device : Device, optional
        Where the plan is to run: its ``shares()`` are what can be granted.
    contention : Contention, optional
        What launches cost each other there. The operating points are those of networks alone; a policy that
        chooses who runs beside whom (`DStack`) reckons with it.

    Returns
    -------
    Plan
        Its ``binding`` column says which constraint holds each service at its point; see `constraints.binding`.

    Raises
    ------
    ValueError
        Naming the argument that does not fit, such as a share that the device cannot grant.
    InfeasiblePlan
        If no point meets a service's SLO, or the services ask for more than the GPU has.
    """
    services = checked_services(services, profile)
    require(objective in OBJECTIVES, "objective", objective, f"one of {OBJECTIVES}")
    require(overload in ("raise", "reject"), "overload", overload, "'raise' or 'reject'")
    granted = granted_shares(profile, services, shares, device)
    tables = service_tables(services, profile)
    rates = [service.rate_rps for service in services]
    limit = bound_of(services, tables, granted)
    if limit.total_rps < sum(rates) * (1 - 1e-9):
        if overload == "raise":
            asks = ", ".join(
                f"{s.name} {r:g}/s at {a:.2f} GPU%·ms = {r * a / 1000:.0f} %"
                for s, r, a in zip(services, rates, limit.area_pct_ms, strict=True)
            )
            raise InfeasiblePlan(
                f"the services ask for more than 100 GPU% even at their cheapest points: {asks}; "
                "lower a rate, relax an SLO, or pass overload='reject'"
            )
        part = 100_000 / sum(r * a for r, a in zip(rates, limit.area_pct_ms, strict=True))
        rates = [
            _servable(service, table, granted, part * rate) for service, table, rate in zip(services, tables, rates, strict=True)
        ]
    choices = [_ranked(s, t, granted, r, objective) for s, t, r in zip(services, tables, rates, strict=True)]
    allocations = []
    for service, table, rate, pick in zip(services, tables, rates, _fit_together(choices), strict=True):
        share = granted[pick.share]
        ms = table.at(pick.batch, share)
        held = binding(table, granted, service.slo_ms, rate, pick.batch, share, objective)
        allocations.append(Allocation(service.name, share, pick.batch, ms, rate, held))
    return Plan(services, tuple(allocations), tables, granted, objective, profile.provenance, contention)


def sensitivity(plan: Plan) -> pd.DataFrame:
    """Say what one step away from each operating point costs.

    Parameters
    ----------
    plan : Plan
        Of `optimize`.

    Returns
    -------
    pandas.DataFrame
        Up to four rows per service, for the next lower and higher grantable share and batch; a
        step beyond an edge has no row. ``service``; ``step``: "share down", "share up", "batch down",
        "batch up"; ``gpu_pct`` and ``batch`` there; ``score_lost``, the fraction of the objective
        that is lost (below 0: gained); ``service_ms`` and ``demand_pct`` there, and how much they
        are above the plan's: ``service_added_ms``, ``demand_added_pct``; ``feasible``, whether the
        whole plan would still keep every constraint; ``binding``, which one it would break most
        ("none" if feasible), in the words of `constraints.binding`.

    Raises
    ------
    ValueError
        If it is no plan, or was not made for one of the objectives.
    """
    instance("plan", plan, Plan, "a Plan of lab.optimize")
    require(plan.objective in OBJECTIVES, "plan.objective", plan.objective, f"one of {OBJECTIVES}: a plan of lab.optimize")
    rows = []
    for service, now, table in zip(plan.services, plan.allocations, plan.tables, strict=True):
        score = score_of(now.service_ms, now.batch, now.gpu_pct, plan.objective)
        demand = now.rate_rps * now.area_pct_ms / 1000
        for step, batch, share in _steps(now, plan.shares, table.batch_max):
            ms = table.at(batch, share)
            added = now.rate_rps * share * ms / batch / 1000 - demand
            held = broken_most(ms, batch, service.slo_ms, now.rate_rps)
            if held == "none" and plan.demand_pct + added > 100 * (1 + EQUAL):
                held = "GPU total"
            rows.append(
                {
                    "service": service.name,
                    "step": step,
                    "gpu_pct": share,
                    "batch": batch,
                    "score_lost": 1 - score_of(ms, batch, share, plan.objective) / score,
                    "service_ms": ms,
                    "service_added_ms": ms - now.service_ms,
                    "demand_pct": demand + added,
                    "demand_added_pct": added,
                    "feasible": held == "none",
                    "binding": held,
                }
            )
    columns = "service step gpu_pct batch score_lost service_ms service_added_ms demand_pct demand_added_pct feasible binding"
    return pd.DataFrame(rows, columns=columns.split())


@dataclass(frozen=True, slots=True)
class _Choice:
    score: float
    load_pct: float
    batch: int
    share: int  # index


def _steps(now: Allocation, shares: Sequence[float], batch_max: int) -> list[tuple[str, int, float]]:
    """Neighbours of a point: what changes, the batch and the share."""
    below, above = bisect.bisect_left(shares, now.gpu_pct) - 1, bisect.bisect_right(shares, now.gpu_pct)
    found = [("share down", now.batch, shares[below])] if below >= 0 else []
    found += [("share up", now.batch, shares[above])] if above < len(shares) else []
    found += [("batch down", now.batch - 1, now.gpu_pct)] if now.batch > 1 else []
    return found + ([("batch up", now.batch + 1, now.gpu_pct)] if now.batch < batch_max else [])


def _ranked(service: Service, table: ServiceTable, shares: Sequence[float], rate: float, objective: str) -> list[_Choice]:
    """Feasible points, best first, each cheaper in GPU time than all before it."""
    ms, batch, share = points(table, shares)
    good = np.flatnonzero(feasible(table, shares, service.slo_ms, rate))
    if not len(good):
        within = 2 * ms <= service.slo_ms
        if not within.any():
            raise InfeasiblePlan(too_slow(service, rate, float(ms[0, -1]), shares[-1], 2))
        # at the rate that a point just keeps up with, its batch fills while the one before runs
        most = float((1000 * batch / ms)[within].max())
        raise InfeasiblePlan(
            f"{service.name} asks for {rate:g}/s within slo_ms = {service.slo_ms:g}, but one launch after another answers "
            f"{most:.1f}/s within it at most; lower the rate or relax the SLO"
        )
    value, load = (x.ravel()[good] for x in (scores(table, shares, objective), rate * share * ms / batch / 1000))
    order = np.lexsort((load, -value))
    value, load, at = value[order], load[order], good[order]
    kept = np.append(True, load[1:] < np.minimum.accumulate(load)[:-1])
    found = zip(value[kept].tolist(), load[kept].tolist(), at[kept].tolist(), strict=True)
    return [_Choice(v, x, i // len(shares) + 1, i % len(shares)) for v, x, i in found]


def _fit_together(choices: list[list[_Choice]]) -> list[_Choice]:
    """Move the service that loses least per GPU% gained to a cheaper point until 100 % suffice, or none is left."""
    at = [0] * len(choices)
    ahead: list[tuple[float, int]] = []

    def look(k: int) -> None:
        if at[k] + 1 < len(choices[k]):
            here, there = choices[k][at[k] : at[k] + 2]
            heapq.heappush(ahead, ((1 - there.score / here.score) / (here.load_pct - there.load_pct), k))

    for k in range(len(choices)):
        look(k)
    # where the cheapest points together still ask for more, an engine may serve part of it late
    while ahead and sum(ranked[i].load_pct for ranked, i in zip(choices, at, strict=True)) > 100:
        _, k = heapq.heappop(ahead)
        at[k] += 1
        look(k)
    return [ranked[i] for ranked, i in zip(choices, at, strict=True)]


def _servable(service: Service, table: ServiceTable, shares: Sequence[float], rate: float) -> float:
    """Largest tenth of `rate` for which a feasible point exists; the bound admits more than one launch at a time serves."""
    parts = (rate * tenth / 10 for tenth in range(10, 0, -1))
    return next((part for part in parts if feasible(table, shares, service.slo_ms, part).any()), rate)
