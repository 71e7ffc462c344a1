"""One trial: a policy on a plan with one seed, and what a comparison keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dstack_lab.admission import admitted
from dstack_lab.arrivals import Deterministic
from dstack_lab.bounds import bound_of
from dstack_lab.cells import Row
from dstack_lab.checks import count, require
from dstack_lab.contention import Contention
from dstack_lab.metrics import ALL, gpu_time, jain, summary
from dstack_lab.optimizer import optimize
from dstack_lab.policies.base import Policy
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Plan, Service
from dstack_lab.simulator import simulate
from dstack_lab.variability import Variability

METRICS = ("throughput_rps", "goodput_rps", "slo_attainment", "p50_ms", "p99_ms", "utilization", "jain", "bound_ratio")


def plan_for(
    services: Sequence[Service],
    profile: Profile,
    objective: str,
    shares: Iterable[float] | None = None,
    contention: Contention | None = None,
) -> Plan:
    """Plan `services` at any load, so that every policy can be asked to serve it.

    Beyond the bound the plan is sized for the part that the bound admits, as ``overload="reject"`` says.
    Close below it a service may have no operating point at which one launch at a time keeps up: then
    the plan is sized for the largest twentieth of all rates that has one. The requests are not reduced.
    `contention` is what the plan is told of it.

    Raises
    ------
    InfeasiblePlan
        If not even a twentieth of the rates has a plan.
    """
    shares = None if shares is None else tuple(shares)
    for twentieths in range(20, 0, -1):
        asked = [replace(s, arrivals=Deterministic(s.rate_rps * twentieths / 20)) for s in services]
        try:
            plan = optimize(asked, profile, objective, shares, overload="reject", contention=contention)
        except InfeasiblePlan:
            if twentieths == 1:
                raise
        else:
            return replace(plan, services=tuple(services))
    raise AssertionError("the loop returns or raises")


def checked_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """Return the seeds, each of which is used once."""
    require(isinstance(seeds, Iterable), "seeds", seeds, "integers, 0 or more")
    found = tuple(count("seeds", seed, least=0) for seed in seeds)
    require(0 < len(found) == len(set(found)), "seeds", found, "1 or more, each listed once")
    return found


def trial(
    plan: Plan,
    policy: Policy,
    admission: str,
    duration_ms: float,
    seed: int,
    variability: Variability | None = None,
    contention: Contention | None = None,
) -> list[Row]:
    """Simulate once: one row per service and one for all, or one that says why the policy cannot schedule the plan.

    The arguments are all that the result depends on: a trial can be kept by their contents.
    """
    try:
        trace = simulate(plan, admitted(policy, admission), duration_ms, seed, variability, contention)
    except InfeasiblePlan as error:
        return [{"note": str(error)}]
    names = [s.name for s in plan.services]
    came = trace.requests["service"].value_counts().reindex(names, fill_value=0)
    limits = bound_rps(plan, [float(n) * 1000 / duration_ms for n in came])
    table = summary(trace)
    kept = table[["service", *(m for m in METRICS if m in table.columns)]].to_dict("records")
    for row in kept:
        whole = row["service"] == ALL
        row["requests"] = int(came.sum() if whole else came[row["service"]])
        row["in_time"] = round(row["goodput_rps"] * duration_ms / 1000)
        row["jain"] = jain(gpu_time(trace)) if whole else np.nan
        row["bound_rps"] = limits[row["service"]]
        row["bound_ratio"] = row["goodput_rps"] / row["bound_rps"] if row["bound_rps"] > 0 else np.nan
    return [{str(name): value for name, value in row.items()} for row in kept]


def bound_rps(plan: Plan, rates_rps: Sequence[float]) -> dict[str, float]:
    """Most goodput at these rates [requests/s]: of each service if the GPU were its own, and of all together."""
    came = [
        (replace(s, arrivals=Deterministic(r)), t) for s, t, r in zip(plan.services, plan.tables, rates_rps, strict=True) if r > 0
    ]
    limits = dict.fromkeys([s.name for s in plan.services], 0.0)
    if came:
        together = bound_of([s for s, _ in came], [t for _, t in came], plan.shares)
        for (service, _), area in zip(came, together.area_pct_ms, strict=True):
            limits[service.name] = min(service.rate_rps, 100_000 / area)
    return {**limits, ALL: together.total_rps if came else 0.0}
