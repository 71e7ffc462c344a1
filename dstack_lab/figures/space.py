"""Where launches lie on the GPU: places for exact pictures, means for dense ones. Plain numbers, no drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.checks import count, instance, positive, require
from dstack_lab.traces import Trace

Floats = NDArray[np.float64]

#: Shares such as 33.33 leave gaps that are rounding and not room [GPU%].
_DUST = 1e-6


@dataclass(frozen=True, slots=True)
class Window:
    """Stretch of a run that is drawn, [start_ms, end_ms)."""

    start_ms: float
    end_ms: float
    run_ms: float

    def __str__(self) -> str:
        start, end, run = (f"{t:,.0f}" if t >= 100 else f"{t:.4g}" for t in (self.start_ms, self.end_ms, self.run_ms))
        if self.end_ms - self.start_ms >= self.run_ms:
            return f"all {run} ms"
        return f"first {end} of {run} ms" if self.start_ms <= 0 else f"{start} to {end} of {run} ms"


def window(trace: Trace, start_ms: float | None = None, end_ms: float | None = None, default_ms: float = 500.0) -> Window:
    """Check a window; without an end it is `default_ms` long, or ends with the run.

    Raises
    ------
    ValueError
        If it is empty or lies outside the run. A run ends with its last launch, which may be after
        the last arrival.
    """
    instance("trace", trace, Trace, "a Trace, as simulate and run return")
    last = float(trace.launches["end_ms"].max()) if len(trace.launches) else 0.0
    run = max(float(trace.duration_ms), last)
    start = 0.0 if start_ms is None else float(start_ms)
    require(0 <= start < run, "start_ms", start_ms, f"from 0 to below the run's end at {run:g} ms")
    end = min(start + positive("default_ms", default_ms), run) if end_ms is None else float(end_ms)
    require(start < end <= run, "end_ms", end_ms, f"above start_ms = {start:g} and at most the run's end at {run:g} ms")
    return Window(start, end, run)


def late_requests(trace: Trace) -> pd.Series:
    """Number of requests of each launch that finished after their SLO, by launch number."""
    slo = trace.services.set_index("service")["slo_ms"].astype(float)
    served = trace.requests[trace.requests["launch"] >= 0]
    late = served["finish_ms"] - served["arrival_ms"] > served["service"].astype(object).map(slo).astype(float) + 1e-9
    counts = late.groupby(served["launch"]).sum()
    return counts.reindex(trace.launches["launch"], fill_value=0).astype(np.int64)


def visible(trace: Trace, view: Window) -> pd.DataFrame:
    """Launches that run inside the window, by start, with a column ``late`` (requests that finished too late)."""
    runs = trace.launches
    inside = ((runs["start_ms"] < view.end_ms) & (runs["end_ms"] > view.start_ms)).to_numpy()
    late = late_requests(trace).to_numpy()
    return runs.assign(late=late)[inside].sort_values(["start_ms", "launch"], ignore_index=True)


def place(launches: pd.DataFrame) -> pd.DataFrame:
    """Give each launch a place on the GPU% axis: a picture of shares, not of which SMs ran it.

    A launch takes the place its service had last if that is free, else the lowest gap that holds it;
    where no single gap is wide enough it is cut over several. Only launches that together hold more
    than 100 GPU% rise above 100.

    Parameters
    ----------
    launches : pandas.DataFrame
        Columns ``service``, ``start_ms``, ``end_ms`` and ``gpu_pct``, sorted by ``start_ms``.

    Returns
    -------
    pandas.DataFrame
        One row per piece: ``row`` (position in `launches`), ``low_pct`` and ``high_pct``. Pieces
        never overlap; those of one launch add up to its share.
    """
    instance("launches", launches, pd.DataFrame, "a pandas DataFrame such as trace.launches")
    running: list[tuple[float, float, float]] = []  # end, low, high
    home: dict[object, float] = {}
    pieces: list[tuple[int, float, float]] = []
    columns = (launches[c].to_numpy() for c in ("service", "start_ms", "end_ms", "gpu_pct"))
    for row, (service, start, end, share) in enumerate(zip(*columns, strict=True)):
        running = [piece for piece in running if piece[0] > start]
        gaps = _gaps([(low, high) for _, low, high in running])
        found = _fit(gaps, float(share), home.get(service, 0.0))
        home[service] = found[0][0]
        pieces += [(row, low, high) for low, high in found]
        running += [(end, low, high) for low, high in found]
    return pd.DataFrame(pieces, columns=["row", "low_pct", "high_pct"]).astype(
        {"row": np.int64, "low_pct": float, "high_pct": float}
    )


def _gaps(taken: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Free stretches between pieces, from below; the last has no end."""
    free, top = [], 0.0
    for low, high in sorted(taken):
        if low - top > _DUST:
            free.append((top, low))
        top = max(top, high)
    return [*free, (top, np.inf)]


def _fit(gaps: list[tuple[float, float]], share: float, home: float) -> list[tuple[float, float]]:
    within = [(low, min(high, 100 + 1e-3)) for low, high in gaps]
    for low, high in within:
        if low - _DUST <= home and home + share <= high + _DUST:
            return [(max(low, home), max(low, home) + share)]
    for low, high in within:
        if low + share <= high + _DUST:
            return [(low, low + share)]
    found = []
    for low, high in gaps:
        part = min(share, high - low)
        found.append((low, low + part))
        share -= part
        if share <= _DUST:
            break
    return found


def raster(trace: Trace, start_ms: float, end_ms: float, columns: int = 900) -> tuple[Floats, Floats]:
    """Mean GPU% that each service held, in equal slices of time: exact for any number of launches.

    Parameters
    ----------
    trace : Trace
    start_ms, end_ms : float
        Window [ms].
    columns : int
        Number of slices.

    Returns
    -------
    edges_ms : numpy.ndarray, shape (columns + 1,)
    held_pct : numpy.ndarray, shape (services, columns)
        In the order of ``trace.services``; times the width of a slice it is GPU%·ms.

    Raises
    ------
    ValueError
        If the window is empty or `columns` is below 1.
    """
    instance("trace", trace, Trace, "a Trace, as simulate and run return")
    require(end_ms > start_ms, "end_ms", end_ms, f"above start_ms = {start_ms:g}")
    edges = np.linspace(start_ms, end_ms, count("columns", columns) + 1)
    runs, names = trace.launches, list(trace.services["service"])
    held = np.zeros((len(names), columns))
    for i, name in enumerate(names):
        mine = runs[runs["service"] == name]
        start, end, share = (mine[c].to_numpy(dtype=float) for c in ("start_ms", "end_ms", "gpu_pct"))
        # area held before each edge: the ramps that began less the ramps that ended
        area = _ramps(start - start_ms, share, edges - start_ms) - _ramps(end - start_ms, share, edges - start_ms)
        held[i] = np.maximum(np.diff(area), 0) / np.diff(edges)
    return edges, held


def _ramps(begin: Floats, slope: Floats, at: Floats) -> Floats:
    """Sum of ``slope * max(at - begin, 0)`` over all ramps, shape of `at`."""
    order = np.argsort(begin, kind="stable")
    slopes = np.concatenate([[0.0], np.cumsum(slope[order])])
    offsets = np.concatenate([[0.0], np.cumsum((slope * begin)[order])])
    n = np.searchsorted(begin[order], at, side="right")
    return np.asarray(slopes[n] * at - offsets[n])
