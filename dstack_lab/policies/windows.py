"""The period plan: which service may launch when, as windows that repeat and always fit side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import pandas as pd

from dstack_lab.checks import instance
from dstack_lab.policies.fair_parts import demands, fair_parts
from dstack_lab.policies.lanes import LATE, LATE_IF_DROPPED, lanes
from dstack_lab.services import Allocation, InfeasiblePlan, Plan, Service, ServiceTable

#: Windows are sized for this many times the mean rate, so that bursts fit; the first that can be placed is taken.
HEADROOMS = (1.5, 1.3, 1.15, 1.07, 1.0)
#: Parts of the load that a plan which rejects the rest may be sized for.
PARTS = tuple(part / 100 for part in range(95, 0, -5))
#: Neighbours of the plan's operating points that are tried, and most windows of a service in a period beyond the fewest.
ATTEMPTS, MOST_WINDOWS = 60, 24
#: Room for the rounding of sums: of times [ms], of shares [GPU%] and of counts.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Window:
    """A reserved launch.

    Parameters
    ----------
    start_ms, end_ms : float
        From when to when in every period [ms].
    service : str
        Whose it is.
    gpu_pct : float
        Share that is reserved.
    batch : int
        Requests that it is sized for.
    next_end_ms : float
        When the service's following window ends [ms]: what need not run now can run then.
    """

    start_ms: float
    end_ms: float
    service: str
    gpu_pct: float
    batch: int
    next_end_ms: float = math.nan


@dataclass(frozen=True, slots=True)
class _Option:
    windows: int  # in a period
    point: Allocation
    reserved: float  # part of the GPU's time and space


@dataclass(frozen=True, slots=True)
class PeriodPlan:
    """Windows of one period.

    Parameters
    ----------
    period_ms : float
        Length of the period [ms], after which the windows come again.
    windows : tuple of Window
        By start.
    allocations : tuple of Allocation
        Operating points that they were placed for, in the order of the plan's services.
    """

    period_ms: float
    windows: tuple[Window, ...]
    allocations: tuple[Allocation, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per window, by start: ``service``, ``start_ms``, ``end_ms``, ``gpu_pct`` and ``batch``."""
        names = ("service", "start_ms", "end_ms", "gpu_pct", "batch")
        return pd.DataFrame([{name: getattr(window, name) for name in names} for window in self.windows], columns=list(names))


def plan_period(plan: Plan, reject: bool = False, beside: bool = True) -> PeriodPlan:
    """Place the launch windows of `plan`; after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    The period is the largest SLO. Each service gets windows often enough for its SLO and its rate, at
    the share of the plan, sized for the requests that come between two of them. They are placed
    side by side all the time if there are shares that hardly make anyone late (`lanes`). If not, windows
    take turns: they are placed earliest deadline first, at the earliest time where the shares never
    exceed 100 % and no two windows of one service overlap, and what cannot be placed gives way, by the
    smallest loss of GPU time first: a service gets another share, or its windows come more often with
    smaller batches.

    Parameters
    ----------
    plan : Plan
    reject : bool
        Windows for a part of the load will do; the rest is dropped.
    beside : bool
        Place windows side by side if that holds; else they always take turns.

    Raises
    ------
    InfeasiblePlan
        If nothing fits; the message says which service asks for how much.
    """
    instance("plan", plan, Plan, "a Plan of lab.optimize")
    period = max(service.slo_ms for service in plan.services)
    late = LATE_IF_DROPPED if reject else LATE
    if beside and (found := _side_by_side(period, plan, (1.0,), late, reject)) is not None:
        return found
    for headroom in HEADROOMS + (PARTS if reject and not beside else ()):
        options = [
            _options(period, *r, plan.shares, headroom) for r in zip(plan.services, plan.allocations, plan.tables, strict=True)
        ]
        if not all(options):
            continue
        for chosen in _neighbours(options):
            if (windows := _place(period, plan.services, chosen)) is not None:
                return PeriodPlan(period, _chain(period, windows), tuple(option.point for option in chosen))
    if beside and reject and (found := _side_by_side(period, plan, PARTS, late, reject)) is not None:
        return found
    if beside and not reject and (least := _narrowest(period, plan)) is not None:  # tight, but every window is there
        points, _ = lanes(plan, least=least)
        if points and (found := _windows_of(period, plan, points, reject)) is not None:
            return found
    asks = ", ".join(
        f"{a.service} {a.gpu_pct:g} % for {a.service_ms:.1f} ms at {a.rate_rps:g}/s within {s.slo_ms:g} ms"
        for a, s in zip(plan.allocations, plan.services, strict=True)
    )
    raise InfeasiblePlan(f"no period of {period:g} ms holds every service's windows: {asks}; lower a rate or relax an SLO")


