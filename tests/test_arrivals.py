from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dstack_lab as lab

PROCESSES = [
    lab.Poisson(100),
    lab.Gamma(100, cv=3),
    lab.Gamma(100, cv=0.5),
    lab.Deterministic(100),
    lab.Steps(((0, 50), (500, 150))),
    lab.Drift(((0, 50), (500, 150), (900, 0), (1000, 0), (1500, 80))),
]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@given(seed=st.integers(0, 2**32 - 1), duration=st.floats(1, 5_000))
def test_times_are_sorted_inside_the_run_and_repeatable(process, seed, duration):
    times = process.sample(duration, np.random.default_rng(seed))
    assert (np.diff(times) >= 0).all()
    assert times.size == 0 or (times[0] >= 0 and times[-1] < duration)
    assert np.array_equal(times, process.sample(duration, np.random.default_rng(seed)))


@pytest.mark.parametrize("process", PROCESSES[:4], ids=repr)
def test_a_longer_run_begins_like_a_shorter_one(process):
    short, long = (process.sample(d, np.random.default_rng(3)) for d in (10_000, 100_000))
    assert np.allclose(short, long[: short.size])


@pytest.mark.parametrize(("process", "cv"), [(lab.Poisson(200), 1), (lab.Gamma(200, 3), 3), (lab.Gamma(200, 0.5), 0.5)], ids=repr)
def test_rate_and_coefficient_of_variation(process, cv):
    gaps = np.diff(process.sample(2e6, np.random.default_rng(1)))
    mean_error = cv * 5 / np.sqrt(gaps.size)  # relative standard error of the mean
    assert gaps.mean() == pytest.approx(5, abs=4 * mean_error)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_poisson_counts_have_equal_mean_and_variance():
    times = lab.Poisson(50).sample(1e6, np.random.default_rng(2))
    counts = np.histogram(times, np.arange(0, 1e6 + 1, 1000))[0]
    assert counts.mean() == pytest.approx(50, rel=0.02)
    assert counts.var() == pytest.approx(50, rel=0.15)


def test_steps_change_the_rate_when_they_say():
    times = lab.Steps(((0, 100), (100_000, 0), (200_000, 300))).sample(300_000, np.random.default_rng(0))
    low, none, high = np.histogram(times, [0, 100_000, 200_000, 300_000])[0]
    assert low == pytest.approx(10_000, rel=0.05)
    assert none == 0
    assert high == pytest.approx(30_000, rel=0.05)


def test_replay_plays_back_and_reads_csv(tmp_path):
    file = tmp_path / "times.csv"
    file.write_text("arrival_ms\n1\n2.5\n900\n")
    replay = lab.Replay.from_csv(file)
    assert replay.sample(100, np.random.default_rng(0)).tolist() == [1, 2.5]
    assert replay.rate_rps == pytest.approx(1000 * 3 / 900)
    with pytest.raises(ValueError, match="column = 'when'"):
        lab.Replay.from_csv(file, column="when")


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan"), "fast", True, None])
def test_impossible_rates_are_refused_by_name(rate):
    for make in (lab.Poisson, lab.Deterministic, lambda r: lab.Gamma(r, 1), lambda r: lab.Gamma(1, r)):
        with pytest.raises(ValueError, match=r"(rate_rps|cv) = .*above 0"):
            make(rate)


@pytest.mark.parametrize("steps", [(), ((5, 100),), ((0, 0),), ((0, 1), (0, 2)), ((0, float("inf")),), ((0, -1),), (3,)])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        lab.Steps(steps)


@pytest.mark.parametrize("times", [[], [3, 2], [-1, 0], [float("nan")]])
def test_impossible_replays_are_refused(times):
    with pytest.raises(ValueError, match="times_ms"):
        lab.Replay(times)


def test_a_run_needs_a_duration():
    for process in [*PROCESSES, lab.Replay([1.0])]:
        with pytest.raises(ValueError, match="duration_ms = 0"):
            process.sample(0, np.random.default_rng(0))


def test_a_drift_moves_the_rate_in_straight_lines():
    """From 0 to 200/s in 100 s, back to 100/s in another, and there: means of 50, 150, 175, 125, 100 and 100 per 50 s."""
    drift = lab.Drift(((0, 0), (100_000, 200), (200_000, 100)))
    times = drift.sample(300_000, np.random.default_rng(0))
    counts = np.histogram(times, np.arange(0, 300_001, 50_000))[0]
    assert counts == pytest.approx([2500, 7500, 8750, 6250, 5000, 5000], rel=0.06)
    assert drift.rate_rps == 200


@pytest.mark.parametrize("points", [(), ((0, 5),), ((5, 100), (6, 1)), ((0, 0), (1, 0)), ((0, 1), (0, 2)), ((0, 1), (2, -1))])
def test_impossible_drifts_are_refused(points):
    with pytest.raises(ValueError, match="points"):
        lab.Drift(points)
