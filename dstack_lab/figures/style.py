"""How all figures look: colours with a second cue, titles with provenance, readable on light and dark.

Who has which colour is told in `palette`. Nobody has to tell colours apart: a dash, a symbol or a label at the line
always says the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

from dstack_lab.checks import count, require
from dstack_lab.figures.palette import COLORS as COLORS
from dstack_lab.figures.palette import places
from dstack_lab.provenance import Provenance

#: Five dashes and eight symbols against seven colours: 35 services before a pair returns.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "triangle-left")
GLYPHS = "●■◆▲✚★▼◄"
#: Of bars: seven services without one, then seven with each. The hatch "x" is kept for late launches.
HATCHES = ("", "/", "\\", "-", "|")
MPL_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)))
MPL_MARKERS = ("o", "s", "D", "^", "P", "*", "v", "<")

GREY = "#7f7f7f"  #: about 4:1 on white and on #111
LATE = "#E8112D"  #: about 4:1 on white and on #111; never the only cue
GRID = "rgba(127,127,127,.25)"
WIDTH = 800
#: Sizes of words on bars [px], the first that fits, and the width of a letter in sizes.
BAR_SIZES, LETTER = (12.0, 11.0, 10.0), 0.55
#: How dense hatches are.
HATCHING = {"size": 7, "solidity": 0.25, "fillmode": "overlay"}

#: On paper: inches and points of a pixel of the live figure, so that 800 px become 9 inches.
INCH = 9 / 800
POINT = 72 * INCH
#: Points of a pixel of a letter, set smaller than in a browser: DejaVu Sans, which every matplotlib brings, is wider.
TEXT = 0.9 * POINT

#: plotly's mode bar offers to upload the data of a figure to a cloud service; ours never does.
CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud"]}

#: Buttons that these figures do without, so that the bar stays clear of the title.
UNUSED = ("sendChartToCloud", "zoomIn2d", "zoomOut2d", "autoScale2d", "select2d", "lasso2d")


@dataclass(frozen=True, slots=True)
class Cue:
    """How one service is drawn: colour, and dash, symbol and hatch that tell it apart without colour."""

    color: str
    dash: str
    symbol: str
    glyph: str
    hatch: str
    mpl_dash: Any
    mpl_marker: str

    @property
    def bright(self) -> bool:
        """Whether black reads better on the colour than white."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue > 120

    @property
    def bar(self) -> dict[str, Any]:
        """Look of the service's bars, as plotly's ``marker``."""
        return {"color": self.color, "line": {"width": 1, "color": GREY}, "pattern": {"shape": self.hatch, **HATCHING}}


