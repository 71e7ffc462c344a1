"""Waits over utilization: every dot and line is drawn where its table says, and nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dstack_lab import figures

RUNS = pd.DataFrame({"kind": ["even", "even", "wild"], "utilization": [0.8, 0.5, 0.5], "wait_ms": [8.0, 2.0, 4.0]})
RULES = pd.DataFrame({"kind": ["even", "even", "other"], "utilization": [0.5, 0.9, 0.4], "wait_ms": [2.5, 20.0, 1.0]})


def test_draws_every_dot_and_line_of_its_kind_in_one_colour():
    made = figures.waits(RUNS, RULES, "made up")
    drawn = {trace.name: trace for trace in made.data}
    assert set(drawn) == {"even, simulated", "even, closed form", "wild, simulated", "other, closed form"}
    dots, line = drawn["even, simulated"], drawn["even, closed form"]
    assert (dots.mode, line.mode) == ("markers", "lines")
    assert list(dots.x) == [0.5, 0.8]
    assert list(dots.y) == [2.0, 8.0]
    assert dots.marker.color == line.line.color != drawn["wild, simulated"].marker.color
    low, high = made.layout.yaxis.range
    assert low < np.log10(1.0)
    assert high > np.log10(20.0)
    assert "made up" in made.layout.title.subtitle.text
    assert [kind for kind in ("even", "wild", "other") if any(kind in note.text for note in made.layout.annotations)] == [
        "even",
        "wild",
        "other",
    ]


def test_leaves_out_what_a_logarithmic_axis_cannot_show():
    none = pd.DataFrame({"kind": ["even", "late"], "utilization": [0.1, 1.0], "wait_ms": [0.0, np.inf]})
    made = figures.waits(none, RULES)
    assert {trace.name for trace in made.data} == {"even, closed form", "other, closed form"}
    with pytest.raises(ValueError, match="wait_ms"):
        figures.waits(none, none)


def test_names_a_missing_column():
    with pytest.raises(ValueError, match="formulas columns"):
        figures.waits(RUNS, RULES.drop(columns="kind"))
