"""Policies side by side."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import instance, positive, require
from dstack_lab.figures import style
from dstack_lab.metrics import ALL
from dstack_lab.provenance import Provenance

#: Metrics of a comparison and the titles of their axes.
METRICS = {"goodput_rps": "Goodput [requests/s]", "slo_attainment": "SLO attainment [fraction]", "p99_ms": "p99 latency [ms]"}


def gather(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str], list[str], int]:
    """Check a comparison's table and average repeated runs.

    Returns
    -------
    means : pandas.DataFrame
        One row per (policy, service), the index, with the columns of `METRICS`.
    policies, services : list of str
        In order of appearance, services without the row for all.
    runs : int
        Most runs behind one row.

    Raises
    ------
    ValueError
        If a column is missing or there is nothing to compare.
    """
    need = ["policy", "service", *METRICS]
    instance("table", table, pd.DataFrame, "a pandas DataFrame")
    require(set(need) <= set(table.columns), "table columns", list(table.columns), f"at least {need}")
    require(len(table) > 0, "table rows", 0, "1 or more")
    table = table.assign(policy=table["policy"].astype(str), service=table["service"].astype(str))
    policies = list(dict.fromkeys(table["policy"]))
    services = [s for s in dict.fromkeys(table["service"]) if s != ALL]
    grouped = table.groupby(["policy", "service"], sort=False)
    return grouped[list(METRICS)].mean(), policies, services, int(grouped.size().max())


def origin_of(
    table: pd.DataFrame, provenance: Provenance | str | Iterable[Provenance | str] | None, policies: list[str], runs: int
) -> str:
    """Subtitle of a comparison: the argument, else a column ``provenance``, else ``table.attrs["provenance"]``."""
    if provenance is None:
        provenance = list(table["provenance"]) if "provenance" in table.columns else table.attrs.get("provenance")
    return style.told(provenance) + (f"; means of {runs} runs" if runs > 1 else "")


def comparison(
    table: pd.DataFrame,
    provenance: Provenance | str | Iterable[Provenance | str] | None = None,
    bound_rps: float | None = None,
    *,
    width: int = style.WIDTH,
) -> go.Figure:
    """Draw policies side by side: goodput (stacked by service), SLO attainment and p99 latency.

    Parameters
    ----------
    table : pandas.DataFrame
        Several `lab.summary` frames concatenated, with a column ``policy``; several runs of a policy
        are averaged.
    provenance : Provenance, str or several of them, optional
        Where the numbers come from: ``trace.provenance``. By default the table's column
        ``provenance`` or ``table.attrs["provenance"]``; without any the subtitle says so.
    bound_rps : float, optional
        Goodput that no schedule can pass: ``lab.bound(services, profile).total_rps``.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    ValueError
        If a column is missing, the table is empty, or the bound is not above 0.
    """
    means, policies, services, runs = gather(table)
    limit = None if bound_rps is None else positive("bound_rps", bound_rps)
    origin = origin_of(table, provenance, policies, runs)
    left = 26 + 8 * max(map(len, policies))
    made = style.figure("Policies side by side", origin, width=width, height=220 + 40 * len(policies), left=left)
    made.set_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.05)
    made.update_layout(barmode="stack", showlegend=True, uniformtext={"minsize": 8, "mode": "hide"})
    made.update_layout(legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 12}})
    made.update_layout(margin_t=made.layout.margin.t + 30, margin_b=70)
    places = {policy: i for i, policy in enumerate(policies)}
    made.update_yaxes(
        style.axis(None, tickvals=list(places.values()), ticktext=[style.plain(p) for p in policies], showgrid=False),
        range=[len(policies) - 0.4, -0.6],
    )
    for column, title in enumerate(METRICS.values(), start=1):
        made.update_xaxes(style.axis(title, rangemode="tozero"), col=column)
    least = attained_from(means)
    made.update_xaxes(range=[least - 0.03 * (1 - least), 1 + 0.03 * (1 - least)], col=2)
    low, high = spans(means)
    made.update_xaxes(style.log_axis(METRICS["p99_ms"], low, high, most=4) if low else {"range": [0, high]}, col=3)
    for name, cue in style.cues(services).items():
        mine = means.xs(name, level="service").reindex(policies)
        y = np.arange(len(policies))
        shift = _shift(services.index(name), len(services))
        said = f"<b>{style.plain(name)}</b>, %{{customdata}}: %{{x:.4~g}}"
        shared = {"name": style.plain(name), "legendgroup": name, "customdata": [style.plain(p) for p in policies]}
        made.add_trace(
            go.Bar(
                **shared,
                x=mine["goodput_rps"].to_numpy(),
                y=y,
                orientation="h",
                width=0.6,
                showlegend=False,
                text=[cue.glyph] * len(policies),
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                marker=cue.bar,
                hovertemplate=f"{said} requests/s<extra></extra>",
            ),
            row=1,
            col=1,
        )
        for column, (metric, unit) in enumerate((("slo_attainment", ""), ("p99_ms", " ms")), start=2):
            made.add_trace(
                go.Scatter(
                    **shared,
                    x=mine[metric].to_numpy(),
                    y=y + shift,
                    mode="markers",
                    showlegend=column == 2,
                    marker={"color": cue.color, "symbol": cue.symbol, "size": 9},
                    hovertemplate=f"{said}{unit}<extra></extra>",
                ),
                row=1,
                col=column,
            )
    if limit is not None:
        made.add_vline(limit, row=1, col=1, line={"color": style.GREY, "dash": "dash", "width": 2})
        made.update_xaxes(title_text=f"{METRICS['goodput_rps']}<br>┆ bound {limit:,.4g}", col=1)
    return made


def attained_from(means: pd.DataFrame) -> float:
    """Where the axis of SLO attainment begins: dots, unlike bars, need no zero."""
    least = means["slo_attainment"].min()
    return 0.0 if np.isnan(least) or least < 0.5 else float(min(0.9, np.floor(10 * least) / 10))


def spans(means: pd.DataFrame) -> tuple[float, float]:
    """Ends of the axis of p99 latency [ms]; the low one is above 0 where it must be logarithmic."""
    low, high = means["p99_ms"].min(), means["p99_ms"].max()
    if np.isnan(high):
        return 0.0, 1.0
    return (float(low) / 1.2, float(high) * 1.2) if high > 12 * low > 0 else (0.0, float(high) * 1.08)


def _shift(i: int, n: int) -> float:
    """Vertical place of service `i` of `n` inside a policy's row."""
    return 0.0 if n == 1 else 0.5 * (i / (n - 1) - 0.5)
