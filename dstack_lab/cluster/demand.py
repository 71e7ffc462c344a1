"""What a part of a service's rate costs on a GPU, and whether what was put on a GPU can be scheduled there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dstack_lab.bounds import granted_shares, service_tables
from dstack_lab.constraints import fits, points
from dstack_lab.optimizer import optimize
from dstack_lab.policies.slot_plan import cut_slots
from dstack_lab.profiles import Profile
from dstack_lab.services import Plan, Service

Array = NDArray[np.float64]
METHODS = ("dstack", "temporal", "exclusive")

#: Added to the demand of what cannot be: above any real demand, and finite, so that a search sees what makes it less.
HEAVY = 1e6
#: A launch that may be in the way is of the batch that gathers in this part of its SLO.
BLOCK = 0.75
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


def plan_gpu(services: Sequence[Service], profile: Profile, method: str, objective: str) -> Plan:
    """Choose operating points on one GPU for services of the rates that it shall serve, for D-STACK with slots that keep up.

    Raises
    ------
    InfeasiblePlan
        If there are no operating points, or no slots hold them.
    """
    plan = optimize(services, profile, objective, shares_for(profile, services, method))
    if method == "dstack":
        cut_slots(plan, drop=False)
    return plan


class Deadlines:
    """Whether one launch at a time, earliest deadline first, keeps the deadlines of services that share a GPU.

    Parameters
    ----------
    services : sequence of Service
    profile : Profile
        Of the GPU; may lack some of the models.

    Notes
    -----
    The processor-demand test of non-preemptive earliest deadline first (Jeffay, Stanat, Martel 1991; George,
    Rivierre, Spuri 1996), for requests that come evenly at their rates. Batches of b come b/r apart, take L(b), and are
    due SLO - (b-1)/r after their last request. What is due until t, and the longest launch that may have begun before
    and is due later, must fit into t, for every t. That launch is of the batch that gathers in three quarters of its
    SLO: so long a service with a late deadline may wait for the others. Some batches that fill in a part of the SLO
    (`FILLS`) have to pass: a sufficient test. `Temporal` itself launches smaller batches when the GPU is idle, and
    its requests come unevenly.
    """

    def __init__(self, services: Sequence[Service], profile: Profile) -> None:
        self._slo_ms = np.array([s.slo_ms for s in services])
        self._ms: list[Array] = []
        for service in services:
            known = service.model in profile.models
            ms = np.full(1, np.inf)
            if known:
                share = shares_for(profile, services, "temporal")
                ms = points(service_tables([service], profile)[0], share)[0][:, 0]
                ms = ms[: max(1, int(np.searchsorted(2 * ms, service.slo_ms, side="right")))]  # no larger batch is launched
            self._ms.append(ms)

    def kept(self, rates_rps: Sequence[float]) -> bool:
        """Whether services of these rates [requests/s] keep their deadlines; a rate may be 0."""
        at = [m for m, rate in enumerate(rates_rps) if rate > 0]
        rate, slo = np.array([rates_rps[m] / 1000 for m in at]), self._slo_ms[at]
        largest = np.array([len(self._ms[m]) for m in at])
        block = self._cost(at, self._filled(BLOCK, slo, rate, largest))
        return any(self._fits(at, self._filled(fill, slo, rate, largest), rate, slo, block) for fill in FILLS)

    @staticmethod
    def _filled(fill: float, slo: Array, rate: Array, largest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Batch of each service that fills in a part of its SLO."""
        return np.minimum(np.maximum((fill * slo * rate).astype(np.int64), 1), largest)

    def _cost(self, at: Sequence[int], batch: NDArray[np.int64]) -> Array:
        return np.array([self._ms[m][b - 1] for m, b in zip(at, batch.tolist(), strict=True)])

    def _fits(self, at: Sequence[int], batch: NDArray[np.int64], rate: Array, slo: Array, block: Array) -> bool:
        cost, gap, due = self._cost(at, batch), batch / rate, slo - (batch - 1) / rate
        busy = float((cost / gap).sum())
        if busy > 1 or (cost > due).any():
            return False
        # from `catch_up` on demand stays behind time; close to busy = 1 that is far off: cut at 20 of the longest deadlines
        catch_up = float(((gap - due).clip(0) * cost / gap).sum()) / max(1 - busy, 1e-9)
        end = min(max(due.max(), catch_up), 20 * due.max())
        instants = np.concatenate([np.arange(x, end + 1e-9, y) for x, y in zip(due, gap, strict=True)])
        after = instants[:, None] - due
        needed = (np.floor(after / gap + 1e-9) + 1).clip(0) @ cost + np.where(after < 0, block, 0.0).max(axis=1)
        return bool((needed <= instants + 1e-9).all())
