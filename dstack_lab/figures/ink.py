"""Traces of a plotly figure drawn with matplotlib: lines, points, bars and maps."""

from __future__ import annotations

import html
import re
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dstack_lab.checks import require
from dstack_lab.figures import style

Array = NDArray[np.float64]

#: Kinds of traces that this package draws.
KINDS = ("scatter", "bar", "heatmap")
#: plotly's word -> matplotlib's.
DASHES = dict(zip(style.DASHES, style.MPL_DASHES, strict=True))
SYMBOLS = {**dict(zip(style.SYMBOLS, style.MPL_MARKERS, strict=True)), "x": "X", "line-ns": "|"}
HATCHES = {"": None, "x": "xxx", "/": "///", "\\": "\\\\\\", "-": "---", "|": "|||"}
_RGBA = re.compile(r"rgba\(([\d.]+), ?([\d.]+), ?([\d.]+), ?([\d.]+)\)")


def paint(color: str | None, faint: float = 1.0) -> tuple[float, float, float, float]:
    """Colour as plotly writes it, ``#rrggbb``, a name or ``rgba()``, as parts from 0 to 1."""
    found = _RGBA.fullmatch(color or style.GREY)
    red, green, blue, alpha = (
        [float(v) / (1 if i == 3 else 255) for i, v in enumerate(found.groups())] if found else to_rgba(color or style.GREY)
    )
    return red, green, blue, alpha * faint


def pen(line: Any) -> dict[str, Any]:
    """Matplotlib's words for a line of plotly."""
    width = 2.0 if line.width is None else float(line.width)
    return {
        "color": paint(line.color),
        "linewidth": width * style.POINT,
        "linestyle": _known(DASHES, "dash", line.dash or "solid"),
    }


def key(trace: Any) -> Patch | Line2D:
    """Sign of a trace in the legend."""
    mark = trace.marker
    if trace.type == "bar":  # one look for all bars, or the first one's
        looks = (mark.color, mark.line.color, mark.line.width, mark.pattern.shape)
        face, edge, width, hatch = (_each(value, 1)[0] for value in looks)
        sign = Patch(facecolor=paint(face), edgecolor=paint(edge), linewidth=float(width) * style.POINT)
        if hatch:
            sign.set(hatch=_known(HATCHES, "pattern", hatch), hatchcolor=paint(mark.pattern.fgcolor or _over(face)))
        return sign
    mode = trace.mode or "lines"
    line = Line2D([], [], **(pen(trace.line) if "lines" in mode else {"linestyle": "none"}))
    if "markers" in mode:
        told = (mark.symbol or "circle", mark.color or trace.line.color, mark.size or 6)
        symbol, color, size = (_each(value, 1)[0] for value in told)
        line.set(**_symbol(symbol, color, min(float(size), 12.0), mark.line))
    return line


class Words(NamedTuple):
    """Words on a bar: where they go by plotly's names, and what they lie on."""

    text: str
    place: str
    anchor: str
    face: str
    hatched: bool


