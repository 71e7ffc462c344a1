"""Whose requests are turned away when not all can be served: those of services that ask for more than a fair part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstack_lab.bounds import bound_of
from dstack_lab.services import Plan

#: By so much more may be asked than there is, and it still counts as all of it: sums round.
ROUNDING = 1e-9


def fair_parts(asked: Sequence[float], most: float) -> list[float]:
    """Part of what each asks for that is granted, max-min fair: who asks for less than the level gets all of it.

    Parameters
    ----------
    asked : sequence of float
        0 or more.
    most : float
        What there is to grant, 0 or more.

    Returns
    -------
    list of float
        0 to 1 each. The grants add up to `most`, or to what is asked if that is less; who asks for the whole of it
        together gets it, even where sums round.
    """
    level, left = float("inf"), most
    for rank, one in enumerate(sorted(asked)):
        others = len(asked) - rank
        if one * others > left * (1 + ROUNDING):
            level = left / others
            break
        left -= one
    return [min(1.0, level / one) if one > 0 else 1.0 for one in asked]


def demands(plan: Plan, rates_rps: Sequence[float]) -> list[float]:
    """GPU% that each service needs at least for its rate."""
    areas = bound_of(plan.services, plan.tables, plan.shares).area_pct_ms
    return [rate * area / 1000 for rate, area in zip(rates_rps, areas, strict=True)]


def fairly_reduced(plan: Plan) -> Plan:
    """Return a plan beyond the bound with its rates reduced fairly; `optimize` took the same part from all.

    Within the bound, and where the plan's own rates are not below those of its services, it stays as it is.
    """
    rates = [s.rate_rps for s in plan.services]
    if sum(a.rate_rps for a in plan.allocations) >= (1 - ROUNDING) * sum(rates):
        return plan
    parts = fair_parts(demands(plan, rates), min(100.0, sum(demands(plan, [a.rate_rps for a in plan.allocations]))))
    points = zip(plan.allocations, rates, parts, strict=True)
    return replace(plan, allocations=tuple(replace(a, rate_rps=rate * part) for a, rate, part in points))
