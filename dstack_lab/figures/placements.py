"""What is on which GPU of a cluster, and how much of it that needs."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dstack_lab.checks import instance
from dstack_lab.cluster import Placement
from dstack_lab.figures import style


def placement(placed: Placement, *, width: int = style.WIDTH) -> go.Figure:
    """Draw a placement: a bar per GPU, made of what its replicas need on average.

    Parameters
    ----------
    placed : Placement
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        A GPU whose bar passes 100 could not be scheduled. An asterisk marks a service that is on several GPUs.
    """
    instance("placed", placed, Placement, "a Placement of lab.place")
    names = list(placed.cluster.names)
    origin = "; ".join(dict.fromkeys(str(profile.provenance) for profile in placed.cluster.profiles()))
    title = f"Placement by {placed.method}: the busiest GPU needs {placed.peak_pct:.0f} GPU%"
    left = 30 + 8 * max(map(len, names))
    made = style.figure(title, origin, width=width, height=220 + 46 * len(names), left=left, barmode="stack", showlegend=True)
    made.update_layout(
        legend={"orientation": "h", "traceorder": "normal", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}}
    )
    made.update_layout(margin_t=made.layout.margin.t + 34, uniformtext={"minsize": 10, "mode": "hide"})
    made.update_xaxes(style.axis("Demand at the cheapest points [GPU%]", range=[0, max(105.0, 1.05 * placed.peak_pct)]))
    y = list(range(len(names)))
    made.update_yaxes(style.axis(None, tickvals=y, ticktext=[style.plain(n) for n in names], showgrid=False))
    made.update_yaxes(range=[len(names) - 0.4, -0.6])
    for name, cue in style.cues(s.name for s in placed.services).items():
        mine = {replica.gpu: replica for replica in placed.of(name)}
        several = "*" if len(mine) > 1 else ""
        made.add_trace(
            go.Bar(
                name=style.plain(name) + several,
                orientation="h",
                y=[names.index(gpu) for gpu in mine],
                x=np.array([replica.demand_pct for replica in mine.values()]),
                width=0.6,
                text=[style.plain(name) + several] * len(mine),
                textposition="inside",
                insidetextanchor="middle",
                marker=cue.bar,
                customdata=[[replica.part, replica.rate_rps] for replica in mine.values()],
                hovertemplate=(
                    f"<b>{style.plain(name)}</b>: %{{x:.1f}} GPU%<br>%{{customdata[0]:.0%}} of its requests, "
                    "%{customdata[1]:.4~g}/s<extra></extra>"
                ),
            )
        )
    made.add_vline(100, line={"color": style.GREY, "dash": "dash", "width": 2})
    return made
