"""Bin packing of services on GPUs: a first placement, and a local search that evens it out.

A service's rate is cut into equal grains; a placement is a table of grains by GPU and service, so that every
rate is placed exactly once by construction. What is minimised is the *peak*: the demand of the busiest GPU,
then of the second busiest, and so on; at equal demands, the number of replicas.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dstack_lab.cluster.demand import HEAVY

Row = tuple[int, ...]

#: Demand of a full GPU [GPU%], with room for rounding.
FULL = 100 * (1 + 1e-9)

#: One more replica of a service has to lower the demand of the busier of two GPUs by this much [GPU%]: it costs memory, and
#: small parts of a rate make small batches.
REPLICA_GAIN_PCT = 3.0
#: Most orders in which services are placed one after the other.
ORDERS = 8


class Packing:
    """A placement being searched.

    Parameters
    ----------
    costs : numpy.ndarray, shape (kinds, services, grains + 1)
        Demand [GPU%] of so many grains of a service on a kind of GPU.
    which : sequence of int
        Kind of each GPU.
    most_replicas : int
        Most GPUs that one service may be on.
    alone : bool
        Whether a GPU may hold one service only.
    allowed : callable of (kind, row), optional
        Whether a GPU of a kind can hold the grains `row`; asked once for each, and only where the demands fit.
    """

    def __init__(
        self,
        costs: NDArray[np.float64],
        which: Sequence[int],
        most_replicas: int,
        alone: bool = False,
        allowed: Callable[[int, Row], bool] | None = None,
    ) -> None:
        self._costs = costs.tolist()
        self._which, self._most, self._alone, self._ask = tuple(which), most_replicas, alone, allowed
        self.services, self.grains = costs.shape[1], costs.shape[2] - 1
        self._cuts: dict[int, list[Row]] = {}
        self._known: dict[tuple[int, Row], float] = {}
        self._allowed: dict[tuple[int, Row], bool] = {}
        self._steps = [k for k in range(1, self.grains + 1) if self.grains % k == 0 or k < 4]

    def load(self, gpu: int, row: Row) -> float:
        """Demand of a GPU that holds `row` [GPU%]; above `HEAVY` if it cannot."""
        found = self._demand(gpu, row)
        return found if self._can(gpu, row) else found + HEAVY

    def _demand(self, gpu: int, row: Row) -> float:
        """As `load`, but for what `allowed` says."""
        kind = self._which[gpu]
        found = self._known.get((kind, row))
        if found is None:
            found = sum(cost[k] for cost, k in zip(self._costs[kind], row, strict=True) if k)
            barred = self._alone and sum(map(bool, row)) > 1
            if barred or any(all(a >= b for a, b in zip(row, cut, strict=True)) for cut in self._cuts.get(kind, ())):
                found += HEAVY
            self._known[kind, row] = found
        return found

    def _can(self, gpu: int, row: Row) -> bool:
        if self._ask is None or not any(row) or self._demand(gpu, row) > FULL:
            return True
        key = self._which[gpu], row
        if key not in self._allowed:
            self._allowed[key] = self._ask(*key)
        return self._allowed[key]

    @property
    def refused(self) -> bool:
        """Whether `allowed` ever said no."""
        return not all(self._allowed.values())

    def forbid(self, gpu: int, row: Row) -> None:
        """Bar GPUs of this kind from holding `row`, or more of it."""
        self._cuts.setdefault(self._which[gpu], []).append(row)
        self._known.clear()

    def peak(self, rows: Sequence[Row]) -> list[float]:
        """Demands, the highest first: what is minimised."""
        return sorted((round(self.load(g, row), 6) for g, row in enumerate(rows)), reverse=True)

    def best(self, parts: NDArray[np.float64] | None = None) -> list[Row]:
        """Best placement found from several starts.

        Parameters
        ----------
        parts : numpy.ndarray, shape (services, gpus), optional
            Part of each rate by GPU: one more start.
        """
        starts = [self.one_by_one(order) for order in self._orders()]
        if parts is not None:
            rounded = self._merged(self._rounded(parts))
            if all(sum(row[m] > 0 for row in rounded) <= self._most for m in range(self.services)):
                starts.append(rounded)
        return min([self.improve(rows) for rows in starts], key=self._worth)

    def _worth(self, rows: Sequence[Row]) -> tuple[float, list[float]]:
        """What makes a placement better than one from another start: the peak, and what replicas have to gain."""
        peak = self.peak(rows)
        return peak[0] + REPLICA_GAIN_PCT * sum(k > 0 for row in rows for k in row), peak

    def _merged(self, rows: list[Row]) -> list[Row]:
        """Put replicas together as long as that raises the peak by less than a replica has to gain."""
        peak, better = self.peak(rows)[0], True
        while better:
            better = False
            for m, gpu, other in itertools.product(range(self.services), range(len(rows)), range(len(rows))):
                if gpu != other and rows[gpu][m] and rows[other][m]:
                    tried = list(rows)
                    tried[gpu], tried[other] = _put(rows[gpu], m, 0), _put(rows[other], m, rows[gpu][m] + rows[other][m])
                    new = self.peak(tried)[0]
                    if new < peak + REPLICA_GAIN_PCT and (new <= FULL or new <= peak):
                        rows, peak, better = tried, new, True
        return rows

    def _orders(self) -> list[list[int]]:
        """Services by the least they ask for anywhere, the largest first; then each of the largest in front of the others."""
        asks = [min(kind[m][self.grains] for kind in self._costs) for m in range(self.services)]
        largest = sorted(range(self.services), key=lambda m: (-asks[m], m))
        return [[m, *(n for n in largest if n != m)] for m in largest[:ORDERS]]

    def one_by_one(self, order: Sequence[int]) -> list[Row]:
        """Each service, whole, where the demand is lowest then; the search splits what is too much for a GPU."""
        rows = [(0,) * self.services for _ in self._which]
        for m in order:
            options = [_put(row, m, self.grains) for row in rows]
            gpu = min(range(len(rows)), key=lambda g: (self.load(g, options[g]), g))
            rows[gpu] = options[gpu]
        return rows

    def _rounded(self, parts: NDArray[np.float64]) -> list[Row]:
        """Whole grains of each part, the rest to the largest remainders."""
        exact = parts * self.grains
        whole = np.floor(exact + 1e-9).astype(int)
        for m, left in enumerate(self.grains - whole.sum(axis=1)):
            for gpu in np.argsort(whole[m] - exact[m], kind="stable")[:left]:
                whole[m, gpu] += 1
        return [tuple(column) for column in whole.T.tolist()]

    def improve(self, rows: Sequence[Row]) -> list[Row]:
        """Move, swap, split and merge between two GPUs until no such step lowers the busier one's demand.

        Every step makes the sorted demands lexicographically smaller, so the search ends.
        """
        rows, better = list(rows), True
        while better:
            better = False
            for gpu in sorted(range(len(rows)), key=lambda g: (-self.load(g, rows[g]), g)):
                step = self._best_step(rows, gpu)
                if step is not None:
                    other, rows[gpu], rows[other] = step
                    better = True
                    break
        return rows

    def _best_step(self, rows: list[Row], gpu: int) -> tuple[int, Row, Row] | None:
        """Return the step from `gpu` to a less busy one that leaves the busier of them least; None if none is better."""
        here = self.load(gpu, rows[gpu])
        copies = [sum(row[m] > 0 for row in rows) for m in range(self.services)]
        better = []
        for other, row in enumerate(rows):
            there = self.load(other, row)
            if other == gpu or there > here:
                continue
            now = _key(here, there, 0)
            for mine, theirs, added in self._steps_between(rows[gpu], row, copies):
                a, b = self._demand(gpu, mine), self._demand(other, theirs)
                key = _key(a, b, added)
                if key < now and (added <= 0 or max(a, b) <= here - REPLICA_GAIN_PCT):
                    better.append((key, other, mine, theirs))
        # whether services can share a GPU is asked of the best first: it takes longer than all the rest
        for _, other, mine, theirs in sorted(better):
            if self._can(gpu, mine) and self._can(other, theirs):
                return other, mine, theirs
        return None

    def _steps_between(self, mine: Row, theirs: Row, copies: Sequence[int]) -> Iterator[tuple[Row, Row, int]]:
        """Pairs of rows that one step leads to, and how many replicas it adds."""
        for m, have in enumerate(mine):
            if not have:
                continue
            for k in {*(s for s in self._steps if s < have), have}:
                added = int(k < have) - int(theirs[m] > 0)
                if copies[m] + added <= self._most:
                    yield _put(mine, m, have - k), _put(theirs, m, theirs[m] + k), added
            for n, offer in enumerate(theirs):
                if offer and n != m:
                    left, right = _put(mine, m, 0), _put(theirs, n, 0)
                    merged = int(left[n] > 0) + int(right[m] > 0)
                    yield _put(left, n, left[n] + offer), _put(right, m, right[m] + have), -merged


def _put(row: Row, place: int, value: int) -> Row:
    return (*row[:place], value, *row[place + 1 :])


def _key(a: float, b: float, replicas: int) -> tuple[float, float, int]:
    return round(max(a, b), 6), round(min(a, b), 6), replicas
