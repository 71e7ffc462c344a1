"""A figure that stays and changes: one FigureWidget, brought up to a new plotly figure with one message."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from dstack_lab.figures.style import CONFIG


def live(made: go.Figure) -> go.FigureWidget:
    """Return a FigureWidget of `made`, without the button that uploads its data."""
    widget = go.FigureWidget(made.data, _layout(made))
    widget._config = {**widget._config, **CONFIG}
    return widget


def show(widget: go.FigureWidget, made: go.Figure) -> None:
    """Make `widget` look like `made`; only what differs travels to the browser.

    Traces stay where both figures have the same kinds of them in the same order, and are replaced otherwise.
    """
    same = [old.type for old in widget.data] == [new.type for new in made.data]
    with widget.batch_update():
        if same:
            for old, new in zip(widget.data, made.data, strict=True):
                _apply(old, new.to_plotly_json(), keep=("uid", "type"))
        _apply(widget.layout, _layout(made))
    if not same:
        widget.data = []
        widget.add_traces(made.data)


def _layout(made: go.Figure) -> dict[str, Any]:
    """Layout of `made`, with its subtitle as a line of the title.

    A browser measures the title to place the subtitle, and JupyterLab draws a widget before it can be measured:
    the two would lie on each other until the first change.
    """
    layout: dict[str, Any] = made.layout.to_plotly_json()
    title = layout.get("title", {})
    subtitle = title.pop("subtitle", {})
    if subtitle.get("text"):
        title["text"] += f'<br><span style="font-size: {subtitle["font"]["size"]}px">{subtitle["text"]}</span>'
        title["pad"] = {**title.get("pad", {}), "t": title.get("pad", {}).get("t", 0) + 12}  # more lines are set higher
    return layout


def marks(figure: go.Figure) -> int:
    """Count what a figure draws: points, bars and cells of its visible traces."""
    return sum(_size(trace) for trace in figure.data if trace.visible is not False)


def _size(trace: Any) -> int:
    if trace.type == "heatmap":
        return int(np.isfinite(np.asarray(trace.z, dtype=float)).sum())
    x = trace.x if trace.x is not None else trace.y
    return sum(v is not None for v in x) if x is not None else 0


def _apply(old: Any, new: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
    """Set every property of `old` that differs from `new`, one by one, and clear those that `new` lacks."""
    for key in old.to_plotly_json():
        if key not in new and key not in keep:
            old[key] = None
    for key, value in new.items():
        if isinstance(value, dict) and old[key] is not None:
            _apply(old[key], value)
        elif key not in keep:
            old[key] = value