def _neighbours(options: list[list[_Option]]) -> Iterator[list[_Option]]:
    """Sets of operating points worth placing: the plan's own, then its neighbours by the GPU time they reserve."""
    start = (0,) * len(options)
    frontier, seen = [(0.0, start)], {start}
    for _ in range(ATTEMPTS):
        if not frontier:
            break
        _, at = heappop(frontier)
        yield [ranked[i] for ranked, i in zip(options, at, strict=True)]
        for k, ranked in enumerate(options):
            following = (*at[:k], at[k] + 1, *at[k + 1 :])
            if following[k] < len(ranked) and following not in seen:
                seen.add(following)
                heappush(frontier, (sum(r[i].reserved for r, i in zip(options, following, strict=True)), following))


def _side_by_side(period: float, plan: Plan, parts: Iterable[float], most: float, reject: bool) -> PeriodPlan | None:
    """Lanes for the first of these parts of the load, fairly cut, at which at most this part of a service's requests is late.

    Their windows are evenly spaced, and hold the whole rate; with `reject` they may come one after the other instead.
    """
    for part in parts:
        points, late = lanes(plan, _cut(plan, part) if part < 1 else 1.0)
        if points and late <= most:
            return _windows_of(period, plan, points, reject)
    return None


def _cut(plan: Plan, part: float) -> list[float]:
    """Parts of the rates that together are this part of the load, max-min fair."""
    asked = demands(plan, [a.rate_rps for a in plan.allocations])
    return fair_parts(asked, part * sum(asked))


def _narrowest(period: float, plan: Plan) -> list[int] | None:
    """Position of the smallest share at which each service's windows hold its rate; None if one has none."""
    found = []
    for service, point, table in zip(plan.services, plan.allocations, plan.tables, strict=True):
        keep_up = (i for i, share in enumerate(plan.shares) if _options(period, service, point, table, (share,), 1.0))
        if (first := next(keep_up, None)) is None:
            return None
        found.append(first)
    return found


def _windows_of(period: float, plan: Plan, points: tuple[Allocation, ...], reject: bool) -> PeriodPlan | None:
    """Windows of lanes: evenly spaced; None if, without `reject`, they do not hold a service's rate."""
    windows, allocations = [], []
    for service, point, table in zip(plan.services, points, plan.tables, strict=True):
        options = _options(period, service, point, table, (point.gpu_pct,), 1.0)
        if options:
            option = min(options, key=lambda o: (o.point.batch, o.windows))
            number, point = option.windows, option.point
        elif reject:
            number = max(1, math.floor(period / point.service_ms + EPSILON))
        else:
            return None
        allocations.append(point)
        for start in (j * period / number for j in range(number)):
            windows.append(Window(start, start + point.service_ms, point.service, point.gpu_pct, point.batch))
    return PeriodPlan(period, _chain(period, windows), tuple(allocations))


def _chain(period: float, windows: list[Window]) -> tuple[Window, ...]:
    """Order the windows by start and tell each when its service's next one ends."""
    ordered = sorted(windows, key=lambda w: (w.start_ms, w.service))
    following = {w.service: w.end_ms + period for w in reversed(ordered)}  # the first one of the next period
    chained = []
    for window in reversed(ordered):
        chained.append(replace(window, next_end_ms=following[window.service]))
        following[window.service] = window.end_ms
    return tuple(reversed(chained))


