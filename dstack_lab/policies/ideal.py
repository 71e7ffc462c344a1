"""The ideal: every kernel at its own share of the GPU, changed at kernel boundaries at no cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import require
from dstack_lab.constraints import fits
from dstack_lab.policies.base import Decision, GpuState, Launch, Policy
from dstack_lab.policies.batching import drop_lost
from dstack_lab.services import Allocation, Plan, Service, ServiceTable

Array = NDArray[np.float64]
#: Prices of GPU time, from fastest to cheapest, at which every kernel chooses its share.
PRICES = np.concatenate(([0.0], np.geomspace(1e-3, 1e3, 60)))
SHARES = np.arange(1.0, 101.0)


class KernelTimes(Protocol):
    """What is asked of a network: a `kernel_model.KernelModel`, or one of your own."""

    def kernel_ms(self, batch: int, gpu_pct: Array) -> Array:
        """Time of each kernel [ms], shape (kernels, shares)."""


class Ideal(Policy):
    """Kernels, not batches, get shares; the earliest deadline first. What real schedulers are measured by.

    *Rule*, our own, of the ideal that the abstract of D-STACK (Dhakal, Kulkarni, Ramakrishnan, IEEE TCC
    2024) names: each kernel runs at the share where one more GPU% is worth its price, the same price for all
    kernels of a batch; the price is chosen so that a batch takes the mean share it was given. Shares
    change between kernels at no cost. Services launch earliest deadline first, with one batch each at a
    time, at the cheapest mean share that meets the SLO or at what is left of the GPU if that is in time.

    *What is simulated*: a launch holds its kernels' *mean* share for the time they take together, so that
    GPU% x time is exactly that of the kernels. That peaks of one network meet valleys of another is
    assumed, not shown, so it flatters this policy; no device can run it.
    Without `kernels` the plan's own service times are used: the ideal of whole batches, at any share.

    *Needs to know* every kernel. *Wins* wherever kernels of one network differ in what they can use.
    *Breaks* under overload: its order and its batches are a rule of thumb, not an optimum, so another
    policy may serve more. What no schedule can pass is `bound` with the same kernels, not this.

    Parameters
    ----------
    kernels : mapping of str to KernelModel, optional
        By model name, for every service.
    patience : float
        Part of its slack that the oldest request waits for a batch to fill.
    drop_late : bool
        Drop requests that can no longer meet their deadline: earliest deadline first is no ideal under
        overload if it serves what is lost before what can be saved.
    """

    def __init__(self, kernels: Mapping[str, KernelTimes] | None = None, patience: float = 0.25, drop_late: bool = True) -> None:
        self.kernels, self.patience, self.drop_late = kernels, patience, drop_late
        self._tables: dict[tuple[str, int], ServiceTable] = {}  # a second each to make, and the same for every run

    def rewrite(self, plan: Plan) -> Plan:
        """Plan of the same services with the service times of ideal launches, each at its cheapest feasible point.

        Raises
        ------
        ValueError
            If a service's kernels are unknown.
        """
        tables = []
        for service, table in zip(plan.services, plan.tables, strict=True):
            if self.kernels is None:
                tables.append(table)
                continue
            require(service.model in self.kernels, "kernels", sorted(self.kernels), f"with a model of {service.model}")
            key = (service.model, table.batch_max)
            if key not in self._tables:
                self._tables[key] = ideal_table(self.kernels[service.model], table.batch_max)
            tables.append(self._tables[key])
        points = tuple(cheapest(s, t, a) for s, t, a in zip(plan.services, tables, plan.allocations, strict=True))
        return replace(plan, tables=tuple(tables), allocations=points, shares=tuple(SHARES))

    def reset(self, plan: Plan) -> None:
        """Take the points of the rewritten plan."""
        self.share = {a.service: a.gpu_pct for a in plan.allocations}
        self.needs_pct = 1.0

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """Part of the slack."""
        return self.patience * max(slo_ms - allocation.service_ms, 0.0)

    def decide(self, state: GpuState) -> list[Decision]:
        """Launch what is ready, the nearest deadline first, each at its share or at what is left of the GPU."""
        if self.drop_late and (lost := drop_lost(state, self.share)):
            return lost
        launches: list[Decision] = []
        free = state.free_pct + 1e-6
        for view in sorted([s for s in state.services if s.ready and not s.in_flight], key=lambda s: s.due_ms):
            left = view.oldest_deadline_ms - state.now_ms
            share = min(self.share[view.name], float(int(free)))
            if share < 1:
                break
            batch = view.queued(view.batch_max)
            while batch > view.batch and view.service_ms(batch, share) > left:
                batch -= 1
            if share == self.share[view.name] or view.service_ms(batch, share) <= left:
                free -= share
                launches.append(Launch(view.name, share, batch))
        return launches

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """None: no device can change a share between kernels."""
        raise ValueError("policy = Ideal: must be simulated, no device can change a share between two kernels")


def ideal_table(kernels: KernelTimes, batch_max: int) -> ServiceTable:
    """Least time of a batch whose kernels, each at its own share, take a mean share of g."""
    rows = []
    for batch in range(1, batch_max + 1):
        times = kernels.kernel_ms(batch, SHARES)  # (kernels, shares)
        areas = times * SHARES
        chosen = [np.argmin(times + price / 100 * areas, axis=1) for price in PRICES]
        each = np.arange(len(times))
        whole = np.array([times[each, at].sum() for at in chosen])
        area = np.array([areas[each, at].sum() for at in chosen])
        rows.append(np.maximum(whole[:, None], area[:, None] / SHARES).min(axis=0))  # a smaller mean share: with pauses
    return ServiceTable(np.maximum.accumulate(np.array(rows), axis=0))


def cheapest(service: Service, table: ServiceTable, planned: Allocation) -> Allocation:
    """Feasible point of least GPU%·ms per request, the largest share of equally cheap ones; else the plan's."""
    batch, share = np.arange(1.0, table.batch_max + 1)[:, None], SHARES[None, :]
    good = fits(table.ms, batch, service.slo_ms, planned.rate_rps)
    if not good.any():
        good = 2 * table.ms <= service.slo_ms
    if not good.any():
        return replace(planned, service_ms=table.at(min(planned.batch, table.batch_max), planned.gpu_pct))
    cost = np.where(good, table.ms * share / batch, np.inf)
    least = np.argwhere(cost <= cost.min() * 1.02)
    b, g = max((int(b), int(g)) for b, g in least)
    return Allocation(planned.service, g + 1.0, b + 1, float(table.ms[b, g]), planned.rate_rps)
