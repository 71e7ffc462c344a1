"""The search for a placement whose every GPU can be scheduled: even it out, see what cannot be, bar that, go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dstack_lab.arrivals import Poisson
from dstack_lab.cluster.demand import Deadlines, plan_gpu
from dstack_lab.cluster.gpus import Cluster
from dstack_lab.cluster.packing import FULL, Packing, Row
from dstack_lab.services import InfeasiblePlan, Plan, Service

#: How often the search goes on around GPUs whose services no slots hold: too slow to be asked at every step.
ROUNDS = 10


class Search:
    """One search, for a scheduler that shall bear `headroom` times the rates.

    Attributes
    ----------
    rows : list of tuple of int
        Grains by GPU and service of the last placement looked at.
    refused : bool
        Whether one was found whose demands fit and which could not be scheduled.
    """

    def __init__(
        self,
        services: tuple[Service, ...],
        cluster: Cluster,
        method: str,
        objective: str,
        headroom: float,
        costs: NDArray[np.float64],
        most_replicas: int,
    ) -> None:
        self._services, self._method, self._objective = services, method, objective
        self._profiles, (kinds, self._which) = cluster.profiles(), cluster.kinds()
        self._headroom, self._grains = headroom, costs.shape[2] - 1
        self._deadlines = [Deadlines(services, kind) for kind in kinds] if method == "temporal" else []
        allowed = self._keeps_deadlines if self._deadlines else None
        self._packing = Packing(costs, self._which, most_replicas, method == "exclusive", allowed)
        self._planned: set[tuple[int, Row]] = set()
        self.rows: list[Row] = []
        self.refused = False

    def run(self, parts: NDArray[np.float64] | None) -> list[Row] | None:
        """Return grains by GPU and service; None if no placement was found."""
        packing = self._packing
        self.rows = packing.best(parts)
        for _ in range(ROUNDS):
            if packing.peak(self.rows)[0] > FULL:  # what was barred last has no way out nearby
                self.rows = packing.best(parts)
            if packing.peak(self.rows)[0] > FULL:
                break
            bad = [(gpu, row) for gpu, row in enumerate(self.rows) if not self._plannable(gpu, row)]
            if not bad:
                return self.rows
            self.refused = True
            for gpu, row in bad:
                packing.forbid(gpu, row)
            self.rows = packing.improve(self.rows)
        self.refused = self.refused or packing.refused
        return None

    def plan(self, gpu: int, row: Row, headroom: float = 1.0) -> Plan | None:
        """Plan of a GPU at so many times its rates; None if there is none."""
        # planned as Poisson streams of the replica's rate: what a replica receives of another process is not one of its kind
        mine = [
            replace(s, arrivals=Poisson(s.rate_rps * k / self._grains)) for s, k in zip(self._services, row, strict=True) if k
        ]
        try:
            return plan_gpu(sped_up(mine, headroom), self._profiles[gpu], self._method, self._objective)
        except InfeasiblePlan:
            return None

    def _plannable(self, gpu: int, row: Row) -> bool:
        key = self._which[gpu], row
        if any(row) and key not in self._planned:
            # other methods have nothing to plan but operating points, which more than the rates need not have
            if self.plan(gpu, row, self._headroom if self._method == "dstack" else 1.0) is None:
                return False
            self._planned.add(key)
        return True

    def _keeps_deadlines(self, kind: int, row: Row) -> bool:
        rates = [self._headroom * s.rate_rps * k / self._grains for s, k in zip(self._services, row, strict=True)]
        return self._deadlines[kind].kept(rates)


def sped_up(services: Iterable[Service], factor: float) -> tuple[Service, ...]:
    """Return the services as Poisson streams of so many times their rates."""
    return tuple(replace(s, arrivals=Poisson(s.rate_rps * factor)) for s in services)
