"""Service times against GPU%, and the knee."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import count, instance, percent, require
from dstack_lab.figures import style
from dstack_lab.gpu_model import GpuModel, fit
from dstack_lab.knees import Knee
from dstack_lab.profiles import Profile


@lru_cache(maxsize=64)
def fitted_model(profile: Profile, model: str) -> GpuModel:
    """Fit once per profile object: a slider asks for the same network over and over."""
    return fit(profile, model)


class Curve:
    """Points, fitted curve and knee of one network at one batch.

    Parameters
    ----------
    profile : Profile
    model : str
    batch : int
    rule : str
        Rule of the knee; see `dstack_lab.knees`.
    slo_ms : float, optional
        For the rule ``capacity`` [ms].
    """

    __slots__ = ("at", "gpu_pct", "knee", "knee_ms", "model", "points", "service_ms")

    def __init__(self, profile: Profile, model: str, batch: int, rule: str, slo_ms: float | None) -> None:
        rows = profile.of(model)
        fitted = fitted_model(profile, model)
        self.model = model
        self.points: pd.DataFrame = rows[rows["batch"] == batch]
        self.gpu_pct = np.unique(np.append(np.geomspace(max(1.0, rows["gpu_pct"].min()), 100, 60), np.arange(10, 101, 5.0)))
        self.service_ms = np.asarray(fitted.predict(batch, self.gpu_pct))
        self.knee: Knee = fitted.knee(batch, rule, slo_ms=slo_ms)
        self.at: Callable[[float], float] = lambda gpu_pct: float(fitted.predict(batch, gpu_pct))
        self.knee_ms = float("nan") if np.isnan(self.knee.pct) else float(fitted.predict(batch, self.knee.pct))

    @property
    def label(self) -> str:
        """Direct label: the network and its knee."""
        return f"{self.model}: {self.knee}"


@lru_cache(maxsize=64)
def curve_of(profile: Profile, model: str, batch: int, rule: str, slo_ms: float | None) -> Curve:
    """Curve and knee, once per setting: a slider over the share asks for the same again and again."""
    return Curve(profile, model, batch, rule, slo_ms)


def curves(
    profile: Profile, models: Iterable[str] | str | None, batch: int | None, rule: str, slo_ms: float | None
) -> tuple[list[Curve], str, int, bool]:
    """Curves to draw, the title, the batch, and whether their times span so much that a log axis is needed."""
    instance("profile", profile, Profile, "a Profile, as load_profile and measure return")
    names = list(dict.fromkeys(profile.models if models is None else [models] if isinstance(models, str) else models))
    require(bool(names), "models", names, f"one or more of {', '.join(profile.models)}")
    measured = [set(profile.of(name)["batch"]) for name in names]
    if batch is None:
        batch = int(min(set.intersection(*measured) or set.union(*measured)))
    drawn = [curve_of(profile, name, count("batch", batch), rule, slo_ms) for name in names]
    low, high = min(c.service_ms.min() for c in drawn), max(c.service_ms.max() for c in drawn)
    title = f"Service time and knee at batch {batch} (rule: {rule})"
    return drawn, title, batch, bool(high > 12 * low)


def knee(
    profile: Profile,
    models: Iterable[str] | str | None = None,
    batch: int | None = None,
    rule: str = "tolerance",
    slo_ms: float | None = None,
    *,
    at_pct: float | None = None,
    width: int = style.WIDTH,
) -> go.Figure:
    """Draw service time against GPU%: the profile's points, the fitted curve, and the knee with its interval.

    Parameters
    ----------
    profile : Profile
    models : str or iterable of str, optional
        Networks; all by default.
    batch : int, optional
        Batch; by default the smallest that all of them were profiled at. Need not be in the profile:
        then only the curve is drawn.
    rule : str
        Rule of the knee: one of `dstack_lab.knees.RULES`.
    slo_ms : float, optional
        Latency objective for the rule ``capacity`` [ms].
    at_pct : float, optional
        A GPU% to mark on every curve, with its service time.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        The time axis is logarithmic where times differ by more than a factor of 12.

    Raises
    ------
    ValueError
        If the profile lacks a model, or the rule or batch is not allowed.
    """
    here = None if at_pct is None else percent("at_pct", at_pct)
    drawn, title, batch, log = curves(profile, models, batch, rule, slo_ms)
    right = 40 + 7 * max(len(c.label) for c in drawn)
    made = style.figure(title, str(profile.provenance), width=width, height=460, right=min(right, width // 2))
    times = np.concatenate([np.append(c.service_ms, c.points["service_ms"]) for c in drawn])
    low, high = (0.85 * times.min(), 1.2 * times.max()) if log else (0.0, 1.05 * times.max())
    made.update_xaxes(style.axis("Share [GPU%]", range=[0, 101], dtick=20))
    words = "Service time [ms]"
    made.update_yaxes(style.log_axis(words, low, high) if log else style.axis(words, range=[low, high]))
    if log:  # from here on in the axis's own coordinate, where labels are placed
        low, high = np.log10(low), np.log10(high)
    for curve, cue in zip(drawn, style.cues(c.model for c in drawn).values(), strict=True):
        _add_curve(made, curve, cue)
        if here is not None:
            _add_here(made, curve, here)
    if here is not None:
        made.add_vline(here, line={"color": style.GREY, "width": 1.5, "dash": "dot"})
    ends = [float(np.log10(c.service_ms[-1])) if log else float(c.service_ms[-1]) for c in drawn]
    # one line of text is 17 px of the drawing's height
    gap = 17 / (made.layout.height - made.layout.margin.t - made.layout.margin.b) * (high - low)
    for curve, cue, end in zip(drawn, style.cues(c.model for c in drawn).values(), _inside(ends, gap, low), strict=True):
        made.add_annotation(
            style.note(style.label(cue, curve.label), 101, end, xanchor="left", xshift=6, yanchor="middle", align="left")
        )
    return made


def _add_curve(made: go.Figure, curve: Curve, cue: style.Cue) -> None:
    name, where = style.plain(curve.model), "%{x:.4~g} GPU%: %{y:.4~g} ms"
    made.add_trace(
        go.Scatter(
            x=curve.gpu_pct,
            y=curve.service_ms,
            mode="lines",
            name=f"{name}, fitted",
            line={"color": cue.color, "dash": cue.dash, "width": 2},
            hovertemplate=f"<b>{name}</b>, fitted<br>{where}<extra></extra>",
        )
    )
    if len(curve.points):
        made.add_trace(
            go.Scatter(
                x=curve.points["gpu_pct"].to_numpy(),
                y=curve.points["service_ms"].to_numpy(),
                mode="markers",
                name=f"{name}, profile",
                marker={"color": cue.color, "symbol": cue.symbol, "size": 6},
                hovertemplate=f"<b>{name}</b>, profile<br>{where}<extra></extra>",
            )
        )
    if not np.isnan(curve.knee.pct):
        reach = {"array": [curve.knee.high - curve.knee.pct], "arrayminus": [curve.knee.pct - curve.knee.low]}
        made.add_trace(
            go.Scatter(
                x=[curve.knee.pct],
                y=[curve.knee_ms],
                mode="markers",
                name=f"{name}, knee",
                marker={"color": cue.color, "symbol": f"{cue.symbol}-open", "size": 15, "line": {"width": 2.5}},
                error_x={"type": "data", "symmetric": False, **reach, "color": cue.color, "thickness": 1.5},
                hovertemplate=f"<b>{name}</b>: {curve.knee}<br>{where}<extra></extra>",
            )
        )


def _add_here(made: go.Figure, curve: Curve, at_pct: float) -> None:
    """Mark a share on a curve."""
    ms = curve.at(at_pct)
    made.add_trace(
        go.Scatter(
            x=[at_pct],
            y=[ms],
            mode="markers+text",
            name=f"{style.plain(curve.model)}, here",
            text=[here_words(curve, at_pct)],
            textposition="top right" if at_pct < 55 else "top left",
            textfont={"color": style.GREY, "size": 13},
            marker={"color": style.GREY, "symbol": "x", "size": 11},
            cliponaxis=False,
            hovertemplate=f"{here_words(curve, at_pct)}<extra></extra>",
        )
    )


def here_words(curve: Curve, at_pct: float) -> str:
    """Service time at a share, and beside the whole GPU's."""
    return f"{curve.at(at_pct):.3g} ms at {at_pct:g} %, {curve.at(at_pct) / curve.at(100):.2f} × that at 100 %"


def _inside(ends: list[float], gap: float, low: float) -> list[float]:
    """Labels apart from each other and above the axis."""
    moved = style.spread(ends, gap)
    lift = max(0.0, low + 0.6 * gap - min(moved))
    return [m + lift for m in moved]
