"""What comes of cutting a GPU into few or many slots."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import instance, require
from dstack_lab.figures import style
from dstack_lab.provenance import Provenance

#: Panes: title of the axis, and the lines in it by their names in the legend.
PANES = (
    ("Late part [fraction]", {"late, worst service": "worst_late", "late, all requests": "late"}),
    ("Mean latency [part of the SLO]", {"mean latency": "latency"}),
)
#: Words of the mark at the number that was chosen.
CHOSEN = "chosen"


def slots(
    trials: pd.DataFrame,
    provenance: Provenance | str | Iterable[Provenance | str] | None = None,
    chosen: int | None = None,
    *,
    width: int = style.WIDTH,
) -> go.Figure:
    """Draw trials of several numbers of slots: left who is late, right how long requests take.

    Parameters
    ----------
    trials : pandas.DataFrame
        Of `lab.try_slots`.
    provenance : Provenance, str or several of them, optional
        Of the service times: ``profile.provenance``.
    chosen : int, optional
        Number of slots to mark: ``lab.cut_slots(plan).count``.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    ValueError
        If there is no trial, a column is missing, or no trial has the chosen number.
    """
    instance("trials", trials, pd.DataFrame, "a pandas DataFrame of lab.try_slots")
    needed = {"slots", "gpu_pct", *(column for _, lines in PANES for column in lines.values())}
    require(needed <= set(trials.columns), "trials columns", list(trials.columns), ", ".join(sorted(needed)))
    require(len(trials) > 0, "trials", 0, "at least one")
    counts = trials["slots"].to_numpy()
    require(chosen is None or chosen in counts, "chosen", chosen, f"one of {', '.join(map(str, counts))}")
    made = style.figure("Into how many slots?", style.told(provenance), width=width, height=420, showlegend=True)
    made.set_subplots(rows=1, cols=2, horizontal_spacing=0.15)
    made.update_layout(legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}})
    made.update_layout(margin_t=made.layout.margin.t + 14)
    span = [float(np.log10(counts.min() / 1.15)), float(np.log10(counts.max() * 1.15))]
    made.update_xaxes(style.axis("Slots side by side", type="log", range=span, tickvals=counts.tolist(), tickangle=0))
    cues = iter(style.cues(name for _, lines in PANES for name in lines).values())
    for column, (title, lines) in enumerate(PANES, start=1):
        most = max(float(trials[name].max()) for name in lines.values())
        made.update_yaxes(style.axis(title, range=[0, 1.08 * most or 1.0]), col=column)
        for name, field in lines.items():
            cue = next(cues)
            made.add_trace(
                go.Scatter(
                    name=name,
                    x=counts,
                    y=trials[field].to_numpy(dtype=float),
                    mode="lines+markers",
                    line={"color": cue.color, "dash": cue.dash, "width": 2},
                    marker={"color": cue.color, "symbol": cue.symbol, "size": 8},
                    customdata=trials["gpu_pct"].to_numpy(dtype=float),
                    hovertemplate=f"<b>{name}</b>: %{{y:.3~g}}<br>%{{x}} slots of %{{customdata:.4~g}} GPU%<extra></extra>",
                ),
                row=1,
                col=column,
            )
        if chosen is not None:
            made.add_vline(chosen, row=1, col=column, line={"color": style.GREY, "dash": "dot", "width": 1.5})
            axis = "" if column == 1 else str(column)
            where = {"xref": f"x{axis}", "yref": f"y{axis} domain", "xanchor": "left", "yanchor": "top", "xshift": 4}
            made.add_annotation(style.note(CHOSEN, float(np.log10(chosen)), 1, **where))
    return made
