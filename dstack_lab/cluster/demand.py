"""What a part of a service's rate costs on a GPU, and whether what was put on a GPU can be scheduled there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dstack_lab.bounds import granted_shares, service_tables
from dstack_lab.constraints import fits, points
from dstack_lab.optimizer import optimize
from dstack_lab.policies.windows import plan_period
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Plan, Service

Array = NDArray[np.float64]
METHODS = ("dstack", "temporal", "exclusive")

#: Added to the demand of what cannot be: above any real demand, and finite, so that a search sees what makes it less.
HEAVY = 1e6
#: Batches of Temporal that are tried fill in these parts of the SLO.
FILLS = (0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1, 0.05)


def demands(services: Sequence[Service], profile: Profile, method: str, grains: int) -> Array:
    """Least GPU% that parts of each rate need on average, at their cheapest feasible points.

    Returns
    -------
    numpy.ndarray, shape (services, grains + 1)
        Column k is for k / grains of the rate: infinite where the profile lacks the model or no point
        meets the SLO; above `HEAVY` where one launch at a time does not keep up with it.
    """
    found = np.full((len(services), grains + 1), np.inf)
    found[:, 0] = 0.0
    for m, service in enumerate(services):
        if service.model not in profile.models:
            continue
        ms, batch, share = points(service_tables([service], profile)[0], shares_for(profile, services, method))
        area = share * ms / batch
        if not (2 * ms <= service.slo_ms).any():
            continue
        for k in range(1, grains + 1):
            rate = service.rate_rps * k / grains
            good = fits(ms, batch, service.slo_ms, rate)
            found[m, k] = rate * float(area[good].min()) / 1000 if good.any() else HEAVY + rate * float(area.min()) / 1000
    return found


def shares_for(profile: Profile, services: Sequence[Service], method: str) -> tuple[float, ...]:
    """GPU% that a launch may have: all of the profile's for D-STACK, the whole GPU else."""
    granted = granted_shares(profile, [s for s in services if s.model in profile.models], None, None)
    return granted if method == "dstack" else granted[-1:]


def plan_gpu(services: Sequence[Service], profile: Profile, method: str, objective: str, check: bool = True) -> Plan:
    """Plan one GPU for services of the rates that it shall serve.

    Raises
    ------
    InfeasiblePlan
        If there are no operating points; with `check`, also if the method's scheduler cannot hold them: D-STACK finds
        no period plan, or a temporal scheduler may miss a deadline (`meets_deadlines`).
    """
    plan = optimize(services, profile, objective, shares_for(profile, services, method))
    if check and method == "dstack":
        plan_period(plan)
    elif check and method == "temporal" and not any(meets_deadlines(plan, fill) for fill in FILLS):
        raise InfeasiblePlan("no batches let one launch at a time keep every deadline")
    return plan


def meets_deadlines(plan: Plan, fill: float) -> bool:
    """Whether one launch at a time, earliest deadline first, keeps every deadline with batches that fill in `fill` of the SLO.

    The processor-demand test of non-preemptive earliest deadline first (Jeffay, Stanat, Martel 1991; George, Rivierre,
    Spuri 1996), for requests that come evenly at their rates: batches of b come b/r apart, take L(b), and are due
    SLO - (b-1)/r after their last request; what is due until t, and the longest launch that may have begun before it
    and is due later, must fit into t. Temporal itself launches sooner, with smaller batches, when the GPU is idle.
    """
    share = plan.shares[-1]
    cost, gap, due = [], [], []
    for service, allocation, table in zip(plan.services, plan.allocations, plan.tables, strict=True):
        rate = allocation.rate_rps / 1000
        largest = max((b for b in range(1, table.batch_max + 1) if 2 * table.at(b, share) <= service.slo_ms), default=1)
        batch = min(max(1, int(fill * service.slo_ms * rate)), largest)
        cost.append(table.at(batch, share))
        gap.append(batch / rate)
        due.append(service.slo_ms - (batch - 1) / rate)
    c, p, d = np.array([cost, gap, due])
    busy = float((c / p).sum())
    if busy > 1 or (c > d).any():
        return False
    # beyond this the demand can no longer catch up with the time; close to busy = 1 it is cut at 20 of the longest deadlines
    end = min(max(d.max(), float(((p - d).clip(0) * c / p).sum()) / max(1 - busy, 1e-9)), 20 * d.max())
    instants = np.unique(np.concatenate([np.arange(x, end + 1e-9, y) for x, y in zip(d, p, strict=True)]))
    after = instants[:, None] - d
    needed = (np.floor(after / p + 1e-9) + 1).clip(0) @ c + np.where(after < 0, c, 0.0).max(axis=1)
    return bool((needed <= instants + 1e-9).all())
