"""The same pictures as PNG or SVG files, byte for byte the same on every run: for papers and READMEs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.figures import style
from dstack_lab.figures.curves import curves, here_words
from dstack_lab.figures.races import METRICS, attained_from, gather, origin_of, spans
from dstack_lab.figures.sheets import Target, sheet, written
from dstack_lab.figures.space import Window, raster, visible, window
from dstack_lab.figures.timelines import (
    COLUMNS,
    EXACT,
    LATE_WORDS,
    bar_labels,
    dense_words,
    late_bins,
    rectangles,
    strength,
    titles,
)
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance
from dstack_lab.traces import Trace


def static_timeline(
    trace: Trace,
    path: Target,
    start_ms: float | None = None,
    end_ms: float | None = None,
    *,
    window_ms: float = 500.0,
    exact: int = EXACT,
) -> Path:
    """Write `timeline` as a PNG or SVG, by the suffix of `path`; the file is whole or absent.

    Parameters
    ----------
    trace : Trace
    path : path or binary file
        A path ends in ``.png`` or ``.svg``; an open file gets a PNG, smaller than one on paper.
    start_ms, end_ms, window_ms, exact
        As for `timeline`.

    Returns
    -------
    pathlib.Path
        ``-`` for an open file.

    Raises
    ------
    ValueError
        For another suffix, or a window that is empty or outside the run.
    """
    view = window(trace, start_ms, end_ms, window_ms)
    title, origin = titles(trace, view)
    launches = visible(trace, view)
    names = list(trace.services["service"])
    dense = len(launches) > exact
    if dense:
        origin = dense_words(origin, launches, (view.end_ms - view.start_ms) / COLUMNS)
    with sheet(path, title, origin, height=1.8 + 0.5 * len(names) if dense else 4.4) as (_, axes):
        axes.set_xlabel("Time [ms]")
        axes.set_xlim(view.start_ms, view.end_ms)
        if launches.empty:
            axes.text(0.5, 0.5, "No launch ran in this window.", transform=axes.transAxes, ha="center", fontsize=13)
        if dense:
            _, held = raster(trace, view.start_ms, view.end_ms, COLUMNS)
            _draw_raster(axes, held, names, launches, view)
        else:
            _draw_rectangles(axes, rectangles(launches, view), names, view)
    return written(path)


def _draw_rectangles(axes: Any, pieces: pd.DataFrame, names: list[str], view: Window) -> None:
    from matplotlib.patches import Patch

    handles = []
    top = max(100.0, 1.02 * pieces["high_pct"].max()) if len(pieces) else 100.0
    for name, cue in style.cues(names).items():
        mine = pieces[pieces["service"] == name]
        for late in (False, True):
            some = mine[(mine["late"] > 0) == late]
            axes.bar(
                some["from_ms"],
                some["high_pct"] - some["low_pct"],
                some["till_ms"] - some["from_ms"],
                some["low_pct"],
                align="edge",
                color=cue.color,
                edgecolor="black" if late else style.GREY,  # also the colour of the hatch
                linewidth=0.5,
                hatch="xxx" if late else None,
            )
        _label_bars(axes, mine, name, cue, view, top)
        handles.append(Patch(facecolor=cue.color, edgecolor=style.GREY, label=name))
    if (pieces["late"] > 0).any():
        handles.append(Patch(facecolor="none", edgecolor=style.GREY, hatch="xxx", label=LATE_WORDS))
    axes.set_ylim(0, top)
    if top > 102.5:
        axes.axhline(100, color=style.GREY, linestyle="--")
    axes.set_ylabel("Share held [GPU%]")
    axes.grid(axis="y")
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, fontsize=9, borderaxespad=0.2, handlelength=1.2
    )


def _label_bars(axes: Any, mine: pd.DataFrame, name: str, cue: style.Cue, view: Window, top: float) -> None:
    """Write the name on some bars, lying or standing, where it fits; sizes in points of the 9 x 4.4 inch sheet."""
    boxes = mine[["from_ms", "till_ms", "low_pct", "high_pct"]].to_numpy(dtype=float)
    for (left, right, low, high), text in zip(boxes, bar_labels(mine, name, view), strict=True):
        wide, tall = 560 * (right - left) / (view.end_ms - view.start_ms), 200 * (high - low) / top
        need = 5.2 * len(text)
        fits = [turn for turn, along, across in ((0, wide, tall), (90, tall, wide)) if text and along > need and across > 9]
        if fits:
            look = {"rotation": fits[0], "fontsize": 8, "color": "black" if cue.bright else "white"}
            axes.text((left + right) / 2, (low + high) / 2, text, ha="center", va="center", **look)


def _draw_raster(axes: Any, held: Any, names: list[str], launches: pd.DataFrame, view: Window) -> None:
    from matplotlib.colors import to_rgb

    most, span = float(launches["gpu_pct"].max()), (view.start_ms, view.end_ms)
    for i, (name, cue) in enumerate(style.cues(names).items()):
        rgba = np.empty((1, held.shape[1], 4))
        rgba[..., :3] = to_rgb(cue.color)
        rgba[..., 3] = strength(held[i] / most)
        axes.imshow(rgba, extent=(*span, i + 0.45, i - 0.45), aspect="auto", interpolation="nearest")
        bins = late_bins(launches[launches["service"] == name], view)
        axes.plot(bins, np.full(len(bins), i - 0.52), "v", color=style.GREY, markersize=3)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"▾ {LATE_WORDS}" if (launches["late"] > 0).any() else "", loc="right", fontsize=9)


def static_knee(
    profile: Profile,
    path: Target,
    models: Iterable[str] | str | None = None,
    batch: int | None = None,
    rule: str = "tolerance",
    slo_ms: float | None = None,
    *,
    at_pct: float | None = None,
) -> Path:
    """Write `knee` as a PNG or SVG, by the suffix of `path`; parameters and errors as for `knee`."""
    drawn, title, _, log = curves(profile, models, batch, rule, slo_ms)
    with sheet(path, title, str(profile.provenance), height=4.8) as (_, axes):
        for curve, cue in zip(drawn, style.cues(c.model for c in drawn).values(), strict=True):
            color = cue.color
            axes.plot(curve.gpu_pct, curve.service_ms, color=color, linestyle=cue.mpl_dash, linewidth=1.5)
            axes.plot(curve.points["gpu_pct"], curve.points["service_ms"], cue.mpl_marker, color=color, markersize=3.5)
            if not np.isnan(curve.knee.pct):
                reach = [[curve.knee.pct - curve.knee.low], [curve.knee.high - curve.knee.pct]]
                axes.errorbar(curve.knee.pct, curve.knee_ms, xerr=reach, color=color, linewidth=1)
                axes.plot(curve.knee.pct, curve.knee_ms, cue.mpl_marker, color=color, markersize=10, fillstyle="none")
            if at_pct is not None:
                axes.plot(at_pct, curve.at(at_pct), "x", color=style.GREY, markersize=8, markeredgewidth=2)
                words = {"ha": "left" if at_pct < 55 else "right", "va": "bottom", "textcoords": "offset points"}
                axes.annotate(here_words(curve, at_pct), (at_pct, curve.at(at_pct)), (6 if at_pct < 55 else -6, 5), **words)
        if at_pct is not None:
            axes.axvline(at_pct, color=style.GREY, linestyle=":", linewidth=1.2)
        axes.set_xlim(0, 101)
        axes.set_xlabel("Share [GPU%]")
        axes.set_ylabel("Service time [ms]")
        axes.grid()
        if log:
            axes.set_yscale("log")
            ticks = style.log_ticks(*axes.get_ylim())
            axes.set_yticks(ticks, [f"{t:,g}" for t in ticks])
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
        low, high = axes.get_ylim()
        low, high = (np.log(low), np.log(high)) if log else (low, high)
        ends = [((np.log(c.service_ms[-1]) if log else c.service_ms[-1]) - low) / (high - low) for c in drawn]
        for curve, cue, at in zip(drawn, style.cues(c.model for c in drawn).values(), style.spread(ends, 0.055), strict=True):
            axes.plot(1.02, at, cue.mpl_marker, color=cue.color, markersize=5, transform=axes.transAxes, clip_on=False)
            axes.text(1.035, at, curve.label, transform=axes.transAxes, va="center", fontsize=8.5)
    return written(path)


def static_comparison(
    table: pd.DataFrame,
    path: Target,
    provenance: Provenance | str | Iterable[Provenance | str] | None = None,
    bound_rps: float | None = None,
) -> Path:
    """Write `comparison` as a PNG or SVG, by the suffix of `path`; parameters and errors as for `comparison`."""
    means, policies, services, runs = gather(table)
    origin = origin_of(table, provenance, policies, runs)
    y = np.arange(len(policies))
    with sheet(path, "Policies side by side\n", origin, 3, 2.1 + 0.42 * len(policies), share_y=True) as (_, axes):
        left = np.zeros(len(policies))
        for i, (name, cue) in enumerate(style.cues(services).items()):
            mine = means.xs(name, level="service").reindex(policies)
            good = mine["goodput_rps"].fillna(0).to_numpy()
            axes[0].barh(y, good, 0.6, left, color=cue.color, edgecolor=style.GREY, linewidth=0.6)
            left = left + good
            shift = 0.0 if len(services) == 1 else 0.5 * (i / (len(services) - 1) - 0.5)
            for part, metric in zip(axes[1:], ("slo_attainment", "p99_ms"), strict=True):
                part.plot(mine[metric], y + shift, cue.mpl_marker, color=cue.color, markersize=6, label=name)
        for part, words in zip(axes, METRICS.values(), strict=True):
            part.set_xlabel(words)
            part.grid(axis="x")
        axes[0].set_yticks(y, policies)
        axes[0].set_ylim(len(policies) - 0.4, -0.6)
        least = attained_from(means)
        axes[1].set_xlim(least - 0.03 * (1 - least), 1 + 0.03 * (1 - least))
        low, high = spans(means)
        if low:
            ticks = style.log_ticks(low, high, most=4)
            axes[2].set_xscale("log")
            axes[2].set_xticks(ticks, [f"{t:,g}" for t in ticks])
            axes[2].minorticks_off()
        axes[2].set_xlim(low, high)
        if bound_rps is not None:
            axes[0].axvline(bound_rps, color=style.GREY, linestyle="--")
            axes[0].set_xlabel(f"{METRICS['goodput_rps']}\n┆ bound {bound_rps:,.4g}")
        handles, words = axes[1].get_legend_handles_labels()
        look = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 8, "fontsize": 9, "borderaxespad": 0.2}
        axes[0].legend(handles, words, handletextpad=0.2, **look).set_in_layout(False)  # it spans all three
    return written(path)
