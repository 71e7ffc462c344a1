"""What a network is made of: the time of each kernel, what bounds it, and the share it can use."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dstack_lab.checks import count, instance, percent
from dstack_lab.figures import style
from dstack_lab.kernel_model import KernelModel

#: What a kernel waits for -> words, colour, hatch.
BOUNDS = {
    "compute": ("arithmetic, in waves of blocks", "#0072B2", ""),
    "memory": ("memory bandwidth", "#E69F00", "/"),
    "launch": ("launch", "#CC79A7", "x"),
}
_TIME, _KNEE = "Time [ms]", "Knee [GPU%]"


def anatomy(
    model: KernelModel,
    batch: int = 1,
    gpu_pct: float = 100,
    *,
    table: pd.DataFrame | None = None,
    width: int = style.WIDTH,
) -> go.Figure:
    """Draw every kernel of a network: its time at a share by what bounds it, and the share beyond which it is hardly faster.

    Parameters
    ----------
    model : KernelModel
    batch : int
    gpu_pct : float
        Share at which times are drawn.
    table : pandas.DataFrame, optional
        ``model.breakdown(batch, gpu_pct)`` where it is known already.
    width : int
        Width of the figure [px].

    Returns
    -------
    plotly.graph_objects.Figure
        Kernels in order of launch. Kernels whose knee lies above the line would use more than `gpu_pct`.

    Raises
    ------
    ValueError
        If the batch or share is not allowed.
    """
    instance("model", model, KernelModel, "a KernelModel of lab.kernel_model")
    if table is None:
        table = model.breakdown(count("batch", batch), percent("gpu_pct", gpu_pct))
    title, origin = _titles(model, table, batch, gpu_pct)
    made = style.figure(title, origin, width=width, height=550, right=90)
    made.set_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.58, 0.42])
    made.update_layout(barmode="overlay", bargap=0.1, showlegend=True)
    made.update_layout(legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}})
    made.update_layout(margin_t=made.layout.margin.t + 50)
    number = np.arange(1, len(table) + 1)
    made.update_xaxes(style.axis(None, range=[0.4, len(table) + 0.6], showgrid=False))
    made.update_xaxes(title_text="Kernel, in order of launch", row=2)
    made.update_yaxes(style.axis(_TIME, rangemode="tozero"), row=1)
    made.update_yaxes(style.axis(_KNEE, range=[0, 106], dtick=25), row=2)
    told = table[["operator", "units", "compute_ms", "memory_ms", "serial_ms", "knee_pct"]].to_numpy()
    hover = (
        "<b>%{customdata[0]}</b>, kernel %{x}: %{y:.3~g} ms<br>%{customdata[1]} blocks; arithmetic %{customdata[2]:.3~g}, "
        "memory %{customdata[3]:.3~g}, launch %{customdata[4]:.3~g} ms<br>knee %{customdata[5]:.0f} GPU%<extra></extra>"
    )
    for kind, (words, color, hatch) in BOUNDS.items():
        mine = (table["bound"] == kind).to_numpy()
        made.add_trace(
            go.Bar(
                name=words,
                x=number[mine] if mine.any() else [None],
                y=table["service_ms"].to_numpy()[mine] if mine.any() else [None],
                customdata=told[mine] if mine.any() else None,
                marker={
                    "color": color,
                    "line": {"width": 0.5, "color": style.GREY},
                    "pattern": {"shape": hatch, "size": 5, "fillmode": "overlay"},
                },
                hovertemplate=hover,
            ),
            row=1,
            col=1,
        )
    knees = table["knee_pct"].to_numpy(dtype=float)
    above = knees > gpu_pct
    for name, mine, symbol in (("could use more", above, "triangle-up"), ("has enough", ~above, "circle")):
        made.add_trace(
            go.Scatter(
                name=name,
                x=number[mine] if mine.any() else [None],
                y=knees[mine] if mine.any() else [None],
                mode="markers",
                marker={"symbol": symbol, "size": 8, "color": style.COLORS[3] if symbol != "circle" else style.COLORS[2]},
                hovertemplate=f"kernel %{{x}}: knee %{{y:.0f}} GPU%, {name}<extra></extra>",
            ),
            row=2,
            col=1,
        )
    made.add_hline(gpu_pct, row=2, col=1, line={"color": style.GREY, "dash": "dot", "width": 2})
    made.add_annotation(style.note(f"{gpu_pct:g} GPU%", 1, gpu_pct, xref="x2 domain", yref="y2", xanchor="left", xshift=4))
    return made


def parts_of(table: pd.DataFrame) -> dict[str, float]:
    """Part of the service time that kernels of each bound take [%]."""
    whole = float(table["service_ms"].sum())
    return {kind: 100 * float(table.loc[table["bound"] == kind, "service_ms"].sum()) / whole for kind in BOUNDS}


def _titles(model: KernelModel, table: pd.DataFrame, batch: int, gpu_pct: float) -> tuple[str, str]:
    ms = table["service_ms"].sum()
    title = f"{model.kernels.name}, batch {batch} at {gpu_pct:g} GPU%: {len(table)} kernels, {ms:.3g} ms"
    kind = "kernels measured" if model.kernels.measured else "simulated"
    return title, f"{kind}, {model.gpu.name}-like, {model.gpu.sms} SMs, kernel model, launched as a graph"
