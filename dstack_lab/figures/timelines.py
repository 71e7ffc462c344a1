"""Who held how much of the GPU, and when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import count
from dstack_lab.figures import style
from dstack_lab.figures.space import Window, place, raster, visible, window
from dstack_lab.traces import Trace

#: Beyond this many launches a browser is slow to draw bars, and they are thinner than a pixel anyway.
EXACT = 1500

#: Slices of a raster: about one per pixel of the drawing.
COLUMNS = 800

#: Hatch of a launch that holds a late request, beside its red edge, and its word in the legend.
LATE, LATE_WORDS = "x", "holds late requests"
#: Places on the colour scale of a raster, closer where the root bends.
_STOPS = (0.0, 0.01, 0.04, 0.1, 0.25, 0.5, 1.0)


def timeline(
    trace: Trace,
    start_ms: float | None = None,
    end_ms: float | None = None,
    *,
    window_ms: float = 500.0,
    exact: int = EXACT,
    width: int = style.WIDTH,
) -> go.Figure:
    """Draw a run: time to the right, the GPU's 100 % upward, one colour per service.

    Each launch is a rectangle as high as its GPU% and as long as its service time; hatched ones with a
    red edge hold requests that finished after their SLO. With more than `exact` launches in view, each service is
    a row whose colour deepens with the mean GPU% it held.

    Parameters
    ----------
    trace : Trace
    start_ms, end_ms : float, optional
        Window [ms]; by default the first `window_ms`.
    window_ms : float
        Length where `end_ms` is not given [ms].
    exact : int
        Most launches that are drawn one by one.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    ValueError
        If the window is empty or outside the run.
    """
    view = window(trace, start_ms, end_ms, window_ms)
    count("exact", exact, 0)
    title, origin = titles(trace, view)
    launches = visible(trace, view)
    if launches.empty:
        return style.nothing(title, origin, "No launch ran in this window.", width)
    if len(launches) > exact:
        return _raster(trace, view, launches, title, origin, width)
    return _rectangles(trace, view, launches, title, origin, width)


def titles(trace: Trace, view: Window) -> tuple[str, str]:
    """Title and subtitle of a timeline."""
    return f"{trace.policy}: who held the GPU, {view}", f"{trace.provenance}; seed {trace.seed}"


def rectangles(launches: pd.DataFrame, view: Window) -> pd.DataFrame:
    """Pieces of GPU% and time to draw: `place`'s columns, those of the launch, and the part inside the window.

    Returns
    -------
    pandas.DataFrame
        ``row``, ``low_pct``, ``high_pct``, ``service``, ``from_ms``, ``till_ms`` (both inside the
        window) and all columns of `launches`.
    """
    pieces = place(launches)
    whole = launches.iloc[pieces["row"]].reset_index(drop=True)
    inside = {"from_ms": whole["start_ms"].clip(lower=view.start_ms), "till_ms": whole["end_ms"].clip(upper=view.end_ms)}
    return pd.concat([pieces, whole], axis=1).assign(**inside)


def _rectangles(trace: Trace, view: Window, launches: pd.DataFrame, title: str, origin: str, width: int) -> go.Figure:
    pieces = rectangles(launches, view)
    top = float(pieces["high_pct"].max())
    made = style.figure(
        title,
        origin,
        width=width,
        height=440,
        barmode="overlay",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}},
        uniformtext={"minsize": 10, "mode": "hide"},
        xaxis=style.axis("Time [ms]", range=[view.start_ms, view.end_ms]),
        yaxis=style.axis("Share held [GPU%]", range=[0, max(100.0, 1.02 * top)], dtick=20 if top <= 105 else 50),
    )
    made.update_layout(margin_t=made.layout.margin.t + 14)
    for name, cue in style.cues(trace.services["service"]).items():
        mine = pieces[pieces["service"] == name]
        if mine.empty:
            continue
        _add_key(made, name, cue.bar)
        late = mine["late"].to_numpy() > 0
        made.add_trace(
            go.Bar(
                name=style.plain(name),
                legendgroup=name,
                showlegend=False,
                orientation="h",
                base=mine["from_ms"].to_numpy(),
                x=(mine["till_ms"] - mine["from_ms"]).to_numpy(),
                y=(mine["low_pct"] + mine["high_pct"]).to_numpy() / 2,
                width=(mine["high_pct"] - mine["low_pct"]).to_numpy(),
                text=[style.plain(t) for t in bar_labels(mine, name, view)],
                textposition="inside",
                insidetextanchor="middle",
                marker={
                    "color": cue.color,
                    "line": {
                        "width": np.where(late, 2, 1).tolist() if late.any() else 1,
                        "color": np.where(late, style.LATE, style.GREY).tolist() if late.any() else style.GREY,
                    },
                    "pattern": {"shape": np.where(late, LATE, cue.hatch).tolist() if late.any() else cue.hatch, **style.HATCHING},
                },
                customdata=mine[["start_ms", "end_ms", "gpu_pct", "batch", "late"]].to_numpy(dtype=float),
                hovertext=[_said(row) for row in mine["note"]] if (mine["note"].astype(str) != "").any() else None,
                hovertemplate=(
                    f"<b>{style.plain(name)}</b>, batch %{{customdata[3]}} at %{{customdata[2]:.4~g}} GPU%<br>"
                    "%{customdata[0]:.3f} to %{customdata[1]:.3f} ms, late requests: %{customdata[4]}%{hovertext}<extra></extra>"
                ),
            )
        )
    if (pieces["late"] > 0).any():
        edge, pattern = {"width": 2, "color": style.LATE}, {"shape": LATE, "fgcolor": style.GREY, **style.HATCHING}
        _add_key(made, LATE_WORDS, {"color": "rgba(0,0,0,0)", "line": edge, "pattern": pattern})
    if top > 100.5:
        made.add_hline(100, line={"color": style.GREY, "width": 2, "dash": "dash"})
        words = "┅ 100 GPU%: oversubscribed above"
        made.add_annotation(style.note(words, 1, 1, xref="paper", yref="paper", xanchor="right", yanchor="bottom", yshift=6))
    return made


def _add_key(made: go.Figure, name: str, marker: dict[str, Any]) -> None:
    """Add an entry to the legend by itself: a trace's own entry would copy the hatch of its first bar."""
    made.add_trace(go.Bar(name=style.plain(name), legendgroup=name, x=[None], y=[None], marker=marker))