def cues(names: Iterable[str]) -> dict[str, Cue]:
    """Return what tells each service, network or policy from the others; see `palette.places`.

    The networks of the standard workloads and the first policies of that table look the same in every figure.

    Parameters
    ----------
    names : iterable of str

    Returns
    -------
    dict of str to Cue
        In the order given.
    """
    require(isinstance(names, Iterable), "names", names, "names of what is drawn")
    return {
        name: Cue(
            COLORS[i % len(COLORS)],
            DASHES[i % len(DASHES)],
            SYMBOLS[i % len(SYMBOLS)],
            GLYPHS[i % len(GLYPHS)],
            HATCHES[i // len(COLORS) % len(HATCHES)],
            MPL_DASHES[i % len(MPL_DASHES)],
            MPL_MARKERS[i % len(MPL_MARKERS)],
        )
        for name, i in places(names).items()
    }


def faded(color: str, alpha: float) -> str:
    """Colour ``#rrggbb`` with an opacity, as plotly writes it."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:.3f})"


def label(cue: Cue, text: object) -> str:
    """Direct label: the colour and symbol as a glyph, the words in grey, for coloured words are hard to read."""
    return f'<span style="color:{cue.color}">{cue.glyph}</span> {plain(text)}'


def quiet_mode_bar() -> None:
    """Remove the cloud button from every renderer that shows plain figures."""
    for name in ("plotly_mimetype", "notebook", "notebook_connected", "browser", "iframe"):
        pio.renderers[name].config = {**(pio.renderers[name].config or {}), **CONFIG}


def plain(text: object) -> str:
    """Text that plotly shows as it is: names may hold ``<`` or ``&``."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def told(provenance: Provenance | str | Iterable[Provenance | str] | None) -> str:
    """Subtitle's words on where the numbers come from; several origins are all named, none is said too."""
    if provenance is None:
        return "origin not stated: pass provenance=trace.provenance"
    several = [provenance] if isinstance(provenance, (str, Provenance)) else list(provenance)
    return "; ".join(dict.fromkeys(str(one) for one in several)) or told(None)


def figure(
    title: str, origin: str, *, width: int = WIDTH, height: int = 420, right: int = 30, left: int = 70, **layout: Any
) -> go.Figure:
    """Empty figure in the house style.

    Parameters
    ----------
    title : str
        What is shown.
    origin : str
        Provenance: the subtitle.
    width, height : int
        Size [px]; without a width JupyterLab draws 700 px in a wider box.
    right, left : int
        Margins [px]; direct labels need room on the right, names of policies on the left.
    **layout
        Further entries of plotly's layout.

    Raises
    ------
    ValueError
        If the width is below 300 px.
    """
    width = count("width", width, 300)
    lines = textwrap.wrap(origin, max(30, int((width - left - 20) / 6.7))) or [""]
    heads = textwrap.wrap(title, max(20, (width - left - 150) // 9))
    top = 52 + 22 * len(heads) + 15 * len(lines)
    return go.Figure(
        layout={
            "template": "none",  # plotly's default adds 6.5 kB to every figure
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": GREY, "size": 13},
            "title": {
                "text": "<br>".join(map(plain, heads)),
                "font": {"size": 17},
                "subtitle": {"text": "<br>".join(map(plain, lines)), "font": {"size": 12, "color": GREY}},
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 14},
            },
            "width": width,
            "height": count("height", height, 150),
            "margin": {"l": left, "r": right, "t": top, "b": 56},
            "colorway": list(COLORS),
            "showlegend": False,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": GREY, "remove": list(UNUSED)},
            "hoverlabel": {"font": {"size": 12}},
            **layout,
        }
    )


def axis(title: str | None, **more: Any) -> dict[str, Any]:
    """Axis in mid-grey; `title` ends in its unit, as in ``"Service time [ms]"``."""
    look = {"gridcolor": GRID, "linecolor": GREY, "tickcolor": GREY, "zeroline": False, "showline": True, "ticks": "outside"}
    return {**look, **({"title": {"text": title, "standoff": 8}} if title else {}), **more}


def log_axis(title: str, low: float, high: float, most: int = 9) -> dict[str, Any]:
    """Logarithmic axis from `low` to `high` with ticks in full: plotly writes 20 as a small 2."""
    ticks = log_ticks(low, high, most)
    span = [float(np.log10(low)), float(np.log10(high))]
    return axis(title, type="log", range=span, tickvals=ticks, ticktext=[f"{t:,g}" for t in ticks], tickangle=0)


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Round numbers from `low` to `high`: 1, 2, 5, 10, or fewer of them where there would be more than `most`."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [t for d in decades for m in digits if low <= (t := m * 10.0**d) <= high]
        if len(ticks) <= most:
            break
    return ticks


def note(text: str, x: float, y: float, **more: Any) -> dict[str, Any]:
    """Annotation without an arrow."""
    return {"text": text, "x": x, "y": y, "showarrow": False, "font": {"color": GREY, "size": 12}, **more}


def fitting(text: str, wide: float, high: float) -> tuple[float, int] | None:
    """Size [px] and turn [degrees] at which words fit on a bar [px], lying if they can; None if they do not."""
    for size in BAR_SIZES:
        need = LETTER * size * len(text) + 4
        for turn, along, across in ((0, wide, high), (90, high, wide)):
            if along > need and across > size:
                return size, turn
    return None


def nothing(title: str, origin: str, words: str, width: int = WIDTH) -> go.Figure:
    """Figure that says in words why there is nothing to draw."""
    made = figure(title, origin, width=width, height=240)
    made.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    lines = "<br>".join(plain(line) for line in textwrap.wrap(words, (width - 100) // 9))
    made.add_annotation(note(lines, 0.5, 0.5, xref="paper", yref="paper", font={"size": 15, "color": GREY}))
    return made


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move labels apart: in the order of `places`, each at least `gap` from the next, and as near as can be.

    Parameters
    ----------
    places : sequence of float, shape (n,)
        Where the labels want to be.
    gap : float
        Least distance, in the same unit.

    Returns
    -------
    list of float
        Where to put them, in the order given; their mean shift within a crowd is zero.
    """
    order = np.argsort(np.asarray(places, dtype=float), kind="stable")
    # crowds of labels, each with its members' wishes once the gaps before them are taken off
    crowds: list[list[float]] = []
    for rank, i in enumerate(order):
        crowds.append([places[i] - rank * gap])
        while len(crowds) > 1 and np.mean(crowds[-2]) > np.mean(crowds[-1]):
            last = crowds.pop()
            crowds[-1].extend(last)
    flat = [float(np.mean(crowd)) for crowd in crowds for _ in crowd]
    moved = [0.0] * len(places)
    for rank, i in enumerate(order):
        moved[i] = flat[rank] + rank * gap
    return moved