class Ink:
    """Draws traces; words on bars wait until the ends of all axes are known.

    Parameters
    ----------
    layout : plotly.graph_objects.Layout
    """

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self._heaps: dict[tuple[Axes, float], float] = {}
        self._words: list[tuple[Axes, Array, Words]] = []

    def draw(self, axes: Axes, trace: Any) -> None:
        """Draw one trace of the `KINDS`."""
        if trace.visible is not False:
            {"scatter": self._scatter, "bar": self._bar, "heatmap": self._map}[trace.type](axes, trace)

    # --- lines and points

    def _scatter(self, axes: Axes, trace: Any) -> None:
        x, y = _numbers(trace.x), _numbers(trace.y)
        mode, mark = trace.mode or "lines", trace.marker
        color = mark.color or trace.line.color
        for name, across in (("error_x", True), ("error_y", False)):
            bars = trace[name]
            if bars.array is not None:
                reach = np.vstack(
                    [_numbers(bars.arrayminus if bars.arrayminus is not None else bars.array), _numbers(bars.array)]
                )
                look: dict[str, Any] = {"xerr" if across else "yerr": reach, "color": paint(bars.color or color), "capsize": 2}
                axes.errorbar(x, y, linestyle="none", linewidth=(bars.thickness or 2) * style.POINT, **look)
        if "lines" in mode:
            axes.plot(x, y, drawstyle="steps-post" if trace.line.shape == "hv" else "default", **pen(trace.line))
        if "markers" in mode:
            symbols = np.broadcast_to(np.asarray(mark.symbol or "circle", dtype=object), x.shape)
            sizes = np.broadcast_to(np.asarray(6.0 if mark.size is None else mark.size, dtype=float), x.shape)
            clip = trace.cliponaxis is not False
            for symbol, size in sorted(set(zip(symbols, sizes, strict=True))):
                some = (symbols == symbol) & (sizes == size)
                if size > 0:
                    look = _symbol(symbol, color, size, mark.line)
                    axes.plot(x[some], y[some], linestyle="none", clip_on=clip, zorder=3, **look)
        if "text" in mode:
            _beside(axes, trace, x, y)

    # --- bars

    def _bar(self, axes: Axes, trace: Any) -> None:
        lying = trace.orientation == "h"
        length, at = _numbers(trace.x if lying else trace.y), _numbers(trace.y if lying else trace.x)
        if not np.isfinite(length).any():
            return
        wide = np.broadcast_to(_numbers(1 - (self.layout.bargap or 0.2) if trace.width is None else trace.width), at.shape)
        base = np.zeros(at.shape) if trace.base is None else _numbers(trace.base).copy()
        if self.layout.barmode == "stack" and trace.base is None:
            for i, place in enumerate(at):
                base[i] = self._heaps.get((axes, float(place)), 0.0)
                self._heaps[axes, float(place)] = base[i] + np.nan_to_num(length[i])
        low, high = np.column_stack([base, at - wide / 2]), np.column_stack([base + length, at + wide / 2])
        boxes = np.hstack([low, high]) if lying else np.hstack([low[:, ::-1], high[:, ::-1]])  # x0, y0, x1, y1
        mark = trace.marker
        parts = [_each(v, len(at)) for v in (mark.color, mark.line.color, mark.line.width or 0, mark.pattern.shape or "")]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, kind in enumerate(zip(*parts, strict=True)):
            groups.setdefault(kind, []).append(i)
        for (face, edge, width, hatch), some in sorted(groups.items(), key=lambda item: item[0][2]):
            x0, y0, x1, y1 = boxes[some].T
            corners = np.stack([np.column_stack(c) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], axis=1)
            look: dict[str, Any] = {"facecolor": paint(face), "edgecolor": paint(edge), "linewidth": float(width) * style.POINT}
            if hatch:
                look["hatch"] = _known(HATCHES, "pattern", hatch)
                look["hatchcolor"] = paint(mark.pattern.fgcolor or _over(face), 0.6)
            axes.add_collection(PolyCollection(list(corners), zorder=1 + 0.1 * float(width), **look))
        axes.autoscale_view()
        if trace.text is not None:
            place = trace.textposition or "auto"
            for i, text in enumerate(_each(trace.text, len(at))):
                if text:
                    anchor = trace.insidetextanchor or "end"
                    told = Words(html.unescape(str(text)), place, anchor, parts[0][i], bool(parts[3][i]))
                    self._words.append((axes, boxes[i], told))

    def write(self) -> None:
        """Write the words on or beside bars: lying or standing, or not at all where they do not fit."""
        for axes, box, told in self._words:
            (left, low), (right, high) = axes.transData.transform(box.reshape(2, 2)) * 72 / axes.figure.dpi / style.POINT
            wide, high = right - left, abs(high - low)
            fits = style.fitting(told.text, wide, high)
            size, turn = fits or (style.BAR_SIZES[0], 0)
            middle = (box[1] + box[3]) / 2
            look: dict[str, Any] = {"fontsize": size * style.TEXT, "va": "center", "textcoords": "offset points"}
            if told.place == "outside" or (told.place == "auto" and not fits):
                axes.annotate(told.text, (box[2], middle), (3, 0), color=style.GREY, annotation_clip=False, **look)
            elif fits and told.anchor == "start":
                axes.annotate(told.text, (box[0], middle), (3, 0), color=_over(told.face), **look)
            elif fits:
                look |= {"ha": "center", "color": _over(told.face), "rotation": turn}
                if told.hatched:
                    look["bbox"] = {"facecolor": paint(told.face), "edgecolor": "none", "pad": 1}
                axes.annotate(told.text, ((box[0] + box[2]) / 2, middle), (0, 0), **look)

    # --- maps

    def _map(self, axes: Axes, trace: Any) -> None:
        z = np.asarray(trace.z, dtype=float)
        x = _middles(trace.x, trace.x0, trace.dx, z.shape[1])
        y = _middles(trace.y, trace.y0, trace.dy, z.shape[0])
        part = np.clip((z - trace.zmin) / (trace.zmax - trace.zmin), 0, 1)
        stops = np.array([stop for stop, _ in trace.colorscale], dtype=float)
        colors = np.array([paint(color) for _, color in trace.colorscale])
        rgba = np.stack([np.interp(part, stops, colors[:, i]) for i in range(4)], axis=-1)
        rgba[np.isnan(z)] = 0
        half_x, half_y = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5, (y[1] - y[0]) / 2 if len(y) > 1 else 0.45
        extent = (x[0] - half_x, x[-1] + half_x, y[0] - half_y, y[-1] + half_y)
        axes.imshow(rgba, extent=extent, origin="lower", aspect="auto", interpolation="nearest")


