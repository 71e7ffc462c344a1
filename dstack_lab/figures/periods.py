"""The windows of a period plan, side by side on the GPU."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from dstack_lab.checks import instance
from dstack_lab.figures import style
from dstack_lab.figures.space import place
from dstack_lab.policies import PeriodPlan
from dstack_lab.provenance import Provenance

Array = NDArray[np.float64]


def period(
    plan: PeriodPlan, provenance: Provenance | str | Iterable[Provenance | str] | None = None, *, width: int = style.WIDTH
) -> go.Figure:
    """Draw one period: time to the right, the GPU's 100 % upward, a rectangle for each window.

    Parameters
    ----------
    plan : PeriodPlan
        Of `lab.plan_period`.
    provenance : Provenance, str or several of them, optional
        Of the service times it was made from: ``profile.provenance``; without it the subtitle says so.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        What stays empty is nobody's: an opportunistic launch may take it. A window that runs into the
        next period is cut in two: its end is drawn at the start.
    """
    windows = _turned(instance("plan", plan, PeriodPlan, "a PeriodPlan of lab.plan_period"))
    pieces = place(windows)
    whole = windows.iloc[pieces["row"]].reset_index(drop=True)
    title = f"Period plan: {len(plan.windows)} windows in {plan.period_ms:g} ms"
    made = style.figure(title, style.told(provenance), width=width, height=420, barmode="overlay", showlegend=True)
    made.update_layout(legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}})
    made.update_layout(margin_t=made.layout.margin.t + 14, uniformtext={"minsize": 10, "mode": "hide"})
    made.update_xaxes(style.axis("Time in the period [ms]", range=[0, plan.period_ms]))
    made.update_yaxes(style.axis("Share reserved [GPU%]", range=[0, 100], dtick=20))
    for name, cue in style.cues(a.service for a in plan.allocations).items():
        mine = (whole["service"] == name).to_numpy()
        low, high = pieces.loc[mine, "low_pct"].to_numpy(), pieces.loc[mine, "high_pct"].to_numpy()
        part = whole[mine]
        made.add_trace(
            go.Bar(
                name=style.plain(name),
                orientation="h",
                base=part["start_ms"].to_numpy(),
                x=(part["end_ms"] - part["start_ms"]).to_numpy(),
                y=(low + high) / 2,
                width=high - low,
                text=_words(made, plan, name, part, high - low),
                textposition="inside",
                insidetextanchor="middle",
                marker=cue.bar,
                customdata=part[["end_ms", "gpu_pct", "batch"]].to_numpy(dtype=float),
                hovertemplate=(
                    f"<b>{style.plain(name)}</b>, batch %{{customdata[2]}} at %{{customdata[1]:.4~g}} GPU%<br>"
                    "%{base:.2f} to %{customdata[0]:.2f} ms<extra></extra>"
                ),
            )
        )
    return made


def _words(made: go.Figure, plan: PeriodPlan, name: str, part: pd.DataFrame, tall_pct: Array) -> list[str]:
    """Name and batch of each window, or the name alone where that is all that fits."""
    layout = made.layout
    wide = (layout.width - layout.margin.l - layout.margin.r) / plan.period_ms * (part["end_ms"] - part["start_ms"]).to_numpy()
    tall = (layout.height - layout.margin.t - layout.margin.b) / 100 * tall_pct
    several = zip(part["batch"], wide, tall, strict=True)
    return [style.plain(whole if style.fitting(whole := f"{name}, batch {b}", w, t) else name) for b, w, t in several]


def _turned(plan: PeriodPlan) -> pd.DataFrame:
    """Windows by start; what runs beyond the end of the period is cut off and put at its start, where it also is."""
    windows = plan.to_frame()
    over = windows["end_ms"] - plan.period_ms
    again = windows.assign(start_ms=0.0, end_ms=over)[over > 1e-9]
    cut = windows.assign(end_ms=windows["end_ms"].clip(upper=plan.period_ms))
    return pd.concat([again, cut]).sort_values("start_ms", kind="stable", ignore_index=True)
