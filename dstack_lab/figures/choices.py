"""Which batch, on which share: the points that keep a service's SLO and rate, and what forbids the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dstack_lab.bounds import service_tables
from dstack_lab.checks import instance
from dstack_lab.constraints import CONSTRAINTS, fits, points, score_of, verdicts
from dstack_lab.figures import style
from dstack_lab.optimizer import optimize
from dstack_lab.profiles import Profile
from dstack_lab.services import Allocation, InfeasiblePlan, Plan, Service, ServiceTable

Array = NDArray[np.float64]
#: What is wrong with a point, as a reader says it, with its colour.
WRONG = {
    CONSTRAINTS[0]: ("too late behind the batch before", "#D55E00"),
    CONSTRAINTS[1]: ("too late while the batch fills", "#CC79A7"),
    CONSTRAINTS[2]: ("cannot keep up", "#56B4E9"),
}
_FEASIBLE = "#009E73"


@dataclass(frozen=True, slots=True)
class Choices:
    """All points of one service, the best of them, and the best at one share.

    Parameters
    ----------
    plan : Plan or None
        Of `optimize`; None if no point is feasible.
    here : Plan or None
        The same at `at_pct` alone.
    words : str
        Why there is no plan.
    """

    service: Service
    objective: str
    at_pct: float
    table: ServiceTable
    plan: Plan | None
    here: Plan | None
    words: str

    @property
    def best(self) -> Allocation | None:
        """The best point."""
        return None if self.plan is None else self.plan.allocations[0]

    @property
    def best_here(self) -> Allocation | None:
        """The best point at `at_pct`."""
        return None if self.here is None else self.here.allocations[0]


def choose(profile: Profile, service: Service, objective: str, at_pct: float) -> Choices:
    """Find the best points of a service.

    Parameters
    ----------
    profile : Profile
    service : Service
    objective : str
        What the best point is chosen for, as in `optimize`.
    at_pct : float
        A share to look at beside it [GPU%].

    Raises
    ------
    ValueError
        If the profile lacks the model, or the objective or the share is not allowed.
    """
    plan = here = None
    words = ""
    try:
        plan = optimize([service], profile, objective)
        here = optimize([service], profile, objective, shares=[at_pct])
    except InfeasiblePlan as no:
        words = "" if plan else str(no)
    if plan is None:  # the granted shares fail; a reader may look at one between them
        try:
            here = optimize([service], profile, objective, shares=[at_pct])
        except InfeasiblePlan:
            here = None
    return Choices(service, objective, at_pct, service_tables([service], profile)[0], plan, here, words)


def choices(profile: Profile, found: Choices, *, width: int = style.WIDTH) -> go.Figure:
    """Draw all points of a service: which keep its SLO and rate, what forbids the others, and the best.

    Parameters
    ----------
    profile : Profile
        For its provenance.
    found : Choices
        Of `choose`.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        On the left every batch and share; on the right the share ``found.at_pct`` alone: the longest time
        from a request's arrival to its answer, behind the batch before (2L) and while its batch fills.
    """
    instance("profile", profile, Profile, "a Profile, as load_profile and measure return")
    instance("found", found, Choices, "Choices, as choose returns")
    made = style.figure(_title(found), str(profile.provenance), width=width, height=470)
    made.set_subplots(rows=1, cols=2, horizontal_spacing=0.13, column_widths=[0.55, 0.45])
    wrong, score = _map(found)
    batches = np.arange(1, found.table.batch_max + 1)
    shares = np.arange(1, 101)
    made.update_xaxes(style.axis("Share [GPU%]", range=[0.5, 100.5], dtick=20, showgrid=False), col=1)
    made.update_yaxes(style.axis("Batch [requests]", range=[0.5, batches[-1] + 0.5], showgrid=False), col=1)
    colors = [color for _, color in WRONG.values()]
    scale = [[(i + end) / 3, style.faded(c, 0.45)] for i, c in enumerate(colors) for end in (0, 1)]
    hover = "batch %{y} at %{x} GPU%<br>%{customdata:.3~g} ms, "
    for z, colorscale, low, high, words in (
        (np.where(wrong >= 0, wrong, np.nan), scale, -0.5, 2.5, "not allowed"),
        (score, [[0, style.faded(_FEASIBLE, 0.15)], [1, style.faded(_FEASIBLE, 0.95)]], 0, 1, "%{z:.0%} of the best score"),
    ):
        made.add_trace(
            go.Heatmap(
                z=np.where(np.isnan(z), None, z.round(4)),  # type: ignore[call-overload]  # a live figure sends rows as JSON, which has no NaN
                x=shares,
                y=batches,
                zmin=low,
                zmax=high,
                colorscale=colorscale,
                showscale=False,
                showlegend=False,
                customdata=found.table.ms.astype(np.float32),
                hoverongaps=False,
                hovertemplate=f"{hover}{words}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    best = found.best
    star = {"symbol": "star", "size": 16, "color": "white", "line": {"color": "black", "width": 1.5}}
    made.add_trace(
        go.Scatter(
            x=[best.gpu_pct if best else None],
            y=[best.batch if best else None],
            mode="markers",
            name="best",
            showlegend=False,
            marker=star,
            cliponaxis=False,
            hovertemplate="best: batch %{y} at %{x} GPU%<extra></extra>",
        ),
        row=1,
        col=1,
    )
    made.add_vline(found.at_pct, row=1, col=1, line={"color": style.GREY, "width": 2, "dash": "dot"})
    for text, x, y in _regions(wrong):
        box = {"bgcolor": "rgba(255,255,255,.82)", "font": {"color": "#333", "size": 12}, "borderpad": 2}
        made.add_annotation(style.note(text, x, y, xref="x", yref="y", **box))
    _add_share(made, found)
    return made


def _add_share(made: go.Figure, found: Choices) -> None:
    """Draw the right half: worst times against the batch at one share."""
    lines, good, top = _share(found)
    batches = np.arange(1, found.table.batch_max + 1)
    made.update_xaxes(style.axis(f"Batch at {found.at_pct:g} GPU% [requests]", range=[0, batches[-1] + 0.5]), col=2)
    made.update_yaxes(style.axis("Longest time to the answer [ms]", range=[0, top]), col=2)
    for (name, times), dash, color in zip(lines.items(), ("solid", "dash"), (style.COLORS[3], style.COLORS[5]), strict=True):
        made.add_trace(
            go.Scatter(
                x=batches,
                y=times,
                mode="lines",
                name=name,
                line={"color": color, "dash": dash, "width": 2.5},
                hovertemplate=f"{name}<br>batch %{{x}}: %{{y:.4~g}} ms<extra></extra>",
            ),
            row=1,
            col=2,
        )
    made.add_trace(
        go.Scatter(
            x=batches,
            y=np.where(good, 0.02 * top, np.nan),
            mode="markers",
            name="allowed",
            marker={"symbol": "square", "size": 6, "color": _FEASIBLE},
            hovertemplate="batch %{x} is allowed<extra></extra>",
        ),
        row=1,
        col=2,
    )
    here = found.best_here
    made.add_trace(
        go.Scatter(
            x=[here.batch if here else None],
            y=[max(float(t[here.batch - 1]) for t in lines.values()) if here else None],
            mode="markers",
            name="best at this share",
            marker={"symbol": "star", "size": 14, "color": "white", "line": {"color": "black", "width": 1.5}},
            hovertemplate="best here: batch %{x}<extra></extra>",
        ),
        row=1,
        col=2,
    )
    slo = found.service.slo_ms
    made.add_hline(slo, row=1, col=2, line={"color": style.GREY, "dash": "dot", "width": 2})
    made.add_annotation(style.note(f"SLO {slo:g} ms", 1, slo, xref="x2 domain", yref="y2", xanchor="right", yanchor="bottom"))
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "font": {"size": 11}},
    )
    made.update_layout(margin_t=made.layout.margin.t + 34)


def _title(found: Choices) -> str:
    asked = f"{found.service.model}: {found.service.rate_rps:,.4g} requests/s, each within {found.service.slo_ms:g} ms"
    best = found.best
    return f"{asked}: " + ("no point allows it" if best is None else f"★ batch {best.batch} at {best.gpu_pct:g} %")


def _map(found: Choices) -> tuple[NDArray[np.int64], Array]:
    """What forbids each point, and the score of the others as a part of the best; shape (batches, 100), NaN if forbidden."""
    ms, batch, share = points(found.table, [float(g) for g in range(1, 101)])
    wrong = verdicts(ms, batch, found.service.slo_ms, found.service.rate_rps)
    score = np.where(wrong < 0, score_of(ms, batch, share, found.objective), np.nan)
    return wrong, score / np.nanmax(score) if (wrong < 0).any() else score


def _regions(wrong: NDArray[np.int64]) -> list[tuple[str, float, float]]:
    """Name of each region that is large enough to hold it, with a place inside: share and batch."""
    found = []
    for kind, words in enumerate(["allowed", *(w for w, _ in WRONG.values())], start=-1):
        b, g = np.nonzero(wrong == kind)
        if len(b) > 0.04 * wrong.size:
            middle = np.argmin(((b - np.median(b)) / wrong.shape[0]) ** 2 + ((g - np.median(g)) / wrong.shape[1]) ** 2)
            found.append((words, float(np.clip(g[middle] + 1, 31, 69)), float(b[middle] + 1)))
    return found


def _share(found: Choices) -> tuple[dict[str, Array], NDArray[np.bool_], float]:
    """Longest times by batch at one share [ms], which batches are allowed, and the top of the axis."""
    ms, batch, _ = points(found.table, [found.at_pct])
    service = found.service
    fill = (batch[:, 0] - 1) * 1000 / service.rate_rps + ms[:, 0]
    good = fits(ms, batch, service.slo_ms, service.rate_rps)[:, 0]
    lines = {"behind the batch before": 2 * ms[:, 0], "while its batch fills": fill}
    return lines, good, 2.2 * service.slo_ms
