"""What no schedule can pass: the least GPU%·ms that a request costs, and the most requests that fit into 100 %.

Two levels. A schedule that launches whole batches gives all kernels of a launch one share; an ideal
one gives each kernel its own. The second is the looser bound, and the one to name for an ideal scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import pandas as pd
from scipy.optimize import linprog

from dstack_lab.checks import percent, require
from dstack_lab.constraints import Array, points
from dstack_lab.gpu_model import fit
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Service, ServiceTable


class KernelTimes(Protocol):
    """What a kernel-level bound asks of a network: a `kernel_model.KernelModel`, or one of your own."""

    def kernel_ms(self, batch: int, gpu_pct: Array) -> Array:
        """Time of each kernel [ms], shape (kernels, shares)."""


class Grants(Protocol):
    """What a plan asks of a device."""

    def shares(self) -> Iterable[float]:
        """GPU% that can be granted."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What no schedule of one level can exceed.

    Parameters
    ----------
    rates_rps : dict of str to float
        Goodput of each service in the best mix [requests/s].
    area_pct_ms : tuple of float
        Least GPU%·ms per request of each service, over all points with L <= SLO.
    level : {"batch", "kernel"}
        Whether a launch has one share, or each of its kernels has its own.
    """

    rates_rps: dict[str, float]
    area_pct_ms: tuple[float, ...]
    level: str = "batch"

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


def bound(
    services: Iterable[Service],
    profile: Profile,
    shares: Iterable[float] | None = None,
    *,
    device: Grants | None = None,
    kernels: Mapping[str, KernelTimes] | None = None,
) -> Bound:
    """Return the provable upper bound on goodput, by linear programming.

    A request of service m costs at least a_m GPU%·ms. With x_m served in time per second, sum of
    x_m·a_m <= 100·1000 and x_m <= r_m, so the largest sum of x_m is a bound.

    Parameters
    ----------
    services : iterable of Service
    profile : Profile
        Holds every service's model; says how large a batch may be.
    shares : iterable of float, optional
        GPU% that can be granted; those of the device, else those of the profile, by default.
    device : Device, optional
        Its ``shares()`` are what can be granted.
    kernels : mapping of str to KernelModel, optional
        The kernels of every service's model: gives the kernel-level bound.

    Returns
    -------
    Bound

    Raises
    ------
    ValueError
        Naming the argument that does not fit; also if a kernel model knows only the batch it was traced at.
    InfeasiblePlan
        If a service meets its SLO at no point.

    Notes
    -----
    *Batch level*: a_m is the smallest g·L/b over the points with L <= SLO: a request in a batch that
    runs longer is late however it is scheduled. It holds for every schedule whose launches keep one of
    the shares from start to end, if the service times L are right.

    *Kernel level*: a_m is the smallest sum over kernels of min over g of g·t_k(b, g) / b, over the
    batches with sum over kernels of min over g of t_k(b, g) <= SLO: a batch whose kernels, each at its
    fastest share, take longer is late. It holds for every schedule that runs a batch's kernels one after
    the other, each at one of the shares, at any pause or change between them, if the kernel times are
    right. It does not hold for a scheduler that runs kernels of one batch side by side, changes a share
    inside a kernel or re-forms batches between kernels. If the service time of a batch is at least the
    sum of its kernels' times at the same share, as in a profile simulated from the same models, it is
    never below the batch level, but for the error of `fit`; a profile from elsewhere may disagree with
    the models. The two meet where the SLO is so loose that every kernel is cheapest at the smallest share.
    """
    found = checked_services(services, profile)
    granted = granted_shares(profile, found, shares, device)
    tables = service_tables(found, profile)
    return bound_of(found, tables, granted) if kernels is None else _kernel_bound(found, tables, granted, kernels)


def bound_of(services: Sequence[Service], tables: Sequence[ServiceTable], shares: Sequence[float]) -> Bound:
    """Batch-level bound of checked services on their tables; see `bound`."""
    areas = []
    for service, table in zip(services, tables, strict=True):
        ms, batch, share = points(table, shares)
        good = ms <= service.slo_ms
        if not good.any():
            raise InfeasiblePlan(too_slow(service, service.rate_rps, float(ms[0, -1]), shares[-1]))
        areas.append(float((share * ms / batch)[good].min()))
    return Bound(_most(services, areas), tuple(areas))


def _kernel_bound(
    services: Sequence[Service], tables: Sequence[ServiceTable], shares: Sequence[float], kernels: Mapping[str, KernelTimes]
) -> Bound:
    require(isinstance(kernels, Mapping), "kernels", kernels, "a dict of model name to KernelModel")
    share = np.asarray(shares)
    floors: dict[str, list[tuple[float, float]]] = {}
    for service, table in zip(services, tables, strict=True):
        if service.model not in floors:
            floors[service.model] = _floors(service.model, kernels, table.batch_max, share)
    areas = []
    for service in services:
        good = [area for ms, area in floors[service.model] if ms <= service.slo_ms]
        if not good:
            raise InfeasiblePlan(too_slow(service, service.rate_rps, floors[service.model][0][0], shares[-1]))
        areas.append(min(good))
    return Bound(_most(services, areas), tuple(areas), "kernel")


def _floors(name: str, kernels: Mapping[str, KernelTimes], batch_max: int, share: Array) -> list[tuple[float, float]]:
    """Least time [ms] and least GPU%·ms per request at each batch, every kernel at its own best share for that."""
    require(name in kernels, "kernels", sorted(kernels), f"a mapping that holds {name}: every model needs its kernels")
    model = kernels[name]
    require(callable(getattr(model, "kernel_ms", None)), f"kernels[{name!r}]", model, "a KernelModel")
    floors = []
    for batch in range(1, batch_max + 1):
        ms = np.asarray(model.kernel_ms(batch, share))
        shaped = ms.ndim == 2 and ms.shape[1] == len(share)
        require(shaped, f"shape of kernel_ms of {name} at batch {batch}", ms.shape, f"(kernels, {len(share)})")
        wrong = ms[~(ms >= 0) | np.isinf(ms)]
        require(not len(wrong), f"kernel_ms of {name} at batch {batch}", wrong[0] if len(wrong) else 0.0, "finite, 0 or more")
        floors.append((float(ms.min(axis=1).sum()), float((share * ms).min(axis=1).sum()) / batch))
    return floors


def _most(services: Sequence[Service], areas: Sequence[float]) -> dict[str, float]:
    limits = [(0.0, s.rate_rps) for s in services]
    solved = linprog([-1.0] * len(limits), A_ub=[list(areas)], b_ub=[100_000.0], bounds=limits, method="highs")
    return {s.name: float(x) for s, x in zip(services, np.asarray(solved.x), strict=True)}


def service_tables(services: Sequence[Service], profile: Profile) -> tuple[ServiceTable, ...]:
    """Dense service times of each service's model, from the GPU% model fitted to `profile`."""
    return tuple(_table(profile, service.model) for service in services)


