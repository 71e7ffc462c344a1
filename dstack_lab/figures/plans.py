"""Operating points of a plan."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dstack_lab.checks import instance
from dstack_lab.figures import style
from dstack_lab.services import Plan


def plan(plan: Plan, *, width: int = style.WIDTH) -> go.Figure:
    """Draw a plan: share with its knee, batch, and the GPU% that the demand of each service adds.

    Parameters
    ----------
    plan : Plan
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        One row per service. The bars of the third part stand one after the other and end at
        ``plan.demand_pct``; beyond 100 no schedule can sustain it.
    """
    rows = instance("plan", plan, Plan, "a Plan of lab.optimize").to_frame()
    demand = np.array([a.rate_rps * a.area_pct_ms / 1000 for a in plan.allocations])
    ends = np.cumsum(demand)
    left = 26 + 8 * int(rows["service"].str.len().max())
    title = f"Operating points ({plan.objective}), {plan.demand_pct:.1f} GPU% of demand"
    made = style.figure(title, str(plan.provenance), width=width, height=190 + 44 * len(rows), left=left)
    made.set_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.05, column_widths=[0.34, 0.28, 0.38])
    y = np.arange(len(rows))
    made.update_yaxes(
        style.axis(None, tickvals=y.tolist(), ticktext=[style.plain(s) for s in rows["service"]], showgrid=False),
        range=[len(rows) - 0.4, -0.6],
    )
    made.update_xaxes(style.axis("Share [GPU%], ❘ knee", range=[0, 105], dtick=20), col=1)
    made.update_xaxes(style.axis("Batch [requests]", range=[0, 2 * rows["batch"].max()]), col=2)
    made.update_xaxes(style.axis("Demand [GPU%]", range=[0, 1.12 * max(100.0, float(ends[-1]))]), col=3)
    looks = list(style.cues(rows["service"]).values())
    text = {"outsidetextfont_color": style.GREY, "insidetextanchor": "start", "cliponaxis": False}
    base = {"orientation": "h", "y": y, "width": 0.6, **text}
    pattern = {"shape": [cue.hatch for cue in looks], **style.HATCHING}
    pen = {"color": [cue.color for cue in looks], "line": {"width": 1, "color": style.GREY}, "pattern": pattern}
    times = [f"{b} in {ms:.4g} ms" for b, ms in zip(rows["batch"], rows["service_ms"], strict=True)]
    bars = (
        ("Share", rows["gpu_pct"].to_numpy(), None, [f"{g:g}" for g in rows["gpu_pct"]], "auto"),
        ("Batch", rows["batch"].to_numpy(), None, times, "outside"),
        ("Demand", demand, ends - demand, [f"{d:.1f}" for d in demand], "outside"),
    )
    for column, (name, x, start, words, where) in enumerate(bars, start=1):
        hover = f"{name}: %{{x:.4~g}}<extra></extra>"
        made.add_trace(
            go.Bar(**base, name=name, x=x, base=start, text=words, textposition=where, marker=pen, hovertemplate=hover),
            row=1,
            col=column,
        )
    made.add_trace(
        go.Scatter(
            x=rows["knee_pct"].to_numpy(),
            y=y,
            mode="markers",
            name="Knee",
            marker={"symbol": "line-ns", "size": 26, "line": {"width": 3, "color": style.GREY}},
            hovertemplate="Knee: %{x:.3~g} GPU%<extra></extra>",
        ),
        row=1,
        col=1,
    )
    made.add_vline(100, row=1, col=3, line={"color": style.GREY, "dash": "dash", "width": 2})
    return made
