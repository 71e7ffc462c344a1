"""Lanes that several services share in turns: how many lanes a GPU is worth when launches slow each other down.

A lane of its own for each service uses the GPU best if nobody feels the others; one lane for all is sharing in
turns, which nobody can disturb. Between them lie lanes for some services each. Which are best is a matter of how
much slower k launches beside each other are than one, so this plan needs to know of `Contention`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
import pandas as pd

from dstack_lab.contention import Contention, Load
from dstack_lab.policies.lane_queue import Rider, late_in_turns
from dstack_lab.services import Allocation, InfeasiblePlan, Plan, Service
from dstack_lab.state import INFINITE

#: Shares that are tried to find out who shares a lane, about, and then to find its width; the plan's may be more.
COARSE, FINE = 20, 60
#: Requests that not even this part of a full batch, begun now, would serve in time are given up: the less is tried for
#: them, the larger are the batches of those that can be served. Each lane takes what does better.
HOPELESS = (0.5, 1.0)
#: Above this many lanes the two that ask for least together are merged untried; below, this many pairs are tried.
MOST_LANES, PAIRS = 8, 12
#: How many of the best are merged further.
BEAM = 3
#: Requests are drawn for this many periods at least and at most, for so many of the rarest service in between, and in all.
PERIODS, RAREST, IN_ALL = (10, 60), 400, 50_000
#: How many times fuller than full lanes may be where the rates are more than the GPU can serve.
FULLER = (1.0, 1.15, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
#: A lane fuller than this goes by who had least of it: whoever is due first would starve those with long batches.
OVERLOAD = 1.25
EPSILON, SLACK = 1e-9, 1e-6
#: What a lane's fullness counts where nobody is late.
TIE = 1e-6


@dataclass(frozen=True, slots=True)
class SharedLane:
    """A share of the GPU that some services use one batch at a time.

    Parameters
    ----------
    gpu_pct : float
        The share.
    points : tuple of Allocation
        Largest batch of each service, and how long it takes while all other lanes are busy.
    slowdown : tuple of float
        That time over the time alone, in the order of `points`.
    hopeless : float
        Requests that not even this part of a full batch, begun now, would serve in time are given up.
    fair_ms : float
        Period of the scoreboard that says whose turn it is, in a lane far from keeping up [ms]; 0 in others: whoever
        has to begin first begins.
    """

    gpu_pct: float
    points: tuple[Allocation, ...]
    slowdown: tuple[float, ...]
    hopeless: float
    fair_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class SharedLanes:
    """Lanes side by side.

    Parameters
    ----------
    lanes : tuple of SharedLane
    late : dict of str to float
        Part of each service's requests that is expected to be late or given up.
    fullest : float
        Part of time that the busiest lane is, with full batches; above 1 it does not keep up.
    """

    lanes: tuple[SharedLane, ...]
    late: dict[str, float]
    fullest: float

    def to_frame(self) -> pd.DataFrame:
        """Return one row per service: ``lane``, ``gpu_pct``, ``service``, ``batch``, ``service_ms``, ``slowdown``, ``late``."""
        rows = [
            (number, lane.gpu_pct, p.service, p.batch, p.service_ms, slow, self.late[p.service])
            for number, lane in enumerate(self.lanes)
            for p, slow in zip(lane.points, lane.slowdown, strict=True)
        ]
        return pd.DataFrame(rows, columns=["lane", "gpu_pct", "service", "batch", "service_ms", "slowdown", "late"])


def share_lanes(plan: Plan, drop: bool = True, rates_rps: tuple[float, ...] | None = None) -> SharedLanes:
    """Choose who shares a lane with whom, and how wide each lane is, to make as few as possible late.

    Begins with a lane for each service and merges two at a time, going on with the few that do best, down to one
    lane for all. The best of all these is taken: the fewest late, of the service that suffers most and of all
    requests. Every lane gets what its rates need in full batches, then whoever suffers most is widened. Times are
    those beside all other lanes, busy with their longest batches.

    Parameters
    ----------
    plan : Plan
        Its ``contention`` says what launches cost each other, nothing if it is None.
    drop : bool
        Whether requests that are lost are given up; if not, rates that the lanes cannot sustain have no plan.
    rates_rps : tuple of float, optional
        Of each service. By default those of the plan's allocations, or with `drop` all that the services ask for.

    Raises
    ------
    InfeasiblePlan
        If the SLOs leave no lanes, or, without `drop`, the best ones do not keep up.
    """
    found = _share(plan, drop, rates_rps)
    if found is None or (not drop and found.fullest > 1 + EPSILON):
        asks = ", ".join(f"{s.name} at {a.rate_rps:g}/s within {s.slo_ms:g} ms" for s, a in _asked(plan))
        raise InfeasiblePlan(f"no lanes hold these services, slowed down as they are beside each other: {asks}; lower a rate")
    return found


@lru_cache(maxsize=64)
def _share(plan: Plan, drop: bool, rates_rps: tuple[float, ...] | None) -> SharedLanes | None:
    """Plans are compared by identity: one that is used for several seeds is thought through once."""
    planner = _Planner(plan, drop, COARSE, rates_rps)
    beam: list[_Groups] = [tuple((m,) for m in range(len(plan.services)))]
    found = [planner.tried(beam[0])]
    while len(beam[0]) > 1:
        pairs = list(combinations(range(len(beam[0])), 2))
        merged = sorted({_merged(groups, *pair) for groups in beam for pair in pairs}, key=planner.asked)
        if len(beam[0]) > MOST_LANES:
            beam = merged[:1]
            continue
        tried = [one for groups in merged[: PAIRS * len(beam)] if (one := planner.tried(groups)) is not None]
        tried.sort(key=planner.worse)
        found += tried[:BEAM]
        beam = [one.groups for one in tried[:BEAM]] or merged[:1]
    best = sorted([one for one in found if one is not None], key=planner.worse)[:BEAM]
    finer = _Planner(plan, drop, FINE, rates_rps)
    ways = [(planner, one) for one in best] + [(finer, one) for old in best if (one := finer.tried(old.groups)) is not None]
    if not ways:
        return None
    chosen, lanes = min(ways, key=lambda way: way[0].worse(way[1]))
    return chosen.lanes(lanes)


_Groups = tuple[tuple[int, ...], ...]


def _asked(plan: Plan) -> list[tuple[Service, Allocation]]:
    return list(zip(plan.services, plan.allocations, strict=True))


def _merged(groups: _Groups, i: int, j: int) -> _Groups:
    rest = [g for at, g in enumerate(groups) if at not in (i, j)]
    return tuple(sorted([*rest, tuple(sorted(groups[i] + groups[j]))]))


@dataclass(frozen=True, slots=True)
class _Tried:
    groups: _Groups
    widths: tuple[int, ...]  # position in the grid
    slow: tuple[tuple[float, ...], ...]  # by lane and member
    late: tuple[tuple[float, ...], ...]
    hopeless: tuple[float, ...]  # by lane
    fullest: float
    pain: float  # of lanes that make nobody late, the emptier have less


class _Planner:
    """Lanes of one plan; members are positions in its services, widths in `grid`."""

    def __init__(self, plan: Plan, drop: bool, grid: int, rates_rps: tuple[float, ...] | None = None) -> None:
        self.plan, self.drop = plan, drop
        self.contention = Contention(0) if plan.contention is None else plan.contention
        step = max(1, len(plan.shares) // grid)
        self.grid = plan.shares[::-1][::step][::-1]  # the widest among them
        self.slo = [s.slo_ms for s in plan.services]
        # a plan beyond the bound was sized for a part of the rates: what is given up, is given up here
        known = tuple(s.rate_rps if drop else a.rate_rps for s, a in _asked(plan))
        self.rate = known if rates_rps is None else rates_rps
        self.ms = [[[t.at(b, g) for b in range(1, t.batch_max + 1)] for g in self.grid] for t in plan.tables]
        self._late: dict[tuple[object, ...], tuple[tuple[float, ...], float]] = {}

    @cached_property
    def arrivals(self) -> list[list[float]]:
        """Poisson arrivals of each service, the same whenever a plan is made [ms]."""
        period = max(self.slo)
        rare = max([RAREST * 1000 / rate for rate in self.rate if rate], default=0.0)
        span = min(max(rare, PERIODS[0] * period), PERIODS[1] * period)
        span = min(span, max(IN_ALL * 1000 / max(sum(self.rate), EPSILON), period))
        drawn = []
        for m, rate in enumerate(self.rate):
            rng = np.random.default_rng(m)
            drawn.append(np.sort(rng.uniform(0, span, rng.poisson(rate * span / 1000))).tolist())
        return drawn

    def batch(self, m: int, width: int, slow: float) -> int:
        """Largest batch of which two take at most the SLO, at least 1: who just misses one is in time with the next."""
        return max(1, bisect_right(self.ms[m][width], self.slo[m] / (2 * slow)))

    def busy(self, group: tuple[int, ...], width: int, slow: tuple[float, ...]) -> float:
        """Part of time that a lane is busy with full batches; infinite if a single request takes too long."""
        part = 0.0
        for m, s in zip(group, slow, strict=True):
            if s * self.ms[m][width][0] > self.slo[m]:
                return INFINITE
            b = self.batch(m, width, s)
            part += self.rate[m] * s * self.ms[m][width][b - 1] / b / 1000
        return part

    def slowed(self, groups: _Groups, widths: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """Slowdown of each member of each lane while all other lanes run their longest batches, to a hundredth."""
        loads = []
        for group, w in zip(groups, widths, strict=True):
            mine = []
            for m in group:
                b = self.batch(m, w, 1.0)
                mine.append(Load(self.plan.tables[m], b, self.grid[w], self.ms[m][w][b - 1], self.grid[w]))
            loads.append(mine)
        longest = [max(mine, key=lambda load: load.service_ms) for mine in loads]
        found = []
        for i, mine in enumerate(loads):
            others = longest[:i] + longest[i + 1 :]
            found.append(tuple(round(self.contention.stretch([load, *others])[0], 2) for load in mine))
        return tuple(found)

    def least(self, groups: _Groups) -> tuple[float, tuple[int, ...], tuple[tuple[float, ...], ...]] | None:
        """How full the narrowest lanes are that fit together, their widths, and slowdowns; None if there are none."""
        even = [len(self.grid) * len(group) // len(self.slo) - 1 for group in groups]
        slow = self.slowed(groups, [max(w, 0) for w in even])
        busy = [[self.busy(g, w, s) for w in range(len(self.grid))] for g, s in zip(groups, slow, strict=True)]
        for full in FULLER:
            widths = [next((w for w, x in enumerate(row) if x <= full), None) for row in busy]
            if None not in widths:
                fit = tuple(w for w in widths if w is not None)
                if sum(self.grid[w] for w in fit) <= 100 + SLACK:
                    return full, fit, slow
        return None

    def asked(self, groups: _Groups) -> float:
        """How promising lanes are, the lower the better: how full they would be, then the share they ask for."""
        found = self.least(groups)
        return INFINITE if found is None else found[0] + sum(self.grid[w] for w in found[1]) / 1e4

    def late(self, group: tuple[int, ...], width: int, slow: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
        """Part of the requests of each member that is late, and which of `HOPELESS` that is with."""
        key = (group, width, slow)
        if key not in self._late:
            tried, fair = [], self.fair_ms(group, width, slow)
            for part in HOPELESS if self.drop else HOPELESS[:1]:
                riders = []
                for m, s in zip(group, slow, strict=True):
                    times, batch = [s * ms for ms in self.ms[m][width]], self.batch(m, width, s)
                    riders.append(Rider(self.arrivals[m], self.slo[m], batch, times, times[max(1, int(part * batch)) - 1]))
                tried.append((tuple(late_in_turns(riders, self.drop, fair)), part))
                if not any(tried[-1][0]):
                    break
            self._late[key] = min(tried, key=lambda one: self.pain(group, one[0]))
        return self._late[key]

    def fair_ms(self, group: tuple[int, ...], width: int, slow: tuple[float, ...]) -> float:
        """Period of the scoreboard of a lane that several share and that is far from keeping up, else 0."""
        return max(self.slo) if len(group) > 1 and self.busy(group, width, slow) > OVERLOAD else 0.0

    def pain(self, members: Sequence[int], late: Sequence[float]) -> float:
        """Late part of the service that suffers most, and of all requests."""
        rates = [self.rate[m] for m in members]
        return max(late) + sum(r * x for r, x in zip(rates, late, strict=True)) / max(sum(rates), EPSILON)

    def tried(self, groups: _Groups) -> _Tried | None:
        """Widen the narrowest lanes, that of whoever suffers most first, until the GPU is given out; None if there are none."""
        if (begin := self.least(groups)) is None:
            return None
        _, first, slow = begin
        widths, lanes = list(first), range(len(groups))

        def suffering(i: int, before: float = INFINITE) -> float:
            late = max(self.late(groups[i], widths[i], slow[i])[0]) if before > TIE * FULLER[-1] else 0.0
            return late + TIE * self.busy(groups[i], widths[i], slow[i])  # where nobody is late, wider makes nobody late

        suffers = [suffering(i) for i in lanes]
        while True:
            left = 100 + SLACK - sum(self.grid[w] for w in widths)
            can = [i for i in lanes if widths[i] + 1 < len(self.grid) and self.grid[widths[i] + 1] - self.grid[widths[i]] <= left]
            if not can:
                break
            i = max(can, key=lambda i: suffers[i])
            widths[i] += 1
            suffers[i] = suffering(i, suffers[i])
        slow = self.slowed(groups, widths)
        late, hopeless = zip(*(self.late(groups[i], widths[i], slow[i]) for i in lanes), strict=True)
        fullest = max(self.busy(groups[i], widths[i], slow[i]) for i in lanes)
        total = self.pain([m for group in groups for m in group], [x for part in late for x in part])
        return _Tried(groups, tuple(widths), slow, late, hopeless, fullest, total + TIE * fullest)

    def worse(self, tried: _Tried) -> tuple[bool, float]:
        """Rank of lanes, the lower the better: where nobody is given up, lanes that keep up come first."""
        return not self.drop and tried.fullest > 1 + EPSILON, round(tried.pain, 9)

    def lanes(self, tried: _Tried) -> SharedLanes:
        """Points of the lanes; what the grid left over goes to the lanes that suffer most."""
        plan, names = self.plan, [s.name for s in self.plan.services]
        shares = [self.grid[w] for w in tried.widths]
        for i in sorted(range(len(shares)), key=lambda i: -max(tried.late[i])):
            left = 100 - sum(shares) + shares[i]
            shares[i] = max([s for s in plan.shares if s <= left + SLACK], default=shares[i])
        made = []
        for group, share, width, slow, hopeless in zip(
            tried.groups, shares, tried.widths, tried.slow, tried.hopeless, strict=True
        ):
            points = []
            for m, s in zip(group, slow, strict=True):
                batch = self.batch(m, width, s)
                points.append(Allocation(names[m], share, batch, s * plan.tables[m].at(batch, share), self.rate[m]))
            made.append(SharedLane(share, tuple(points), slow, hopeless, self.fair_ms(group, width, slow)))
        late = {names[m]: x for g, part in zip(tried.groups, tried.late, strict=True) for m, x in zip(g, part, strict=True)}
        return SharedLanes(tuple(made), late, tried.fullest)
