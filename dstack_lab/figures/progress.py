"""A run while it runs: requests in time, latency and shares, second by second."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dstack_lab.checks import count, instance
from dstack_lab.figures import style
from dstack_lab.figures.space import raster
from dstack_lab.traces import Trace

PANES = {"in_time_rps": "In time [requests/s]", "latency_ms": "Median latency [ms]", "held_pct": "Share held [GPU%]"}


@dataclass(frozen=True, slots=True)
class Progress:
    """What happened so far.

    Parameters
    ----------
    title, origin : str
    services : tuple of str
    seconds : numpy.ndarray, shape (n,)
        Ends of the equal slices of time [s].
    values : dict of str to numpy.ndarray
        Keys of `PANES`, each (services, n); NaN where a service had nothing.
    length_s : float
        Planned length of the run.
    """

    title: str
    origin: str
    services: tuple[str, ...]
    seconds: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    length_s: float


def replay(trace: Trace, slices: int = 20) -> Progress:
    """Cut a whole run into equal slices of time, as a live run shows itself.

    Parameters
    ----------
    trace : Trace
    slices : int
        Number of slices.

    Returns
    -------
    Progress
        Requests count in the slice in which their launch ended, launches with their share over all of that slice's
        time.

    Raises
    ------
    ValueError
        If `slices` is below 1.
    """
    instance("trace", trace, Trace, "a Trace, as simulate and run return")
    names = tuple(map(str, trace.services["service"]))
    last = float(trace.launches["end_ms"].max()) if len(trace.launches) else 0.0
    edges = np.linspace(0.0, max(float(trace.duration_ms), last), count("slices", slices) + 1)
    step_s = (edges[1] - edges[0]) / 1000
    values = {key: np.full((len(names), slices), np.nan) for key in PANES}
    values["held_pct"] = raster(trace, edges[0], edges[-1], slices)[1]
    for i, (name, slo) in enumerate(zip(names, trace.services["slo_ms"].astype(float), strict=True)):
        mine = trace.requests[(trace.requests["service"] == name) & trace.requests["finish_ms"].notna()]
        took = mine["finish_ms"] - mine["arrival_ms"]
        slot = np.clip(np.searchsorted(edges, mine["finish_ms"].to_numpy(dtype=float)) - 1, 0, slices - 1)
        values["in_time_rps"][i] = np.bincount(slot[(took <= slo + 1e-9).to_numpy()], minlength=slices) / step_s
        values["latency_ms"][i] = took.groupby(slot).median().reindex(range(slices)).to_numpy()
    title = f"{trace.policy}: requests, latency and shares, over time"
    return Progress(title, f"{trace.provenance}; seed {trace.seed}", names, edges[1:] / 1000, values, edges[-1] / 1000)


def progress(so_far: Progress, *, width: int = style.WIDTH) -> go.Figure:
    """Draw a run so far: requests in time, median latency and GPU% held, by service, over time.

    Parameters
    ----------
    so_far : Progress
    width : int
        Of the figure [px].
    """
    instance("so_far", so_far, Progress, "a Progress, as replay returns")
    made = style.figure(so_far.title, so_far.origin, width=width, height=400, showlegend=True)
    made.set_subplots(rows=1, cols=3, horizontal_spacing=0.1)
    made.update_layout(legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}})
    made.update_layout(margin_t=made.layout.margin.t + 22)
    made.update_xaxes(style.axis("Time [s]", range=[0, 1.02 * so_far.length_s]))
    for column, (key, title) in enumerate(PANES.items(), start=1):
        made.update_yaxes(style.axis(title, rangemode="tozero"), col=column)
        if not so_far.services:  # a pane without a trace is not drawn
            made.add_trace(go.Scatter(x=[None], y=[None], showlegend=False), row=1, col=column)
        for row, (name, cue) in zip(so_far.values[key], style.cues(so_far.services).items(), strict=True):
            made.add_trace(
                go.Scatter(
                    x=so_far.seconds,
                    y=row,
                    mode="lines+markers",
                    name=style.plain(name),
                    legendgroup=name,
                    showlegend=column == 1,
                    line={"color": cue.color, "dash": cue.dash, "width": 2},
                    marker={"symbol": cue.symbol, "size": 6},
                    hovertemplate=f"<b>{style.plain(name)}</b> at %{{x:.3~g}} s: %{{y:.4~g}}<extra></extra>",
                ),
                row=1,
                col=column,
            )
    return made