def _options(
    period: float, service: Service, point: Allocation, table: ServiceTable, shares: tuple[float, ...], headroom: float
) -> list[_Option]:
    """Ways to give a service its windows: the plan's share first, then the rest by the GPU time they reserve."""
    found: list[_Option] = []
    arrive = headroom * point.rate_rps * period / 1000
    fewest = max(1, math.ceil(arrive / table.batch_max - EPSILON))
    for share in shares:
        # of a service with a far shorter SLO than the longest one, single requests need more windows than that
        one_ms = table.at(1, share)
        often = math.ceil(period / (service.slo_ms - one_ms) - EPSILON) if 2 * one_ms <= service.slo_ms else 0
        begin = often if often >= fewest + MOST_WINDOWS else fewest
        for windows in range(begin, begin + MOST_WINDOWS):
            batch = max(1, math.ceil(arrive / windows - EPSILON))
            ms = table.at(batch, share)
            gap = period / windows
            if gap + ms <= service.slo_ms and ms <= gap:
                new = Allocation(point.service, share, batch, ms, point.rate_rps)
                found.append(_Option(windows, new, windows * share * ms / (100 * period)))
            if batch == 1 and found and found[-1].windows < windows:
                break
    found.sort(key=lambda o: (o.point.gpu_pct != point.gpu_pct or o.point.batch > point.batch, o.reserved))
    return found


def _place(period: float, services: tuple[Service, ...], chosen: list[_Option]) -> list[Window] | None:
    """Earliest deadline first; None if a window cannot start in time."""
    if sum(option.reserved for option in chosen) > 1 + EPSILON:
        return None
    wanted = []
    for service, option in zip(services, chosen, strict=True):
        gap = period / option.windows
        room = service.slo_ms - option.point.service_ms - gap  # a window may start this much after its nominal time
        wanted += [(j * gap + room, j * gap, option.point) for j in range(option.windows)]
    placed: list[Window] = []
    for latest, release, point in sorted(wanted, key=lambda w: (w[0], w[1], w[2].service)):
        start = _earliest(period, placed, point, release, latest)
        if start is None:
            return None
        placed.append(Window(start, start + point.service_ms, point.service, point.gpu_pct, point.batch))
    return placed


def _earliest(period: float, placed: list[Window], point: Allocation, release: float, latest: float) -> float | None:
    """First start from `release` to `latest` where the share is free throughout, on a circle of one period."""
    around = [(w.start_ms + turn, w.end_ms + turn, w) for w in placed for turn in (-period, 0.0, period)]
    starts = sorted({release, *(end for _, end, _ in around if release < end <= latest + EPSILON)})
    for start in starts:
        end = start + point.service_ms
        beside = [(a, b, w) for a, b, w in around if a < end - EPSILON and b > start + EPSILON]
        if any(w.service == point.service for _, _, w in beside):
            continue
        edges = [start, *(a for a, _, _ in beside if a > start)]
        used = (sum(w.gpu_pct for a, b, w in beside if a <= t + EPSILON < b) for t in edges)
        if all(u + point.gpu_pct <= 100 + EPSILON for u in used):
            return start
    return None


def ladders(plan: Plan, period: PeriodPlan) -> dict[str, tuple[float, ...]]:
    """Shares of each service, largest first: the plan's if it is larger, that of its windows, and one between."""
    ladders = {}
    for wanted, placed in zip(plan.allocations, period.allocations, strict=True):
        between = [s for s in plan.shares if placed.gpu_pct < s < wanted.gpu_pct]
        middle = between[len(between) // 2 :][:1]
        ladders[placed.service] = tuple(sorted({max(wanted.gpu_pct, placed.gpu_pct), *middle, placed.gpu_pct}, reverse=True))
    return ladders
