"""Sheets of paper for static pictures: size, look, title and provenance; files byte for byte the same on every run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dstack_lab.checks import require
from dstack_lab.figures import style
from dstack_lab.files import whole_file

SUFFIXES = (".png", ".svg")

#: Ids in an SVG are random without a salt; text stays text; hatches are thin.
RC: dict[Any, Any] = {
    "svg.hashsalt": "dstack_lab",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "hatch.linewidth": 0.7,
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
DPI = 150
#: In a notebook, where a picture that stands in for a live figure should be small.
SCREEN_DPI = 72

#: A file name, or a file open for writing bytes.
Target = str | os.PathLike[str] | BinaryIO


@contextmanager
def sheet(
    path: Target, title: str, origin: str, columns: int = 1, height: float = 4.2, share_y: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes with title and provenance; write the file when the block succeeds."""
    import matplotlib
    from matplotlib.figure import Figure

    named = isinstance(path, (str, os.PathLike))
    suffix = Path(path).suffix.lower() if named else ".png"  # type: ignore[arg-type]
    require(suffix in SUFFIXES, "path", str(path), f"a file name that ends in {' or '.join(SUFFIXES)}")
    with matplotlib.rc_context(RC):
        page = Figure(figsize=(9, height), layout="constrained", facecolor="none")
        page.suptitle(title, x=0.01, ha="left", fontsize=13)
        axes = page.subplots(1, columns, sharey=share_y)
        yield page, axes
        # a caption below, where no label of an axis can run into it
        page.supxlabel("\n".join(textwrap.wrap(origin, 120)), x=0.01, ha="left", fontsize=8.5)
        stamp = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
        if not named:
            page.savefig(path, format="png", dpi=SCREEN_DPI, metadata=stamp)
            return
        with whole_file(path) as temporary:  # type: ignore[arg-type]
            page.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=stamp)


def written(path: Target) -> Path:
    """Return what a function that writes a file gives back: its path, ``-`` for an open file."""
    return Path(path) if isinstance(path, (str, os.PathLike)) else Path("-")


def static_nothing(path: Target, title: str, words: str) -> Path:
    """Write a picture that says in words why there is nothing to draw."""
    with sheet(path, title, "", height=2.4) as (_, axes):
        axes.set_axis_off()
        lines = "\n".join(textwrap.wrap(words, 90))
        axes.text(0.5, 0.5, lines, transform=axes.transAxes, ha="center", va="center", fontsize=11)
    return written(path)
