"""Workloads for comparisons: which networks, under which SLO, at which part of what a GPU can serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from dstack_lab.arrivals import Arrivals, Deterministic, Drift, Gamma, Poisson, Replay, Steps, Times
from dstack_lab.bounds import bound
from dstack_lab.checks import positive, require
from dstack_lab.profiles import Profile
from dstack_lab.services import Service

_ALL = {
    "resnet50": 50.0,
    "vgg19": 100.0,
    "mobilenet_v2": 25.0,
    "alexnet": 25.0,
    "resnet18": 25.0,
    "inception_v3": 50.0,
    "resnext50_32x4d": 100.0,
}
#: Name -> network -> SLO [ms]; each holds the ones before it.
WORKLOADS = {f"C-{n}": dict(list(_ALL.items())[:n]) for n in (2, 3, 4, 7)}
SPLITS = ("equal_time", "equal_rate")
#: Coefficient of variation of bursty arrivals.
BURSTY_CV = 3.0
#: A rate doubles at the first instant and falls to half of what it was at the second [ms].
DOUBLE_MS, HALVE_MS = 5_000.0, 10_000.0


def workload(
    name: str,
    profile: Profile,
    load: float = 0.8,
    split: str = "equal_time",
    arrivals: str | Callable[[float], Arrivals] = "poisson",
    shares: Iterable[float] | None = None,
) -> tuple[Service, ...]:
    """Return the services of a workload, at a part of what any schedule could serve.

    Parameters
    ----------
    name : {"C-2", "C-3", "C-4", "C-7"}
        How many networks; see `WORKLOADS`.
    profile : Profile
        Holds them all.
    load : float
        Sum of rate x smallest area over the whole GPU; at 1 the batch-level `bound` is met exactly.
    split : {"equal_time", "equal_rate"}
        Rates inverse to the area of a request, so that each service asks for the same GPU time, or the
        same rate for each.
    arrivals : {"poisson", "gamma", "steps"} or callable
        Poisson; bursty, with gamma-distributed gaps of cv 3; or Poisson where the first service's rate
        doubles from 5 s to 10 s and is half of what it was from then on. A callable makes an arrival process
        from a rate [requests/s].
    shares : iterable of float, optional
        GPU% that can be granted; those of the profile by default.

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    InfeasiblePlan
        If a service meets its SLO at no batch and share.
    """
    require(name in WORKLOADS, "name", name, f"one of {', '.join(WORKLOADS)}")
    require(split in SPLITS, "split", split, f"one of {SPLITS}")
    known = isinstance(arrivals, str) and arrivals in ("poisson", "gamma", "steps")
    require(known or callable(arrivals), "arrivals", arrivals, "'poisson', 'gamma', 'steps' or a callable of the rate")
    budget = 100_000 * positive("load", load)
    asked = [Service(model, slo, Poisson(1.0)) for model, slo in WORKLOADS[name].items()]
    areas = bound(asked, profile, shares).area_pct_ms
    rates = [budget / len(areas) / a if split == "equal_time" else budget / sum(areas) for a in areas]

    def process(place: int, rate: float) -> Arrivals:
        if callable(arrivals):
            return arrivals(rate)
        if arrivals == "gamma":
            return Gamma(rate, BURSTY_CV)
        if arrivals == "steps" and place == 0:
            return Steps(((0.0, rate), (DOUBLE_MS, 2 * rate), (HALVE_MS, rate / 2)))
        return Poisson(rate)

    return tuple(replace(s, arrivals=process(i, rate)) for i, (s, rate) in enumerate(zip(asked, rates, strict=True)))


@dataclass(frozen=True, slots=True)
class Faster:
    """Another arrival process, sped up in time.

    Parameters
    ----------
    arrivals : Arrivals
    factor : float
        Time runs this many times as fast; above 0.
    """

    arrivals: Arrivals
    factor: float

    def __post_init__(self) -> None:
        positive("factor", self.factor)

    @property
    def rate_rps(self) -> float:
        """Rate of the process, times the factor [requests/s]."""
        return self.arrivals.rate_rps * self.factor

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]."""
        return self.arrivals.sample(duration_ms * self.factor, rng) / self.factor


def scaled(services: Iterable[Service], factor: float) -> tuple[Service, ...]:
    """Return the services with every rate multiplied by `factor`.

    Rates of Poisson, gamma, even and stepped arrivals change, the times of the steps stay. Recorded
    arrivals, and processes of your own, run faster: a recording of 60 s at factor 2 lasts 30 s. The same
    seed draws the same unit-rate stream at every factor.

    Parameters
    ----------
    services : iterable of Service
    factor : float
        Above 0.

    Raises
    ------
    ValueError
        If `factor` is not above 0.
    """
    positive("factor", factor)
    return tuple(replace(service, arrivals=_scaled(service.arrivals, factor)) for service in services)


def _scaled(arrivals: Arrivals, factor: float) -> Arrivals:
    if isinstance(arrivals, (Poisson, Gamma, Deterministic)):
        return replace(arrivals, rate_rps=arrivals.rate_rps * factor)
    if isinstance(arrivals, Steps):
        return Steps(tuple((start, rate * factor) for start, rate in arrivals.steps))
    if isinstance(arrivals, Drift):
        return Drift(tuple((at, rate * factor) for at, rate in arrivals.points))
    if isinstance(arrivals, Replay):
        return Replay(arrivals.times_ms / factor)
    return Faster(arrivals, factor)


def load_of(services: Iterable[Service], profile: Profile, shares: Iterable[float] | None = None) -> float:
    """Return the GPU time that the rates need at least, as a part of the whole GPU; above 1 no schedule serves them.

    Stepped arrivals count with their highest rate.
    """
    services = tuple(services)
    areas = bound(services, profile, shares).area_pct_ms
    return sum(s.rate_rps * a for s, a in zip(services, areas, strict=True)) / 100_000
