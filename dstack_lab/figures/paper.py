"""Figures as PNG or SVG files through matplotlib: no browser needed, byte for byte the same on every run.

What is drawn is the plotly figure itself, trace by trace, in the same places: a picture on paper and a live
figure cannot say different things. Only what this package draws is understood; anything else is an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import plotly.graph_objects as go

from dstack_lab.checks import require
from dstack_lab.figures import style
from dstack_lab.files import whole_file

SUFFIXES = (".png", ".svg")
DPI = 150
#: In a notebook, where a picture that stands in for a live figure should be small.
SCREEN_DPI = 72

#: Ids in an SVG are random without a salt; text stays text; hatches are thin.
RC: dict[Any, Any] = {
    "svg.hashsalt": "dstack_lab",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "hatch.linewidth": 0.8,
    "text.color": style.GREY,
    "axes.labelcolor": style.GREY,
    "axes.edgecolor": style.GREY,
    "xtick.color": style.GREY,
    "ytick.color": style.GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": style.GREY,
    "grid.alpha": 0.25,
    "axes.facecolor": "none",
    "legend.frameon": False,
}

#: A file name, or a file open for writing bytes.
Target = str | os.PathLike[str] | BinaryIO


def save(figure: go.Figure, path: Target) -> Path:
    """Write a figure of this package as PNG or SVG, by the suffix of `path`; the file is whole or absent.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        Of a function of `dstack_lab.figures`, live or not, at the zoom it has now.
    path : path or binary file
        A path ends in ``.png`` or ``.svg``; an open file gets a PNG, smaller than one on paper.

    Returns
    -------
    pathlib.Path
        ``-`` for an open file.

    Raises
    ------
    ValueError
        For another suffix, or a figure that holds what this package does not draw.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from dstack_lab.figures.page import Sheet

    named = isinstance(path, (str, os.PathLike))
    suffix = Path(path).suffix.lower() if named else ".png"  # type: ignore[arg-type]
    require(suffix in SUFFIXES, "path", str(path), f"a file name that ends in {' or '.join(SUFFIXES)}")
    require(isinstance(figure, go.Figure | go.FigureWidget), "figure", type(figure).__name__, "a figure of dstack_lab.figures")
    width, height = figure.layout.width, figure.layout.height
    require(bool(width and height), "figure", "without width and height", "a figure of dstack_lab.figures")
    with matplotlib.rc_context(RC):
        page = Figure(figsize=(width * style.INCH, height * style.INCH), facecolor="none")
        Sheet(page, figure).draw()
        stamp = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
        if not named:
            page.savefig(path, format="png", dpi=SCREEN_DPI, metadata=stamp)
            return Path("-")
        with whole_file(path) as temporary:  # type: ignore[arg-type]
            page.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=stamp)
    return Path(path)  # type: ignore[arg-type]
