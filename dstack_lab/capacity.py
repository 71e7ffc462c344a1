"""The highest load at which a policy keeps the SLO of every service."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dstack_lab.admission import STYLES
from dstack_lab.cells import run_cells
from dstack_lab.checks import positive, require
from dstack_lab.contention import Contention
from dstack_lab.metrics import ALL
from dstack_lab.policies.base import Policy
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Service
from dstack_lab.trials import checked_seeds, plan_for, trial
from dstack_lab.variability import Variability
from dstack_lab.workloads import load_of, scaled


@dataclass(frozen=True, slots=True)
class Tried:
    """One load that was tried.

    Parameters
    ----------
    load : float
        Part of the batch-level bound.
    attained : float
        Part of its requests that the worst service kept within SLO; 0 if the policy cannot schedule the load.
    worst : str
        That service.
    note : str
        Why the policy cannot schedule the load.
    """

    load: float
    attained: float
    worst: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class MaxLoad:
    """Highest load at which a policy keeps the SLO of every service.

    Parameters
    ----------
    policy : str
    load : float
        As a part of the batch-level bound; 0 if not even the lowest load that was tried holds.
    rates_rps : dict of str to float
        Rate of each service there [requests/s].
    attained : float
        Part of its requests that the worst service keeps within SLO there; NaN at load 0.
    bracket : tuple of float
        The load, and the lowest one above it that failed (NaN if none did): the truth lies between.
    sustained : float
        Highest load that was tried below which no load that was tried fails; below `load` if the policy
        fails at a low load and holds at a higher one.
    target : float
        What every service has to keep.
    evaluations : tuple of Tried
        All loads that were tried, ascending.
    admission : str
        Who turned requests away; see `admission.admitted`.
    """

    policy: str
    load: float
    rates_rps: dict[str, float]
    attained: float
    bracket: tuple[float, float]
    sustained: float
    target: float
    evaluations: tuple[Tried, ...]
    admission: str

    def to_frame(self) -> pd.DataFrame:
        """Return one row: the fields that are numbers or texts, ``fails_at`` and ``fails_because``."""
        failed = self._failed
        row = {
            "policy": self.policy,
            "admission": self.admission,
            "target": self.target,
            "max_load": self.load,
            "fails_at": self.bracket[1],
            "sustained": self.sustained,
            "attained": self.attained,
            "total_rps": sum(self.rates_rps.values()),
            "fails_because": "" if failed is None else _why(failed),
        }
        return pd.DataFrame([row])

    def _holds(self, tried: Tried) -> bool:
        return tried.attained >= self.target

    @property
    def _failed(self) -> Tried | None:
        return next((tried for tried in self.evaluations if tried.load == self.bracket[1]), None)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate:.4g}/s" for name, rate in self.rates_rps.items())
        failed = self._failed
        end = f"no load up to {self.load:.3g} fails" if failed is None else f"{failed.load:.3g} fails: {_why(failed)}"
        if not self.load:
            return f"{self.policy} keeps {self.target:.4g} of every service's requests within SLO at no load tried; {end}"
        lower = [
            f"{tried.load:.3g} ({_why(tried)})" for tried in self.evaluations if tried.load < self.load and not self._holds(tried)
        ]
        return (
            f"{self.policy} keeps {self.target:.4g} of every service's requests within SLO "
            f"up to load {self.load:.3g} of the bound ({rates}); {end}"
        ) + (f"; so does, below it, {', '.join(lower)}" if lower else "")


def max_load(
    policy: Policy,
    services: Iterable[Service],
    profile: Profile,
    attainment: float = 0.99,
    *,
    seeds: Iterable[int] = (0, 1, 2),
    duration_ms: float = 10_000.0,
    objective: str = "efficacy",
    variability: Variability | None = None,
    contention: Contention | None = None,
    told: bool = True,
    admission: str = "own",
    step: float = 0.1,
    high: float = 1.1,
    tolerance: float = 0.01,
    shares: Iterable[float] | None = None,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> MaxLoad:
    """Find the highest load at which every service keeps `attainment` of its requests within SLO.

    Parameters
    ----------
    policy : Policy
    services : iterable of Service
        Their rates are the mix; all are scaled together.
    profile : Profile
    attainment : float
        Between 0 and 1.
    seeds : iterable of int
        Requests of all seeds count together.
    duration_ms : float
        Of each run [ms].
    objective, variability, contention, told, admission, shares, folder, jobs, progress
        As for `compare`.
    step, high : float
        Loads step, 2 step, ... up to `high` are tried, then halfway between the highest that holds and the next.
    tolerance : float
        Width of the bracket to end with.

    Returns
    -------
    MaxLoad
        Loads are parts of the batch-level bound: at 1 the rates need the whole GPU at their best points.

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    PolicyError
        If the policy breaks a rule or raises.

    Notes
    -----
    Attainment need not fall evenly with the load: batches are whole, plans jump, runs are finite. Four
    things keep the answer meaningful. Every load sees the same unit-rate streams, so that two loads
    differ by the load and not by luck. The requests of all seeds are counted together. A load within two
    standard errors over seeds of the target is tried with as many seeds again, before it is judged. And
    all of the range is scanned before it is halved: a policy that fails at one low load is not
    judged by it alone, and ``sustained`` and the sentence say that it failed there.
    """
    services, runs = tuple(services), checked_seeds(seeds)
    require(isinstance(policy, Policy), "policy", policy, "a Policy object such as Temporal()")
    require(0 < attainment < 1, "attainment", attainment, "between 0 and 1")
    require(admission in STYLES, "admission", admission, f"one of {STYLES}")
    positive("step", step)
    require(high >= step, "high", high, f"at least the step of {step:g}")
    positive("tolerance", tolerance)
    shares = None if shares is None else tuple(shares)
    unit = load_of(services, profile, shares)
    more = tuple(range(max(runs) + 1, max(runs) + 1 + len(runs)))

    def counted(load: float, seeds: tuple[int, ...]) -> pd.DataFrame | str:
        """Requests and those in time by seed and service, or why there are none."""
        try:
            plan = plan_for(scaled(services, load / unit), profile, objective, shares, contention if told else None)
        except InfeasiblePlan as error:
            return str(error)
        calls = [(plan, policy, admission, duration_ms, seed, variability, contention) for seed in seeds]
        cells = run_cells(trial, calls, folder, jobs, progress, f"{policy.name} at {load:.3g}")
        for rows in cells:
            if "service" not in rows[0]:
                return str(rows[0]["note"])
        found = pd.concat([pd.DataFrame(rows).assign(seed=seed) for rows, seed in zip(cells, seeds, strict=True)])
        return found.loc[found["service"] != ALL, ["seed", "service", "requests", "in_time"]]

    def tried(load: float) -> Tried:
        found = counted(load, runs)
        if isinstance(found, pd.DataFrame) and _close(found, attainment):
            again = counted(load, more)
            found = pd.concat([found, again]) if isinstance(again, pd.DataFrame) else again
        if isinstance(found, str):
            return Tried(load, 0.0, "", found)
        total = found.groupby("service", sort=False)[["requests", "in_time"]].sum()
        none = total.index[total["requests"] == 0].tolist()
        if none:
            return Tried(load, float("nan"), ", ".join(none))
        rates = total["in_time"] / total["requests"]
        return Tried(load, float(rates.min()), str(rates.idxmin()))

    seen: list[Tried] = []
    for i in range(1, int(high / step * (1 + 1e-9)) + 1):
        seen.append(tried(round(i * step, 9)))
        here = f"longer: no request of {seen[-1].worst} came at load {seen[-1].load:.3g}"
        require(seen[-1].attained >= 0, "duration_ms", duration_ms, here)
    low = max((one.load for one in seen if one.attained >= attainment), default=0.0)
    fails = min((one.load for one in seen if one.load > low), default=float("nan"))
    while fails - low > tolerance:
        middle = (low + fails) / 2
        judged = tried(middle)
        if np.isnan(judged.attained):  # next to nothing is asked there: too little to judge
            break
        seen.append(judged)
        low, fails = (low, middle) if judged.attained < attainment else (middle, fails)
    seen.sort(key=lambda one: one.load)
    attained = next((one.attained for one in seen if one.load == low), float("nan"))
    rates = {s.name: s.rate_rps * low / unit for s in services}
    first = min((one.load for one in seen if one.attained < attainment), default=float("inf"))
    sustained = max((one.load for one in seen if one.load < first), default=0.0)
    return MaxLoad(policy.name, low, rates, attained, (low, fails), sustained, attainment, tuple(seen), admission)


def _close(found: pd.DataFrame, attainment: float) -> bool:
    """Whether chance over seeds could turn the judgement on the worst service."""
    total = found.groupby("service")[["requests", "in_time"]].sum()
    part = total["in_time"] / total["requests"]
    if not part.notna().any():
        return False
    mine = found[found["service"] == part.idxmin()]
    each = (mine["in_time"] / mine["requests"]).dropna()
    error = each.std() / len(each) ** 0.5 if len(each) > 1 else 0.0
    return bool(abs(part.min() - attainment) <= 2 * error)


def _why(tried: Tried) -> str:
    return tried.note or f"{tried.worst} keeps {tried.attained:.4g}"
