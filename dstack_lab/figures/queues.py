"""Waiting against utilization."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import instance, require
from dstack_lab.figures import style
from dstack_lab.provenance import Provenance


def waits(
    simulated: pd.DataFrame, formulas: pd.DataFrame, provenance: Provenance | str | None = None, *, width: int = style.WIDTH
) -> go.Figure:
    """Draw mean waits over utilization: dots from runs, lines from closed forms, on a logarithmic axis.

    Parameters
    ----------
    simulated, formulas : pandas.DataFrame
        Columns ``kind`` (which queue; the same word has the same colour in both), ``utilization`` [fraction]
        and ``wait_ms``, the mean wait before service [ms]. Waits of 0 are not drawn.
    provenance : Provenance or str, optional
        Of the runs.
    width : int
        Width of the figure [px].

    Raises
    ------
    ValueError
        If a column is missing or nothing can be drawn.
    """
    for name, table in (("simulated", simulated), ("formulas", formulas)):
        instance(name, table, pd.DataFrame, "a pandas DataFrame")
        require(
            {"kind", "utilization", "wait_ms"} <= set(table.columns),
            f"{name} columns",
            list(table.columns),
            "kind, utilization, wait_ms",
        )
    drawn = [table[np.isfinite(table["wait_ms"]) & (table["wait_ms"] > 0)] for table in (simulated, formulas)]
    every = pd.concat(drawn)["wait_ms"]
    require(len(every) > 0, "wait_ms", [], "some above 0")
    made = style.figure("Mean wait before service", style.told(provenance), width=width, height=440, right=150)
    made.update_xaxes(style.axis("Utilization [fraction]", range=[0, 1]))
    made.update_yaxes(style.log_axis("Mean wait [ms]", every.min() / 1.2, every.max() * 1.3))
    kinds = style.cues(dict.fromkeys(pd.concat([simulated["kind"], formulas["kind"]])))
    ends: dict[str, float] = {}
    for kind, cue in kinds.items():
        for table, mode, what in zip(drawn, ("markers", "lines"), ("simulated", "closed form"), strict=True):
            mine = table[table["kind"] == kind].sort_values("utilization")
            if not len(mine):
                continue
            ends[kind] = float(np.log10(mine["wait_ms"].iloc[-1]))
            made.add_trace(
                go.Scatter(
                    x=mine["utilization"].to_numpy(dtype=float),
                    y=mine["wait_ms"].to_numpy(dtype=float),
                    mode=mode,
                    name=f"{style.plain(kind)}, {what}",
                    line={"color": cue.color, "dash": cue.dash, "width": 2},
                    marker={"color": cue.color, "symbol": cue.symbol, "size": 9},
                    hovertemplate=f"<b>{style.plain(kind)}</b>, {what}: %{{y:.4~g}} ms at %{{x:.2f}}<extra></extra>",
                )
            )
    height = float(np.log10(every.max() * 1.3) - np.log10(every.min() / 1.2))
    for kind, y in zip(ends, style.spread(list(ends.values()), 0.06 * height), strict=True):
        made.add_annotation(style.note(style.label(kinds[kind], kind), 1.01, y, xref="paper", xanchor="left"))
    return made
