"""Trials of few and many slots: the table that is drawn, and that all of it is drawn and nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from builders import plan
from builders import profile as made_of

import dstack_lab as lab
from dstack_lab import figures
from dstack_lab.figures import slot_trials
from dstack_lab.services import ServiceTable

TRIALS = pd.DataFrame(
    {
        "slots": [1, 2, 10],
        "gpu_pct": [100.0, 50.0, 10.0],
        "late": [0.3, 0.0, 0.1],
        "worst": ["a", "a", "b"],
        "worst_late": [0.4, 0.0, 0.5],
        "latency": [0.9, 0.4, 0.7],
    }
)


@pytest.fixture(scope="module")
def two():
    """Two networks that use 30 and 70 GPU%, at a load that neither one slot nor ten hold."""
    profile = made_of(light=(1.0, 0.2, 30), heavy=(4.0, 2.0, 70))
    return lab.optimize([lab.Service("light", 20, lab.Poisson(2000)), lab.Service("heavy", 60, lab.Poisson(200))], profile)


def test_a_row_for_each_number_of_slots_that_the_shares_allow(two):
    trials = lab.try_slots(two)
    assert trials["slots"].tolist() == [1, 2, 3, 5, 10]  # 4 and 6 to 9 do not divide into shares of whole tens
    assert trials["gpu_pct"].tolist() == [100, 50, 30, 20, 10]
    assert (trials["worst_late"] >= trials["late"]).all()
    assert set(trials["worst"]) <= {"light", "heavy"}


def test_a_trial_is_the_one_that_cut_slots_reports(two):
    cut = lab.cut_slots(two, drop=False, wait_part=0.0)
    row = lab.try_slots(two, drop=False, wait_part=0.0).set_index("slots").loc[cut.count]
    assert row["worst_late"] == max(cut.late) == dict(zip(cut.services, cut.late, strict=True))[row["worst"]]
    rates = np.array([a.rate_rps for a in two.allocations])
    assert row["late"] == pytest.approx((rates * cut.late).sum() / rates.sum())


def test_who_hardly_ever_waits_takes_as_long_as_a_launch():
    """A request takes 0.01 ms in any slot, and one comes every 10 ms: none is late, and each takes 1/2000 of its 20 ms."""
    times = ServiceTable(np.full((1, 100), 0.01))
    trials = lab.try_slots(plan(("a", 20.0, lab.Poisson(100), 25.0, 1, times)), wait_part=0.0)
    assert trials["slots"].max() > 1
    assert (trials["late"] == 0).all()
    assert trials["latency"].to_numpy() == pytest.approx(0.01 / 20, rel=0.01)


def test_draws_every_trial_and_marks_the_chosen_one():
    made = figures.slots(TRIALS, "made up", 2)
    drawn = {trace.name: trace for trace in made.data}
    assert set(drawn) == {name for _, lines in slot_trials.PANES for name in lines}
    for _, lines in slot_trials.PANES:
        for name, column in lines.items():
            assert list(drawn[name].x) == TRIALS["slots"].tolist()
            assert list(drawn[name].y) == TRIALS[column].tolist()
    assert made.layout.yaxis.range[1] > 0.5
    assert made.layout.yaxis2.range[1] > 0.9
    assert made.layout.yaxis.range[0] == made.layout.yaxis2.range[0] == 0
    low, high = 10 ** np.array(made.layout.xaxis.range)
    assert low < 1 < 10 < high
    assert [note.x for note in made.layout.annotations if note.text == slot_trials.CHOSEN] == pytest.approx([np.log10(2)] * 2)
    assert "made up" in made.layout.title.subtitle.text
    assert not figures.slots(TRIALS).layout.shapes


def test_nobody_late_still_has_an_axis():
    nobody = TRIALS.assign(late=0.0, worst_late=0.0)
    assert figures.slots(nobody).layout.yaxis.range == (0, 1)


@pytest.mark.parametrize(
    ("trials", "chosen", "words"),
    [(TRIALS.drop(columns="late"), None, "trials columns"), (TRIALS[:0], None, "trials = 0"), (TRIALS, 3, "chosen = 3")],
)
def test_says_what_it_cannot_draw(trials, chosen, words):
    with pytest.raises(ValueError, match=words):
        figures.slots(trials, chosen=chosen)