@lru_cache(maxsize=256)
def _table(profile: Profile, model: str) -> ServiceTable:
    """Fit once per profile object: comparisons plan the same services over and over."""
    batch = np.arange(1, int(profile.of(model)["batch"].max()) + 1)[:, None]
    return ServiceTable(np.asarray(fit(profile, model).predict(batch, np.arange(1, 101)[None, :])))


def checked_services(services: Iterable[Service], profile: Profile) -> tuple[Service, ...]:
    """Return the services, each of a model in the profile, with distinct names."""
    require(isinstance(services, Iterable), "services", services, "an iterable of Service objects")
    require(isinstance(profile, Profile), "profile", profile, "a Profile")
    found, models = tuple(services), profile.models
    require(len(found) > 0, "services", found, "1 or more")
    for service in found:
        require(isinstance(service, Service), "services", service, "Service objects")
        require(service.model in models, f"model of {service.name}", service.model, f"one of {', '.join(models)}")
    names = [s.name for s in found]
    require(len(set(names)) == len(names), "service names", names, "distinct: give each Service a name of its own")
    return found


def granted_shares(
    profile: Profile, services: Sequence[Service], shares: Iterable[float] | None, device: Grants | None
) -> tuple[float, ...]:
    """GPU% to choose from, ascending: `shares`, which the device must grant; else the device's; else the profile's."""
    offered: tuple[float, ...] = ()
    if device is not None:
        grants = None if isinstance(device, type) else getattr(device, "shares", None)
        require(callable(grants), "device", device, "a device: an object whose shares() are the GPU% it grants")
        # one core of 128 is a share, but below the 1 % where service times begin
        offered = _percents("device.shares()", [s for s in device.shares() if not s < 1])
    if shares is not None:
        asked = _percents("shares", shares)
        for share in asked if offered else ():
            allowed = f"granted by the device: one of {', '.join(f'{s:g}' for s in offered)}"
            require(share in offered, "shares", share, allowed)
        return asked
    if offered:
        return offered
    rows = profile.table[profile.table["model"].isin([s.model for s in services])]
    return tuple(sorted(float(s) for s in rows["gpu_pct"].unique()))


def _percents(field: str, shares: Iterable[float]) -> tuple[float, ...]:
    require(isinstance(shares, Iterable), field, shares, "an iterable of GPU% from 1 to 100")
    found = tuple(sorted({percent(field, share) for share in shares}))
    require(len(found) > 0, field, found, "1 or more GPU% from 1 to 100")
    return found


def too_slow(service: Service, rate_rps: float, fastest_ms: float, share: float, launches: int = 1) -> str:
    """Say which service asks for what, and what one request takes at best."""
    need = f"{launches} x " if launches > 1 else ""
    return (
        f"{service.name} asks for slo_ms = {service.slo_ms:g} at {rate_rps:g}/s, but no batch and share meet it: "
        f"one request takes {need}{fastest_ms:.2f} ms at {share:g} GPU%; relax the SLO or lower the rate"
    )
