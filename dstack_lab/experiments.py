"""Comparisons: policies under the same requests at several loads and seeds, and any function over a grid."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from dstack_lab.admission import STYLES
from dstack_lab.cells import Row, run_cells
from dstack_lab.checks import positive, require
from dstack_lab.contention import Contention
from dstack_lab.metrics import ALL, summary
from dstack_lab.policies import DStack, Policy, Temporal
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance, versions_here
from dstack_lab.services import InfeasiblePlan, Service
from dstack_lab.traces import Trace
from dstack_lab.trials import METRICS, checked_seeds, plan_for, trial
from dstack_lab.variability import Variability
from dstack_lab.workloads import load_of, scaled

#: Metrics compared with the baseline seed by seed: as a difference, and as a ratio.
GAINS = ("goodput_rps", "slo_attainment")
RATIOS = ("goodput_rps", "utilization", "p99_ms")
CONFIDENCE = 0.95


def compare(
    services: Iterable[Service],
    profile: Profile,
    policies: Iterable[Policy] | Mapping[str, Policy] | None = None,
    loads: Iterable[float] = (1.0,),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    duration_ms: float = 10_000.0,
    objective: str = "efficacy",
    variability: Variability | None = None,
    *,
    contention: Contention | None = None,
    told: bool = True,
    admission: str = "own",
    baseline: str = "Temporal",
    shares: Iterable[float] | None = None,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Simulate policies side by side: same services, same requests, several loads and seeds.

    Parameters
    ----------
    services : iterable of Service
        Such as ``lab.workload("C-4", profile, load=1)``: then `loads` are parts of the bound.
    profile : Profile
    policies : iterable of Policy or mapping of str to Policy, optional
        A mapping names them, as an ablation needs; Temporal and DStack by default.
    loads : iterable of float
        Each multiplies all rates; see `workloads.scaled`.
    seeds : iterable of int
        Of arrivals; every policy sees the same requests.
    duration_ms : float
        Of each run [ms].
    objective : {"efficacy", "capacity"}
        What operating points are chosen for. One plan per load, the same for all policies; beyond the
        bound it is sized for the part of the rates that can be served.
    variability : Variability, optional
        How service times scatter; see `simulate`.
    contention : Contention, optional
        What launches cost each other; see `simulate`.
    told : bool
        Whether the plans know of `contention`; see `optimize`.
    admission : {"own", "one rule"}
        Whether each policy turns requests away as its system does, or all drop late ones; see
        `admission.admitted`.
    baseline : str
        Name of the policy to compare with. Temporal is run if it is not among the policies.
    shares : iterable of float, optional
        GPU% that can be granted; those of the profile by default.
    folder : path, optional
        Where finished runs are kept. A call again, after an interrupt or with more policies, computes
        only what is missing; what depends on changed numbers or code is computed anew.
    jobs : int
        Processes; -1 for one per core.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row per ``policy``, ``load`` and ``service``, and one for "all". ``bound_load`` is the load as a
        part of the batch-level bound, ``requests`` how many came in all runs together and ``seeds`` how many
        runs there were. Means over seeds of ``throughput_rps``, ``goodput_rps``, ``slo_attainment``,
        ``p50_ms``, ``p99_ms``, ``utilization``, ``jain`` (of GPU time over services, for all) and
        ``bound_ratio``: goodput over ``bound_rps``, the most that could be served in time of the requests that
        came; of a service, if the GPU were its own. A burst just before the end can lift it above 1, by
        the longest SLO over the duration at most. Each with ``_low`` and ``_high``, the ends of a 95 %
        interval of the mean (Student's t; NaN with one seed). Against the baseline, seed by seed, with
        intervals likewise: ``goodput_rps_gain`` and ``slo_attainment_gain`` (difference),
        ``goodput_rps_ratio``, ``utilization_ratio`` and ``p99_ms_ratio``. ``admission``; ``note``: why a policy
        cannot schedule that load, its numbers are NaN then; ``provenance``, also in ``attrs``, which name the ``baseline`` too.

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    PolicyError
        If a policy breaks a rule or raises; runs finished before are kept in `folder`.
    """
    services = tuple(services)
    named = _named_policies(policies)
    runs = checked_seeds(seeds)
    factors = [positive("loads", load) for load in loads]
    require(0 < len(factors) == len(set(factors)), "loads", factors, "1 or more, each listed once")
    require(admission in STYLES, "admission", admission, f"one of {STYLES}")
    require(baseline in named or baseline == "Temporal", "baseline", baseline, f"'Temporal' or one of {list(named)}")
    shares = None if shares is None else tuple(shares)
    asked = load_of(services, profile, shares)
    plans, notes = {}, {}
    for factor in factors:
        try:
            plans[factor] = plan_for(scaled(services, factor), profile, objective, shares, contention if told else None)
        except InfeasiblePlan as error:
            notes[factor] = str(error)
    racing = named if baseline in named else {**named, baseline: Temporal()}
    keys = list(itertools.product(racing, plans, runs))
    calls = [(plans[load], racing[name], admission, duration_ms, seed, variability, contention) for name, load, seed in keys]
    cells = dict(zip(keys, run_cells(trial, calls, folder, jobs, progress, "Comparing"), strict=True))
    origin = _origin(profile)
    rows = []
    for name, load in itertools.product(named, factors):
        mine = [cells.get((name, load, seed), [{"note": notes.get(load)}]) for seed in runs]
        base = [cells.get((baseline, load, seed), [{}]) for seed in runs]
        for service in [*(s.name for s in services), ALL]:
            head = {"policy": name, "load": load, "service": service, "bound_load": load * asked, "admission": admission}
            rows.append({**head, **_row(_of(service, mine), _of(service, base)), "provenance": str(origin)})
    table = pd.DataFrame(rows)
    table.attrs.update(provenance=origin, baseline=baseline)
    return table


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return the mean and the ends of its interval (Student's t); a single value has no interval: NaN.

    Parameters
    ----------
    values : array_like
        Independent observations; with a NaN among them everything is NaN.
    confidence : float
        Between 0 and 1.
    """
    require(0 < confidence < 1, "confidence", confidence, "between 0 and 1")
    x = np.asarray(values, dtype=float)
    mean = float(x.mean()) if x.size else np.nan
    if x.size < 2:
        return mean, np.nan, np.nan
    half = float(stdtrit(x.size - 1, (1 + confidence) / 2) * x.std(ddof=1) / np.sqrt(x.size))
    return mean, mean - half, mean + half


def sweep(
    function: Callable[..., Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: bool = False,
    **grids: Iterable[Any] | Mapping[str, Any],
) -> pd.DataFrame:
    """Call a function at every point of a grid and collect what it returns in one table.

    Parameters
    ----------
    function : callable
        Takes one keyword argument per grid. Returns a number or text (column ``value``), a mapping of
        column to value, a DataFrame, a `Trace` (its summary) or something with ``to_frame()``.
    folder, jobs, progress
        As for `compare`. A result is kept by the function's code, what its code names, and the point.
    **grids : iterable or mapping
        Values of each argument; a mapping names values that have no short text of their own.

    Returns
    -------
    pandas.DataFrame
        The columns of the grids, in order, the last varying fastest, then those of the results. A value
        that is neither number nor text is shown by its name.

    Raises
    ------
    ValueError
        If a grid is empty or two of its values look alike; if a result holds more than numbers and texts.

    Examples
    --------
    >>> sweep(lambda slo_ms, rate_rps: slo_ms * rate_rps / 1000, slo_ms=[50, 100], rate_rps=[10, 20])
       slo_ms  rate_rps  value
    0      50        10    0.5
    1      50        20    1.0
    2     100        10    1.0
    3     100        20    2.0
    """
    require(callable(function), "function", function, "a callable")
    require(len(grids) > 0, "grids", (), "1 or more keyword arguments, such as slo_ms=[50, 100]")
    points = list(itertools.product(*(_labelled(name, grid) for name, grid in grids.items())))
    calls = [(function, {name: value for name, (_, value) in zip(grids, point, strict=True)}) for point in points]
    found = run_cells(_results, calls, folder, jobs, progress, "Sweeping")
    labels = [{name: label for name, (label, _) in zip(grids, point, strict=True)} for point in points]
    both = sorted({column for rows in found for row in rows for column in row} & set(grids))
    require(not both, "columns of the result", both, "other than the names of the grids")
    return pd.DataFrame([{**label, **row} for label, rows in zip(labels, found, strict=True) for row in rows])


def _named_policies(policies: Iterable[Policy] | Mapping[str, Policy] | None) -> dict[str, Policy]:
    policies = (Temporal(), DStack()) if policies is None else policies
    require(isinstance(policies, Iterable), "policies", policies, "Policy objects, or a mapping of name to Policy")
    pairs = list(policies.items()) if isinstance(policies, Mapping) else [(getattr(p, "name", ""), p) for p in policies]
    for _, policy in pairs:
        require(isinstance(policy, Policy), "policies", policy, "Policy objects such as Temporal()")
    names = [name for name, _ in pairs]
    require(len(names) > 0, "policies", names, "1 or more")
    require(len(set(names)) == len(names), "names of policies", names, "distinct: pass a mapping of name to Policy")
    return dict(pairs)


def _of(service: str, runs: list[list[Row]]) -> pd.DataFrame:
    """Return one row per run: a service's own, or the note of a run that could not be planned."""
    rows = [next((row for row in run if row.get("service", service) == service), {}) for run in runs]
    return pd.DataFrame(rows).reindex(columns=[*METRICS, "bound_rps", "requests", "note"])


def _row(mine: pd.DataFrame, base: pd.DataFrame) -> Row:
    """Means over seeds, their intervals, and what the baseline makes of the same requests."""
    values = {metric: mine[metric].to_numpy(dtype=float) for metric in METRICS}
    other = {metric: base[metric].to_numpy(dtype=float) for metric in (*GAINS, *RATIOS)}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {m: np.where(other[m] > 0, values[m] / other[m], np.nan) for m in RATIOS}
    columns = values | {f"{m}_gain": values[m] - other[m] for m in GAINS} | {f"{m}_ratio": r for m, r in ratios.items()}
    said = mine["note"].dropna()
    row: Row = {"seeds": int(mine["goodput_rps"].notna().sum()), "requests": mine["requests"].sum(min_count=1)}
    row["bound_rps"] = mine["bound_rps"].mean(skipna=False)
    for name, seen in columns.items():
        mean, low, high = mean_interval(seen)
        row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return {**row, "note": said.iloc[0] if len(said) else ""}


def _origin(profile: Profile) -> Provenance:
    """What `simulate` says of its traces."""
    made = profile.provenance
    return Provenance("simulated", made.device, "model", versions_here("dstack-lab", "numpy"), made.date, made.marks)


def _labelled(name: str, grid: Iterable[Any] | Mapping[str, Any]) -> list[tuple[Any, Any]]:
    listed = isinstance(grid, Iterable) and not isinstance(grid, str)
    require(listed, name, grid, "a list of values, or a mapping of name to value")
    pairs = list(grid.items()) if isinstance(grid, Mapping) else [(_label(value), value) for value in grid]
    labels = [label for label, _ in pairs]
    require(0 < len(labels) == len(set(labels)), name, labels, "1 or more values that look different; a mapping names them")
    return pairs


def _label(value: Any) -> Any:
    plain = value is None or isinstance(value, (bool, int, float, str, np.generic))
    return value if plain else str(getattr(value, "name", getattr(value, "__name__", value)))


def _results(function: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Row]:
    """Rows of what a swept function returned."""
    result = function(**arguments)
    if isinstance(result, Trace):
        result = summary(result)
    elif hasattr(result, "to_frame"):
        result = result.to_frame()
    if isinstance(result, pd.DataFrame):
        return [{str(name): value for name, value in row.items()} for row in result.to_dict("records")]
    return [dict(result)] if isinstance(result, Mapping) else [{"value": result}]