def _known(words: dict[str, Any], what: str, word: str) -> Any:
    """Matplotlib's word for one of plotly's."""
    require(word in words, what, word, f"one of {', '.join(filter(None, words))}")
    return words[word]


def _symbol(symbol: str, color: str | None, size: float, line: Any) -> dict[str, Any]:
    """Matplotlib's words for a marker of plotly; ``-open`` is hollow."""
    name = symbol.removesuffix("-open")
    ink, edge = paint(color), line.color and paint(line.color)
    width = (line.width or 0) * style.POINT
    look = {"marker": _known(SYMBOLS, "symbol", name), "markersize": size * style.POINT * (1.25 if name == "star" else 1)}
    if name == "line-ns":
        return {**look, "markeredgecolor": edge or ink, "markeredgewidth": width or 1}
    if name != symbol:
        return {**look, "markerfacecolor": "none", "markeredgecolor": ink, "markeredgewidth": width or 1}
    return {**look, "markerfacecolor": ink, "markeredgecolor": edge or ink, "markeredgewidth": width}


def _beside(axes: Axes, trace: Any, x: Array, y: Array) -> None:
    """Words beside points."""
    up, side = (trace.textposition or "middle center").split()
    ha, dx = {"left": ("right", -6), "right": ("left", 6), "center": ("center", 0)}[side]
    va, dy = {"top": ("bottom", 5), "bottom": ("top", -5), "middle": ("center", 0)}[up]
    font = trace.textfont
    for at, text in zip(zip(x, y, strict=True), _each(trace.text, len(x)), strict=True):
        look: dict[str, Any] = {"ha": ha, "va": va, "color": paint(font.color), "fontsize": (font.size or 12) * style.TEXT}
        axes.annotate(html.unescape(text), at, (dx, dy), textcoords="offset points", annotation_clip=False, **look)


def _over(color: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue, alpha = paint(color)
    return "black" if alpha == 0 or 0.299 * red + 0.587 * green + 0.114 * blue > 0.47 else "white"


def _numbers(values: Any) -> Array:
    """Numbers of a plotly property; what is missing is NaN."""
    return np.asarray(values, dtype=float)


def _each(value: Any, n: int) -> list[Any]:
    """One value for each of `n` marks, from one or from n."""
    return [value] * n if value is None or isinstance(value, str) or np.isscalar(value) else list(value)


def _middles(values: Any, start: Any, step: Any, n: int) -> Array:
    """Middles of the cells of a map along one side."""
    return _numbers(values) if values is not None else _numbers(float(start or 0) + float(step or 1) * np.arange(n))
