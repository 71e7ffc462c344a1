"""One page of paper: the title, axes, legend and notes of a plotly figure, in the same places."""

from __future__ import annotations

import html
import re
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, NullLocator
from matplotlib.transforms import Transform, blended_transform_factory

from dstack_lab.checks import require
from dstack_lab.figures import style
from dstack_lab.figures.ink import KINDS, Ink, key, paint, pen

_LABEL = re.compile(r'<span style="color:(#\w{6})">(.)</span> (.*)', re.DOTALL)
_SMALLER = re.compile(r'<span style="font-size: [\d.]+px">(.*)</span>', re.DOTALL)
#: Air around words, as plotly leaves it [px].
AIR = 2
_SIDES = {"left": "left", "center": "center", "right": "right", "top": "top", "middle": "center", "bottom": "bottom"}


class Sheet:
    """A matplotlib page and the plotly figure that goes onto it.

    Parameters
    ----------
    page : matplotlib.figure.Figure
        Empty, of the figure's size.
    figure : plotly.graph_objects.Figure
    """

    def __init__(self, page: Figure, figure: go.Figure) -> None:
        self.page, self.figure, self.layout = page, figure, figure.layout
        margin = self.layout.margin
        wide, high = self.layout.width, self.layout.height
        self._left, self._low = margin.l / wide, margin.b / high
        self._wide, self._high = 1 - (margin.l + margin.r) / wide, 1 - (margin.t + margin.b) / high
        self.axes: dict[tuple[str, str], Axes] = {}

    def draw(self) -> None:
        """Draw everything.

        Raises
        ------
        ValueError
            For a kind of trace, or a look of one, that this package does not use.
        """
        for trace in self.figure.data:
            require(trace.type in KINDS, "trace", trace.type, f"one of {', '.join(KINDS)}")
        pairs = dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in self.figure.data)
        for x, y in pairs or {("x", "y"): None}:
            self.axes[x, y] = self._made(x, y)
        ink = Ink(self.layout)
        for trace in self.figure.data:
            ink.draw(self.axes[trace.xaxis or "x", trace.yaxis or "y"], trace)
        for (x, y), axes in self.axes.items():
            self._span(axes.xaxis, self._axis(x))
            self._span(axes.yaxis, self._axis(y))
        ink.write()
        for shape in self.layout.shapes:
            self._rule(shape)
        for note in self.layout.annotations:
            self._note(note)
        self._legend()
        self._title()

    def _axis(self, name: str) -> Any:
        """Layout of an axis: ``x2`` -> ``xaxis2``."""
        return self.layout[f"{name[0]}axis{name[1:]}"]

    def _across(self, x: float) -> float:
        """From plotly's paper to the page, to the right."""
        return float(self._left + x * self._wide)

    def _up(self, y: float) -> float:
        return float(self._low + y * self._high)

    def _made(self, x: str, y: str) -> Axes:
        """Axes of one pane, with titles and ticks."""
        across, up = self._axis(x), self._axis(y)
        x0, x1 = across.domain or (0.0, 1.0)
        y0, y1 = up.domain or (0.0, 1.0)
        place = (self._across(x0), self._up(y0), (x1 - x0) * self._wide, (y1 - y0) * self._high)
        axes = self.page.add_axes(place)
        size = (self.layout.font.size or 12) * style.TEXT
        axes.tick_params(labelsize=0.95 * size, length=3.5)
        for axis, told in ((axes.xaxis, across), (axes.yaxis, up)):
            if told.visible is False:
                axes.set_axis_off()
            if told.type == "log":
                axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            if told.title.text:
                axis.set_label_text(_words(told.title.text), fontsize=size)
            if told.showgrid is not False:
                axis.grid(visible=True)
            if told.showticklabels is False:
                axis.set_tick_params(labelleft=False, labelbottom=False, length=0)
        return axes

    def _span(self, axis: Any, told: Any) -> None:
        """Ends and ticks of an axis, once everything is drawn."""
        log, limits = told.type == "log", f"{axis.axis_name}lim"
        if told.range is not None:
            axis.axes.set(**{limits: [10.0**v if log else float(v) for v in told.range]})
        elif told.rangemode == "tozero":
            axis.axes.set(**{limits: (0.0, axis.get_view_interval()[1])})
        if told.tickvals is not None:
            words = told.ticktext if told.ticktext is not None else [f"{v:g}" for v in told.tickvals]
            axis.set_ticks(list(told.tickvals), [_words(str(w)) for w in words])
        elif told.dtick:
            axis.set_major_locator(MultipleLocator(told.dtick))
        if log:
            axis.set_minor_locator(NullLocator())

    def _rule(self, shape: Any) -> None:
        """A line across a pane."""
        _, axes = self._pane(shape.xref or "x", shape.yref or "y")
        where = blended_transform_factory(self._along(shape.xref, axes), self._along(shape.yref, axes))
        look = {**pen(shape.line), "transform": where, "zorder": 2.5}
        axes.plot([shape.x0, shape.x1], [shape.y0, shape.y1], scalex=False, scaley=False, **look)

    def _pane(self, xref: str, yref: str) -> tuple[tuple[str, str], Axes]:
        """Pane that a shape or a note refers to; the first one if to the paper alone."""
        wanted = [ref.split()[0] for ref in (xref, yref)]
        for pair, axes in self.axes.items():
            if all(want in ("paper", name) for want, name in zip(wanted, pair, strict=True)):
                return pair, axes
        raise ValueError(f"reference of a note = {wanted}: must be one of {list(self.axes)}")

    def _along(self, ref: str | None, axes: Axes) -> Transform:
        """Coordinates along one side: of the page, the pane or, where nothing is said, the data."""
        if ref == "paper":
            return self.page.transFigure
        return axes.transAxes if (ref or "").endswith("domain") else axes.transData

    def _note(self, note: Any) -> None:
        """Words somewhere."""
        (across, up), axes = self._pane(note.xref or "x", note.yref or "y")
        at, sides, where = [], [], []
        for side, ref, value, anchor in (("x", note.xref, note.x, note.xanchor), ("y", note.yref, note.y, note.yanchor)):
            free = ref == "paper"
            inside = free or (ref or "").endswith("domain")
            where.append(self._along(ref, axes))
            log = not inside and self._axis(across if side == "x" else up).type == "log"
            at.append((self._across(value) if side == "x" else self._up(value)) if free else 10.0**value if log else value)
            ends = ("left", "center", "right") if side == "x" else ("bottom", "center", "top")
            closest = ends[0 if value <= 1 / 3 else 2 if value >= 2 / 3 else 1] if inside else "center"
            sides.append(closest if anchor in (None, "auto") else _SIDES[anchor])
        font = note.font
        look: dict[str, Any] = {
            "xycoords": blended_transform_factory(*where),
            "textcoords": "offset points",
            "annotation_clip": False,
            "ha": sides[0],
            "va": sides[1],
            "color": font.color or style.GREY,
            "fontsize": (font.size or 12) * style.TEXT,
        }
        if note.bgcolor:
            look["bbox"] = {"facecolor": paint(note.bgcolor), "edgecolor": "none", "pad": (note.borderpad or 1) * style.POINT}
        away = {"left": 1, "bottom": 1, "right": -1, "top": -1, "center": 0}  # plotly puts a little air around words
        right, rise = ((more or 0) + AIR * away[side] for more, side in zip((note.xshift, note.yshift), sides, strict=True))
        shift = (right * style.POINT, rise * style.POINT)
        found = _LABEL.fullmatch(note.text)
        if found:
            axes.annotate(found[2], (at[0], at[1]), shift, **{**look, "color": found[1]})
            shift = (shift[0] + 1.25 * look["fontsize"], shift[1])
        axes.annotate(_words(found[3] if found else note.text), (at[0], at[1]), shift, **look)

    def _legend(self) -> None:
        shown = [t for t in self.figure.data if self.layout.showlegend and t.showlegend is not False]
        if not shown:
            return
        told = self.layout.legend
        size = (told.font.size or 12) * style.TEXT
        keys = [key(trace) for trace in shown]
        names = [_words(trace.name) for trace in shown]
        room = self._wide * self.page.get_figwidth() * 72
        widths = [size * (3.7 + 0.52 * len(name)) for name in names]
        columns = next(n for n in range(len(names), 0, -1) if n == 1 or sum(max(widths[c::n]) for c in range(n)) <= room)
        order = [i for c in range(columns) for i in range(c, len(names), columns)]  # matplotlib fills columns, readers read rows
        self.page.legend(
            [keys[i] for i in order],
            [names[i] for i in order],
            loc="lower right" if told.xanchor == "right" else "lower left",
            bbox_to_anchor=(self._across(told.x or 0), self._up(1 if told.y is None else told.y)),
            ncols=columns,
            fontsize=size,
            borderaxespad=0.3,
            borderpad=0.2,
            handlelength=1.8,
            handletextpad=0.5,
            columnspacing=1.4,
        )

    def _title(self) -> None:
        """Title and, below it, the provenance."""
        title = self.layout.title
        head, below = title.text or "", title.subtitle.text or ""
        small = _SMALLER.search(head)  # a live figure has one title of two sizes
        if small:
            head, below = head[: small.start()].removesuffix("<br>"), small[1]
        top, high = 14.0, self.layout.height
        for text, size, line in ((head, title.font.size or 17, 22), (below, 12, 15)):
            if text:
                look: dict[str, Any] = {"fontsize": size * style.TEXT, "va": "top", "ha": "left", "linespacing": 1.2}
                self.page.text(self._left, 1 - top / high, _words(text), **look)
                top += line * (1 + text.count("<br>")) + 3


def _words(text: str) -> str:
    """Plain text of what plotly reads as HTML."""
    return html.unescape(re.sub(r"<[^>]+>", "", text.replace("<br>", "\n")))
