"""Latency of the requests of a run."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dstack_lab.checks import instance
from dstack_lab.figures import style
from dstack_lab.traces import Trace

#: Points of an empirical distribution that are drawn; more cannot be seen.
POINTS = 400


def latency(trace: Trace, *, width: int = style.WIDTH) -> go.Figure:
    """Draw the fraction of all requests that were served within a latency, per service, with its SLO.

    Requests that were dropped or never served count as never finished, so a curve may end below 1, and
    its height at the SLO is the service's SLO attainment.

    Parameters
    ----------
    trace : Trace
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        The latency axis is logarithmic where latencies go beyond 4 times the largest SLO.
    """
    instance("trace", trace, Trace, "a Trace, as simulate and run return")
    title = f"{trace.policy}: latency of requests, {trace.duration_ms:,.6g} ms of arrivals"
    origin = f"{trace.provenance}; seed {trace.seed}"
    if not len(trace.requests) or trace.requests["finish_ms"].isna().all():
        return style.nothing(title, origin, "No request was served.", width)
    services = trace.services.set_index("service")["slo_ms"].astype(float)
    lines = {name: _distribution(trace, name) for name in services.index}
    reached = {str(n): _at(trace, str(n), float(slo)) for n, slo in services.items()}
    labels = {n: f"{n}: {r:.1%} within {services[n]:g} ms" for n, r in reached.items() if np.isfinite(r)}
    longest = max(x[-1] for x, _ in lines.values() if len(x))
    log = longest > 4 * services.max()
    right = 40 + 7 * max(map(len, labels.values()))
    made = style.figure(title, origin, width=width, height=440, right=min(right, width // 2))
    first = min(x[0] for x, _ in lines.values() if len(x))
    if log:
        made.update_xaxes(style.log_axis("Latency [ms]", first / 1.1, longest * 1.1))
    else:
        made.update_xaxes(style.axis("Latency [ms]", range=[0, 1.05 * max(longest, services.max())]))
    made.update_yaxes(style.axis("Served within it [fraction of all requests]", range=[0, 1.03]))
    finals = style.spread([float(lines[n][1][-1]) if len(lines[n][1]) else 0.0 for n in labels], 0.06)
    lift = min(0.0, 1.0 - max(finals, default=1.0))
    ends = dict(zip(labels, finals, strict=True))
    for name, cue in style.cues(services.index).items():
        x, y = lines[name]
        slo = float(services[name])
        said = f"<b>{style.plain(name)}</b>"
        made.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name=style.plain(name),
                line={"color": cue.color, "dash": cue.dash, "width": 2, "shape": "hv"},
                hovertemplate=f"{said}: %{{y:.1%}} within %{{x:.4~g}} ms<extra></extra>",
            )
        )
        if name in labels:
            made.add_trace(
                go.Scatter(
                    x=[slo, slo],
                    y=[0, reached[name]],
                    mode="lines+markers",
                    name=f"{style.plain(name)}, SLO",
                    line={"color": cue.color, "dash": "dot", "width": 1.5},
                    marker={"color": cue.color, "symbol": cue.symbol, "size": [0, 11], "opacity": 1, "line": {"width": 0}},
                    hovertemplate=f"{said}: SLO {slo:g} ms, attained by {reached[name]:.2%}<extra></extra>",
                )
            )
            words = style.label(cue, labels[name])
            made.add_annotation(style.note(words, 1, ends[name] + lift, xref="paper", xanchor="left", xshift=6))
    return made


def _distribution(trace: Trace, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Latencies [ms] and the fraction of all requests of a service that were served within them."""
    mine = trace.requests[trace.requests["service"] == name]
    took = np.sort((mine["finish_ms"] - mine["arrival_ms"]).dropna().to_numpy(dtype=float))
    rank = np.unique(np.linspace(0, len(took) - 1, POINTS).astype(np.int64)) if len(took) else np.empty(0, dtype=np.int64)
    return took[rank], (rank + 1) / max(len(mine), 1)


def _at(trace: Trace, name: str, slo_ms: float) -> float:
    """SLO attainment of one service; NaN without requests."""
    mine = trace.requests[trace.requests["service"] == name]
    return float((mine["finish_ms"] - mine["arrival_ms"] <= slo_ms + 1e-9).mean()) if len(mine) else float("nan")
