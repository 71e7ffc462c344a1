"""What a batch costs and buys: service time and throughput against the batch, at several shares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dstack_lab.checks import instance, percent, positive, require
from dstack_lab.figures import style
from dstack_lab.figures.curves import fitted_model
from dstack_lab.profiles import Profile


def batches(
    profile: Profile,
    model: str,
    slo_ms: float | None = None,
    shares: Iterable[float] | None = None,
    *,
    width: int = style.WIDTH,
) -> go.Figure:
    """Draw what a batch buys and costs: latency and throughput against the batch, at several shares.

    Parameters
    ----------
    profile : Profile
    model : str
    slo_ms : float, optional
        Latency objective [ms]: drawn with its half, since a request that just misses a launch waits
        for it and then for its own. Points beyond the SLO are hollow.
    shares : iterable of float, optional
        GPU% to draw, at most 5; by default about 4 of the profile's, spread evenly in logs.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        Curves are fitted, symbols are the profile's points. Throughput is that of one launch after
        another, ``1000 batch / service_ms``.

    Raises
    ------
    ValueError
        If the profile lacks `model`, a share is not in 1 to 100, or `slo_ms` is not above 0.
    """
    rows = instance("profile", profile, Profile, "a Profile, as load_profile and measure return").of(model)
    fitted = fitted_model(profile, model)
    limit = None if slo_ms is None else positive("slo_ms", slo_ms)
    chosen = _some(np.unique(rows["gpu_pct"])) if shares is None else sorted({percent("shares", g) for g in shares})
    require(1 <= len(chosen) <= len(style.DASHES), "shares", chosen, f"1 to {len(style.DASHES)} of them")
    grid = np.geomspace(1, float(rows["batch"].max()), 40) if rows["batch"].max() > 1 else np.array([1.0])
    title = f"{model}: what a batch costs and buys"
    made = style.figure(title, str(profile.provenance), width=width, height=420, right=80)
    made.set_subplots(rows=1, cols=2, horizontal_spacing=0.25)
    ticks = sorted({int(b) for b in rows["batch"]})
    ticks = [b for b in ticks if b & (b - 1) == 0] or ticks[:8]
    made.update_xaxes(style.axis("Batch [requests]", type="log", tickvals=ticks))
    made.update_yaxes(style.axis("Throughput [requests/s]", rangemode="tozero"), col=2)
    rates, latest, fastest = [], [], float(rows["service_ms"].min())
    for share, cue in zip(chosen, style.cues(map(str, chosen)).values(), strict=True):
        ms = np.asarray(fitted.predict(grid, share))
        points = rows[rows["gpu_pct"] == share]
        b, at = points["batch"].to_numpy(), points["service_ms"].to_numpy()
        rates.append(1000 * grid[-1] / ms[-1])
        latest.append(float(ms[-1]))
        fastest = min(fastest, float(ms[0]))
        for column, line, dots in ((1, ms, at), (2, 1000 * grid / ms, 1000 * b / at)):
            made.add_traces(_pair(grid, line, b, dots, at, share, cue, limit, column), rows=1, cols=column)
    slowest = max(*latest, float(rows["service_ms"].max() if shares is None else 0), limit or 0)
    made.update_yaxes(style.log_axis("Service time [ms]", 0.8 * min(fastest, (limit or fastest) / 2), 1.3 * slowest), col=1)
    limits = {} if limit is None else {f"SLO {limit:g} ms": (limit, "dash"), f"half: {limit / 2:g} ms": (limit / 2, "dot")}
    for at_ms, dash in limits.values():
        made.add_hline(at_ms, row=1, col=1, line={"color": style.GREY, "dash": dash, "width": 1.5})
    labels = [style.label(cue, f"{share:g} %") for share, cue in zip(chosen, style.cues(map(str, chosen)).values(), strict=True)]
    # plotly places annotations on a logarithmic axis by the logarithm
    ends = np.log10([*latest, *(at_ms for at_ms, _ in limits.values())]).tolist()
    _label_ends(made, 1, [*labels, *limits], ends, 2.0)
    _label_ends(made, 2, labels, rates, max(rates))
    return made


def _pair(
    grid: np.ndarray,
    line: np.ndarray,
    b: np.ndarray,
    dots: np.ndarray,
    ms: np.ndarray,
    share: float,
    cue: style.Cue,
    limit: float | None,
    column: int,
) -> list[Any]:
    """Fitted line and the profile's points of one share."""
    unit = "ms" if column == 1 else "requests/s"
    hover = f"<b>{share:g} GPU%</b>, batch %{{x:.3~g}}: %{{y:.4~g}} {unit}<extra></extra>"
    late = np.zeros(len(ms), dtype=bool) if limit is None else ms > limit
    symbols = [f"{cue.symbol}-open" if x else cue.symbol for x in late]
    pen = {"color": cue.color, "dash": cue.dash, "width": 2}
    drawn = [go.Scatter(x=grid, y=line, mode="lines", name=f"{share:g} GPU%, fitted", line=pen, hovertemplate=hover)]
    if len(b):
        marker = {"color": cue.color, "symbol": symbols, "size": 8}
        drawn.append(go.Scatter(x=b, y=dots, mode="markers", name=f"{share:g} GPU%, profile", marker=marker, hovertemplate=hover))
    return drawn


def _label_ends(made: go.Figure, column: int, labels: Iterable[str], ends: list[float], span: float) -> None:
    """Write a label at the right end of each line, labels apart."""
    axis = "" if column == 1 else str(column)
    for words, end in zip(labels, style.spread(ends, span / 18), strict=True):
        where = {"xref": f"x{axis} domain", "yref": f"y{axis}", "xanchor": "left", "xshift": 4, "align": "left"}
        made.add_annotation(style.note(words, 1, end, **where))


def _some(shares: np.ndarray, most: int = 4) -> list[float]:
    """About `most` of the shares, evenly in logs, with both ends."""
    wanted = np.geomspace(shares[0], shares[-1], most)
    return sorted({float(shares[np.argmin(np.abs(np.log(shares / w)))]) for w in wanted})
