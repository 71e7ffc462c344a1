"""The operating point of each service by exhaustive search, and the bound that no schedule can pass.

A point is a batch b and a GPU% g with service time L(b, g). It is feasible for a service of SLO s and
rate r if a request that just misses a launch is still served in time: it waits for its batch to fill,
(b-1)/r, or for the previous launch, L, and then for its own, so max((b-1)/r, L) + L <= s; and if one
launch at a time keeps up, r·L <= b.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linprog

from dstack_lab.checks import percent, require
from dstack_lab.gpu_model import fit
from dstack_lab.profiles import Profile
from dstack_lab.services import Allocation, InfeasiblePlan, Plan, Service, ServiceTable

OBJECTIVES = ("efficacy", "capacity")
Array = NDArray[np.float64]


def service_tables(services: Sequence[Service], profile: Profile) -> tuple[ServiceTable, ...]:
    """Dense service times of each service's model, from the GPU% model fitted to `profile`."""
    return tuple(_table(profile, service.model) for service in services)


@lru_cache(maxsize=256)
def _table(profile: Profile, model: str) -> ServiceTable:
    """Fit once per profile object: comparisons plan the same services over and over."""
    batch = np.arange(1, int(profile.of(model)["batch"].max()) + 1)[:, None]
    return ServiceTable(np.asarray(fit(profile, model).predict(batch, np.arange(1, 101)[None, :])))


def scores(table: ServiceTable, shares: Sequence[float], objective: str) -> Array:
    """Objective of every point, shape (batch_max, shares): larger is better.

    ``efficacy`` is b / (L² g): throughput per latency and GPU%. ``capacity`` is b / (g L): requests
    per GPU%·ms, so the largest is the smallest area.
    """
    require(objective in OBJECTIVES, "objective", objective, f"one of {OBJECTIVES}")
    ms, batch, share = _grid(table, shares)
    return batch / (ms * share * (ms if objective == "efficacy" else 1.0))


def feasible(table: ServiceTable, shares: Sequence[float], slo_ms: float, rate_rps: float) -> NDArray[np.bool_]:
    """Points that keep the SLO and the rate, shape (batch_max, shares)."""
    ms, batch, _ = _grid(table, shares)
    gap_ms = 1000 / rate_rps if rate_rps > 0 else np.inf
    fill = np.where(batch > 1, (batch - 1) * gap_ms, 0.0) if np.isfinite(gap_ms) else np.where(batch > 1, np.inf, 0.0)
    return (np.maximum(fill, ms) + ms <= slo_ms) & (rate_rps * ms <= 1000 * batch)


