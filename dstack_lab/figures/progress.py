"""A run while it runs: requests in time, latency and shares, second by second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dstack_lab.figures import style
from dstack_lab.figures.sheets import Target, sheet, written

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


def progress(so_far: Progress, *, width: int = style.WIDTH) -> go.Figure:
    """Draw a run so far: requests in time, median latency and GPU% held, by service, over time."""
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


def static_progress(so_far: Progress, path: Target) -> Path:
    """Write `progress` as a PNG or SVG; errors as for `static_knee`."""
    with sheet(path, f"{so_far.title}\n", so_far.origin, 3, 3.8) as (_, axes):
        for part, (key, title) in zip(axes, PANES.items(), strict=True):
            for row, (name, cue) in zip(so_far.values[key], style.cues(so_far.services).items(), strict=True):
                part.plot(so_far.seconds, row, cue.mpl_marker, color=cue.color, linestyle=cue.mpl_dash, markersize=4, label=name)
            part.set_xlim(0, 1.02 * so_far.length_s)
            part.set_ylim(bottom=0)
            part.set_xlabel("Time [s]")
            part.set_ylabel(title)
            part.grid()
        if so_far.services:
            axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9).set_in_layout(False)
    return written(path)
