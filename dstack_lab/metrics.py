"""Trace -> numbers: goodput, SLO attainment, latency quantiles, utilization and fairness.

With A the requests of a service that arrived in a run of T seconds, S the served and G those that
finished within the SLO: throughput = S/T, goodput = G/T, SLO attainment = G/A. Latency quantiles are
over S. Utilization is the mean over the run of min(GPU%, knee)/100, summed over launches.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dstack_lab.checks import non_negative, require
from dstack_lab.traces import Trace

ALL = "all"


def summary(trace: Trace, warm_up_ms: float = 0.0) -> pd.DataFrame:
    """Summarise a run: one row per service and one for all.

    Parameters
    ----------
    trace : Trace
    warm_up_ms : float
        Requests that arrive, and GPU time that is spent, before this time are left out [ms].

    Returns
    -------
    pandas.DataFrame
        Columns ``service``, ``throughput_rps``, ``goodput_rps``, ``slo_attainment`` (0 to 1),
        ``p50_ms``, ``p99_ms`` (NaN if nothing was served), ``utilization`` (0 to 1), ``mean_batch``,
        ``dropped`` and ``unserved`` (requests). A service's utilization is its part of the sum. Where a
        real GPU was sampled, for all together: ``sm_utilization`` (0 to 1, of the SMs by its own count)
        and ``energy_j`` (per served request, idle power included); NaN for a single service.
    """
    require(isinstance(trace, Trace), "trace", trace, "a Trace, as simulate and run return")
    non_negative("warm_up_ms", warm_up_ms)
    require(warm_up_ms < trace.duration_ms, "warm_up_ms", warm_up_ms, f"below the duration of {trace.duration_ms:g} ms")
    seconds = (trace.duration_ms - warm_up_ms) / 1000
    requests = trace.requests[trace.requests["arrival_ms"] >= warm_up_ms] if warm_up_ms else trace.requests
    busy = utilization(trace, warm_up_ms)
    slo = trace.services.set_index("service")["slo_ms"]
    rows = []
    parts = dict(list(requests.groupby("service", observed=False)))
    batches = trace.launches.groupby("service", observed=False)["batch"].mean()
    for name in [*slo.index, ALL]:
        part = requests if name == ALL else parts.get(name, requests.iloc[:0])
        latency = (part["finish_ms"] - part["arrival_ms"]).to_numpy()
        limit = part["service"].map(slo).to_numpy(dtype=float) if name == ALL else slo[name]
        done = latency[np.isfinite(latency)]
        good = int((latency <= limit + 1e-9).sum())
        outcome = part["outcome"].value_counts()
        rows.append(
            {
                "service": name,
                "throughput_rps": done.size / seconds,
                "goodput_rps": good / seconds,
                "slo_attainment": good / len(part) if len(part) else np.nan,
                "p50_ms": np.quantile(done, 0.5) if done.size else np.nan,
                "p99_ms": np.quantile(done, 0.99) if done.size else np.nan,
                "utilization": busy.sum() if name == ALL else busy.get(name, 0.0),
                "mean_batch": trace.launches["batch"].mean() if name == ALL else batches.get(name, np.nan),
                "dropped": int(outcome.get("dropped", 0)),
                "unserved": int(outcome.get("unserved", 0)),
            }
        )
    table = pd.DataFrame(rows)
    return table if trace.samples.empty else table.assign(**_sampled(trace, warm_up_ms, table["service"] == ALL))


def _sampled(trace: Trace, warm_up_ms: float, whole: pd.Series) -> dict[str, pd.Series]:
    """Columns of `summary` that a GPU's own counters give."""
    seen = trace.samples[trace.samples["time_ms"].between(warm_up_ms, trace.duration_ms)]
    energy = seen[["time_ms", "energy_j"]].dropna()
    joules = np.nan
    if len(energy) > 1:
        begin, end = energy["time_ms"].iloc[[0, -1]]
        served = int(trace.requests["finish_ms"].between(begin, end, inclusive="right").sum())
        joules = (energy["energy_j"].iloc[-1] - energy["energy_j"].iloc[0]) / served if served else np.nan
    return {"sm_utilization": (seen["sm_util_pct"].mean() / 100 * whole).where(whole), "energy_j": (joules * whole).where(whole)}


def utilization(trace: Trace, warm_up_ms: float = 0.0) -> pd.Series:
    """Mean of min(GPU%, knee)/100 over [warm_up_ms, duration_ms), by service."""
    runs = trace.launches
    start = runs["start_ms"].clip(warm_up_ms, trace.duration_ms)
    end = runs["end_ms"].clip(warm_up_ms, trace.duration_ms)
    area = (end - start) * np.minimum(runs["gpu_pct"], runs["knee_pct"]) / 100
    return area.groupby(runs["service"], observed=False).sum() / (trace.duration_ms - warm_up_ms)


def gpu_time(trace: Trace) -> pd.Series:
    """GPU%·ms that each service received."""
    runs = trace.launches
    return ((runs["end_ms"] - runs["start_ms"]) * runs["gpu_pct"]).groupby(runs["service"], observed=False).sum()


def jain(shares: ArrayLike) -> float:
    """Jain's fairness index of what each service received: 1 is equal, 1/n is all to one (Jain, Chiu, Hawe 1984).

    Parameters
    ----------
    shares : array_like, shape (n,)
        What each of n services received, in any one unit; 0 or more.

    Raises
    ------
    ValueError
        If there is nothing to compare, or a share is negative.
    """
    x = np.asarray(list(shares) if isinstance(shares, Iterable) else shares, dtype=float)
    require(x.ndim == 1 and x.size > 0 and bool((x >= 0).all()), "shares", x.tolist(), "1 or more numbers, each 0 or more")
    if not x.any():
        return 1.0
    x = x / x.max()  # squares of very small or large shares would leave the range of a float
    return float(x.sum() ** 2 / (x.size * (x**2).sum()))
