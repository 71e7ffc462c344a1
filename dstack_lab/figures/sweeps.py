"""Policies over loads, and against a baseline: means with their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import instance, require
from dstack_lab.figures import style
from dstack_lab.figures.races import origin_of
from dstack_lab.metrics import ALL

#: Metrics of `lab.compare` and the titles of their axes.
TITLES = {
    "bound_ratio": "Goodput [part of the bound]",
    "goodput_rps": "Goodput [requests/s]",
    "jain": "Jain index of GPU time",
    "p50_ms": "p50 latency [ms]",
    "p99_ms": "p99 latency [ms]",
    "slo_attainment": "SLO attainment [fraction]",
    "throughput_rps": "Throughput [requests/s]",
    "utilization": "Utilization [fraction]",
}
#: Differences from the baseline, and theirs.
GAINS = {
    "goodput_rps_gain": "Goodput gained [requests/s]",
    "slo_attainment_gain": "SLO attainment gained [fraction]",
}
RIGHT = 150


def loads(table: pd.DataFrame, metric: str = "bound_ratio", service: str = ALL, *, width: int = style.WIDTH) -> go.Figure:
    """Draw a metric against the load, one line per policy; bars are the 95 % interval of the mean.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `lab.compare`.
    metric : str
        One of `TITLES`.
    service : str
        One service, or "all".
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        A load that a policy cannot schedule leaves a gap in its line.

    Raises
    ------
    ValueError
        If a column is missing, or the metric or service unknown.
    """
    rows, policies, origin = _rows(table, metric, TITLES, service)
    what = "all services" if service == ALL else style.plain(service)
    made = style.figure(f"{TITLES[metric].split(' [')[0]} against load, {what}", origin, width=width, height=470, right=RIGHT)
    x = rows["bound_load"].to_numpy()
    made.update_xaxes(style.axis("Offered load [part of the bound]", range=[x.min() - 0.03, x.max() + 0.03]))
    made.update_yaxes(style.axis(TITLES[metric], rangemode="tozero"))
    ends = []
    for name, cue in style.cues(policies).items():
        mine = rows[rows["policy"] == name].sort_values("bound_load")
        mean = mine[metric].to_numpy(dtype=float)
        up, down = mine[f"{metric}_high"].to_numpy(dtype=float) - mean, mean - mine[f"{metric}_low"].to_numpy(dtype=float)
        bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}
        made.add_trace(
            go.Scatter(
                name=style.plain(name),
                x=mine["bound_load"].to_numpy(),
                y=mean,
                error_y=bars if np.isfinite(up).any() else None,
                mode="lines+markers",
                line={"color": cue.color, "dash": cue.dash, "width": 2},
                marker={"color": cue.color, "symbol": cue.symbol, "size": 8},
                hovertemplate=f"<b>{style.plain(name)}</b> at %{{x:.2f}} of the bound: %{{y:.4~g}}<extra></extra>",
            )
        )
        seen = np.isfinite(mean)
        if seen.any():
            ends.append((name, cue, float(mean[seen][-1])))
    high = float(np.nanmax(rows[[metric, f"{metric}_high"]].to_numpy(dtype=float))) if ends else 1.0
    made.update_yaxes(range=[0, 1.06 * high])
    for (name, cue, _), y in zip(ends, style.spread([y for _, _, y in ends], 0.052 * high), strict=True):
        made.add_annotation(style.note(style.label(cue, name), 1.01, y, xref="paper", xanchor="left"))
    if metric == "bound_ratio":
        made.add_hline(1, line={"color": style.GREY, "dash": "dash", "width": 2})
    return made


def gains(table: pd.DataFrame, metric: str = "slo_attainment_gain", service: str = ALL, *, width: int = style.WIDTH) -> go.Figure:
    """Draw what each policy gains over the baseline: a dot for the mean, a line for its 95 % interval.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `lab.compare` or `lab.ablate`, at one load; the baseline itself may be among the policies.
    metric : {"slo_attainment_gain", "goodput_rps_gain"}
    service : str
        One service, or "all".
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        A line that crosses zero: these seeds do not show a difference.

    Raises
    ------
    ValueError
        If a column is missing, the metric or service unknown, or there are several loads.
    """
    rows, names, origin = _rows(table, metric, GAINS, service)
    several = sorted(set(rows["load"]))
    require(len(several) == 1, "loads in table", several, "one: choose with table[table['load'] == ...]")
    over, load = table.attrs.get("baseline", "the baseline"), rows["bound_load"].iloc[0]
    title = f"{GAINS[metric].split(' [')[0]} over {over}, load {load:.2g} of the bound"
    left = 26 + 8 * max(map(len, names))
    made = style.figure(title, origin, width=width, height=190 + 34 * len(names), left=left)
    mean, low, high = (rows[f"{metric}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
    y = np.arange(len(names))
    made.update_xaxes(style.axis(GAINS[metric]))
    made.update_yaxes(style.axis(None, tickvals=y.tolist(), ticktext=[style.plain(n) for n in names], showgrid=False))
    made.update_yaxes(range=[len(names) - 0.4, -0.6])
    made.add_vline(0, line={"color": style.GREY, "dash": "dash", "width": 2})
    away = (low > 0) | (high < 0)  # NaN, of one seed, is not away
    made.add_trace(
        go.Scatter(
            x=mean,
            y=y,
            mode="markers",
            error_x={"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "thickness": 2},
            marker={"size": 10, "color": style.COLORS[0], "symbol": np.where(away, "circle", "circle-open").tolist()},
            customdata=np.column_stack([low, high]),
            hovertext=[style.plain(n) for n in names],
            hovertemplate=(
                "<b>%{hovertext}</b>: %{x:+.4~g}<br>95 % interval %{customdata[0]:+.4~g} to %{customdata[1]:+.4~g}<extra></extra>"
            ),
        )
    )
    return made


def _rows(table: pd.DataFrame, metric: str, known: dict[str, str], service: str) -> tuple[pd.DataFrame, list[str], str]:
    """Rows of one service, checked; the policies in them; and where they come from."""
    require(metric in known, "metric", metric, f"one of {', '.join(known)}")
    instance("table", table, pd.DataFrame, "a pandas DataFrame of lab.compare")
    need = ["policy", "load", "bound_load", "service", "seeds", metric, f"{metric}_low", f"{metric}_high"]
    require(set(need) <= set(table.columns), "table columns", list(table.columns), f"at least {need}")
    rows = table[table["service"] == service]
    require(len(rows) > 0, "service", service, f"one of {list(dict.fromkeys(table['service']))}")
    policies = list(dict.fromkeys(rows["policy"]))
    return rows, policies, origin_of(rows, None, policies, int(rows["seeds"].max()))