def _raster(trace: Trace, view: Window, launches: pd.DataFrame, title: str, origin: str, width: int) -> go.Figure:
    names = list(trace.services["service"])
    edges, held = raster(trace, view.start_ms, view.end_ms, COLUMNS)
    most = float(held.max())  # a service may hold several launches at once
    slice_ms = float(edges[1] - edges[0])
    made = style.figure(
        title,
        dense_words(origin, launches, slice_ms, most),
        width=width,
        height=210 + 46 * len(names),
        left=30 + 8 * max(len(str(n)) for n in names),
        xaxis=style.axis("Time [ms]", range=[view.start_ms, view.end_ms]),
        yaxis=style.axis(
            None,
            range=[len(names) - 0.4, -0.6],
            tickvals=list(range(len(names))),
            ticktext=[style.plain(n) for n in names],
            showgrid=False,
        ),
    )
    for i, (name, cue) in enumerate(style.cues(names).items()):
        made.add_trace(
            go.Heatmap(
                name=style.plain(name),
                z=held[i : i + 1].astype(np.float32),
                x0=float(edges[0] + slice_ms / 2),
                dx=slice_ms,
                y=[i],
                dy=1,
                zmin=0,
                zmax=most,
                colorscale=[[part, style.faded(cue.color, strength(part))] for part in _STOPS],
                showscale=False,
                hovertemplate=f"<b>{style.plain(name)}</b> held %{{z:.1f}} GPU%<br>around %{{x:.2f}} ms<extra></extra>",
            )
        )
        bins = late_bins(launches[launches["service"] == name], view)
        if len(bins):
            made.add_trace(
                go.Scatter(
                    x=bins,
                    y=np.full(len(bins), i - 0.54),
                    mode="markers",
                    marker={"symbol": "triangle-down", "size": 6, "color": style.LATE},
                    name=LATE_WORDS,
                    hovertemplate=f"<b>{style.plain(name)}</b>: launches here hold late requests<extra></extra>",
                )
            )
    if (launches["late"] > 0).any():
        made.add_annotation(style.note(f"▾ {LATE_WORDS}", 1, 1, xref="paper", yref="paper", xanchor="right", yanchor="bottom"))
    return made


def late_bins(mine: pd.DataFrame, view: Window, bins: int = 120) -> np.ndarray:
    """Middles [ms] of the coarse slices in which a launch with late requests ended."""
    late = mine.loc[mine["late"] > 0, "end_ms"].clip(upper=view.end_ms).to_numpy(dtype=float)
    step = (view.end_ms - view.start_ms) / bins
    slot = np.unique(np.clip(((late - view.start_ms) / step).astype(np.int64), 0, bins - 1))
    return np.asarray(view.start_ms + (slot + 0.5) * step)


def strength(part: Any) -> Any:
    """Opacity of a part of the largest share: its root, so that small shares are seen on light and dark alike."""
    return np.sqrt(np.clip(part, 0, 1))


def dense_words(origin: str, launches: pd.DataFrame, slice_ms: float, most: float) -> str:
    """Subtitle of a raster: what a colour means; `most` is the GPU% of full colour."""
    return f"{origin}; {len(launches):,} launches as means over {slice_ms:.3g} ms, full colour = {most:.3g} GPU%"


def bar_labels(mine: pd.DataFrame, name: str, view: Window, most: int = 8) -> list[str]:
    """Write the name on the largest bar of each eighth of the window: enough to tell services apart without colour."""
    part = ((mine["from_ms"] - view.start_ms) / (view.end_ms - view.start_ms) * most).astype(np.int64)
    room = (mine["till_ms"] - mine["from_ms"]) * (mine["high_pct"] - mine["low_pct"])
    room = room.where(mine["late"] == 0, room / 1000)  # words are hard to read on a hatch
    chosen = set(room.groupby(part).idxmax())
    return [name if i in chosen else "" for i in mine.index]


def _said(word: object) -> str:
    return f"<br>{style.plain(word)}" if word else ""