def optimize(
    services: Iterable[Service],
    profile: Profile,
    objective: str = "efficacy",
    shares: Iterable[float] | None = None,
    overload: str = "raise",
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
        What a point is chosen for; see `scores`.
    shares : iterable of float, optional
        GPU% that the device can grant; those of the profile by default.
    overload : {"raise", "reject"}
        If the rates together exceed what any schedule can serve: raise, or size the plan for the part
        of each rate that the `bound` admits (ask the policy to drop late requests then).

    Returns
    -------
    Plan

    Raises
    ------
    InfeasiblePlan
        If no point meets a service's SLO, or the services ask for more than the GPU has.
    """
    services = _checked(services, profile)
    require(overload in ("raise", "reject"), "overload", overload, "'raise' or 'reject'")
    granted = _shares(profile, services, shares)
    tables = service_tables(services, profile)
    rates = [service.rate_rps for service in services]
    limit = _bound(services, tables, granted)
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
        admitted = zip(services, tables, limit.rates_rps.values(), strict=True)
        rates = [_servable(service, table, granted, rate) for service, table, rate in admitted]
    choices = [_ranked(s, t, granted, r, objective) for s, t, r in zip(services, tables, rates, strict=True)]
    picked = _fit_together(choices)
    allocations = tuple(
        Allocation(s.name, granted[c.share], c.batch, t.at(c.batch, granted[c.share]), r)
        for s, c, t, r in zip(services, picked, tables, rates, strict=True)
    )
    return Plan(services, allocations, tables, granted, objective, profile.provenance)


@dataclass(frozen=True, slots=True)
class Bound:
    """What no schedule that launches whole batches can exceed.

    Parameters
    ----------
    rates_rps : dict of str to float
        Goodput of each service in the best mix [requests/s].
    area_pct_ms : tuple of float
        Least GPU%·ms per request of each service, over all points with L <= SLO.
    """

    rates_rps: dict[str, float]
    area_pct_ms: tuple[float, ...]

    @property
    def total_rps(self) -> float:
        """Goodput of all services together [requests/s]."""
        return sum(self.rates_rps.values())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per service, and one for all."""
        rows = [
            {"service": n, "bound_rps": x, "area_pct_ms": a}
            for (n, x), a in zip(self.rates_rps.items(), self.area_pct_ms, strict=True)
        ]
        return pd.DataFrame([*rows, {"service": "all", "bound_rps": self.total_rps, "area_pct_ms": np.nan}])


def bound(services: Iterable[Service], profile: Profile, shares: Iterable[float] | None = None) -> Bound:
    """Return the provable upper bound on goodput, by linear programming.

    A request of service m costs at least a_m, the smallest g·L/b over the points with L <= SLO: a
    request in a batch that runs longer is late however it is scheduled. With x_m served in time per
    second, sum of x_m·a_m <= 100·1000 and x_m <= r_m, so the largest sum of x_m is a bound.

    Raises
    ------
    InfeasiblePlan
        If a service meets its SLO at no point.
    """
    services = _checked(services, profile)
    granted = _shares(profile, services, shares)
    return _bound(services, service_tables(services, profile), granted)


@dataclass(frozen=True, slots=True)
class _Choice:
    score: float
    load_pct: float
    batch: int
    share: int  # index


def _bound(services: Sequence[Service], tables: Sequence[ServiceTable], shares: Sequence[float]) -> Bound:
    areas = []
    for service, table in zip(services, tables, strict=True):
        ms, batch, share = _grid(table, shares)
        area = np.where(ms <= service.slo_ms, share * ms / batch, np.inf)
        if not np.isfinite(area).any():
            raise InfeasiblePlan(_too_slow(service, service.rate_rps, table, shares, 1))
        areas.append(float(area.min()))
    rates = [s.rate_rps for s in services]
    solved = linprog([-1.0] * len(rates), A_ub=[areas], b_ub=[100_000.0], bounds=[(0, r) for r in rates], method="highs")
    return Bound({s.name: float(x) for s, x in zip(services, np.asarray(solved.x), strict=True)}, tuple(areas))


def _ranked(service: Service, table: ServiceTable, shares: Sequence[float], rate: float, objective: str) -> list[_Choice]:
    """Feasible points, best first, each cheaper in GPU time than all before it."""
    ms, batch, share = _grid(table, shares)
    good = feasible(table, shares, service.slo_ms, rate)
    if not good.any():
        raise InfeasiblePlan(_too_slow(service, rate, table, shares, 2))
    value, load = scores(table, shares, objective), rate * share * ms / batch / 1000
    order = sorted(zip(*np.nonzero(good), strict=True), key=lambda p: (-value[p], load[p], p))
    kept: list[_Choice] = []
    for point in order:
        if not kept or load[point] < kept[-1].load_pct:
            kept.append(_Choice(float(value[point]), float(load[point]), int(point[0]) + 1, int(point[1])))
    return kept


def _fit_together(choices: list[list[_Choice]]) -> list[_Choice]:
    """Move the service that loses least per GPU% gained to a cheaper point until 100 % suffice, or none is left."""
    at = [0] * len(choices)
    while sum(c[i].load_pct for c, i in zip(choices, at, strict=True)) > 100:
        steps = []
        for k, (ranked, i) in enumerate(zip(choices, at, strict=True)):
            if i + 1 < len(ranked):
                lost = 1 - ranked[i + 1].score / ranked[i].score
                steps.append((lost / (ranked[i].load_pct - ranked[i + 1].load_pct), k))
        if not steps:
            break  # the cheapest points together: an engine may still serve part of it late
        at[min(steps)[1]] += 1
    return [ranked[i] for ranked, i in zip(choices, at, strict=True)]


def _grid(table: ServiceTable, shares: Sequence[float]) -> tuple[Array, Array, Array]:
    """Service times [ms] by batch and share, with their axes shaped to broadcast."""
    ms = np.array([[table.at(b, g) for g in shares] for b in range(1, table.batch_max + 1)])
    return ms, np.arange(1.0, table.batch_max + 1)[:, None], np.asarray(shares, dtype=float)[None, :]


def _servable(service: Service, table: ServiceTable, shares: Sequence[float], rate: float) -> float:
    """Largest tenth of `rate` for which a feasible point exists; the bound admits more than one launch at a time serves."""
    parts = (rate * tenth / 10 for tenth in range(10, 0, -1))
    return next((part for part in parts if feasible(table, shares, service.slo_ms, part).any()), rate)


def _too_slow(service: Service, rate: float, table: ServiceTable, shares: Sequence[float], launches: int) -> str:
    fastest = table.at(1, shares[-1])
    need = f"{launches} x " if launches > 1 else ""
    return (
        f"{service.name} asks for slo_ms = {service.slo_ms:g} at {rate:g}/s, but no batch and share meet it: "
        f"one request takes {need}{fastest:.2f} ms at {shares[-1]:g} GPU%; relax the SLO or lower the rate"
    )


def _checked(services: Iterable[Service], profile: Profile) -> tuple[Service, ...]:
    found = tuple(services)
    require(len(found) > 0, "services", found, "1 or more")
    for service in found:
        require(isinstance(service, Service), "services", service, "Service objects")
        require(service.model in profile.models, f"model of {service.name}", service.model, f"one of {', '.join(profile.models)}")
    names = [s.name for s in found]
    require(len(set(names)) == len(names), "service names", names, "distinct: give each Service a name of its own")
    return found


def _shares(profile: Profile, services: Sequence[Service], shares: Iterable[float] | None) -> tuple[float, ...]:
    if shares is not None:
        return tuple(sorted({percent("shares", s) for s in shares}))
    rows = profile.table[profile.table["model"].isin([s.model for s in services])]
    return tuple(sorted(float(s) for s in rows["gpu_pct"].unique()))
