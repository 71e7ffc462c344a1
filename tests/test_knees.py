"""Knee rules against curves whose knees are known in closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_lab import knees
from dstack_lab.knees import Knee, kind_of, knee_pct

SHARES = np.arange(1.0, 101.0)


def saturating(q, serial=0.0):
    """L = serial + 100 / min(g, q): every rule has its knee at or before q."""
    return serial + 100 / np.minimum(SHARES, q)


@pytest.mark.parametrize("q", [20, 35, 60])
@pytest.mark.parametrize("rule", ["efficacy", "marginal"])
def test_a_sharp_corner_is_the_knee(q, rule):
    assert knee_pct(SHARES, saturating(q), rule) == q


@pytest.mark.parametrize("q", [20, 40, 60])
def test_tolerance_allows_five_percent_and_not_more(q):
    # 100 / g <= 1.05 * 100 / q  <=>  g >= q / 1.05
    assert knee_pct(SHARES, saturating(q), "tolerance") == np.ceil(q / 1.05)


def test_efficacy_of_a_serial_part_is_where_serial_and_parallel_times_are_equal():
    # L = s + w/g: d/dg of (2 log L + log g) is zero at g = w/s
    assert knee_pct(SHARES, 2.0 + 60.0 / SHARES, "efficacy") == 30


def test_chord_of_a_hyperbola_is_the_geometric_mean_of_its_ends():
    # distance of 1/g to the chord from (4, 1/4) to (100, 1/100) is largest at g = sqrt(4 * 100)
    grid = np.arange(4.0, 101.0)
    assert knee_pct(grid, 1 / grid, "chord") == 20


def test_marginal_of_a_hyperbola_stops_where_ten_points_give_less_than_five_percent():
    grid = np.arange(10.0, 101.0, 10.0)
    assert knee_pct(grid, 10 + 1000 / grid, "marginal") == _last_worth(grid, 10 + 1000 / grid)


def _last_worth(grid, ms):
    best = grid[0]
    for i in range(1, len(grid)):
        if ms[i - 1] / ms[i] >= 1.05:
            best = grid[i]
    return best


def test_capacity_is_the_smallest_area_that_meets_half_the_slo():
    # area g * (s + w/g) = s g + w grows with g: the smallest share with L <= SLO/2 wins
    assert knee_pct(SHARES, 2.0 + 60.0 / SHARES, "capacity", slo_ms=10.0) == 20
    assert np.isnan(knee_pct(SHARES, 2.0 + 60.0 / SHARES, "capacity", slo_ms=4.0))


def test_capacity_with_pure_parallel_work_takes_the_smallest_share_that_meets_it():
    assert knee_pct(SHARES, 100 / SHARES, "capacity", slo_ms=8.0) == 25


@pytest.mark.parametrize("rule", knees.RULES)
def test_a_table_gives_what_its_rows_give(rule):
    rng = np.random.default_rng(3)
    table = np.sort(rng.uniform(1, 50, (3, 4, 100)), axis=-1)[..., ::-1]
    whole = knee_pct(SHARES, table, rule, slo_ms=40.0)
    assert whole.shape == (3, 4)
    for i, j in np.ndindex(3, 4):
        np.testing.assert_equal(whole[i, j], knee_pct(SHARES, table[i, j], rule, slo_ms=40.0))


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=30), st.floats(0.01, 100), st.sampled_from(list(knees.RULES)))
def test_a_knee_is_an_offered_share_and_ignores_the_unit_of_time(times, factor, rule):
    grid = np.linspace(5, 100, len(times)) if len(times) > 1 else np.array([50.0])
    ms = np.sort(times)[::-1]
    pct = knee_pct(grid, ms, rule, slo_ms=2.5 * ms[0])
    assert pct in grid
    # in other units; powers of two keep every comparison exact
    scale = 2.0 ** np.round(np.log2(factor))
    assert knee_pct(grid, ms * scale, rule, slo_ms=2.5 * ms[0] * scale) == pct


@given(st.floats(0, 50), st.floats(1, 1e4), st.floats(5, 100))
def test_tolerance_is_really_the_first_good_share(serial, work, q):
    ms = serial + work / np.minimum(SHARES, q)
    pct = int(knee_pct(SHARES, ms))
    assert ms[pct - 1] <= 1.05 * ms.min()
    assert (ms[: pct - 1] > 1.05 * ms.min()).all()


def test_kinds():
    assert kind_of(SHARES, np.full(100, 3.0), 1.0) == "flat"
    assert kind_of(SHARES, 1.0 + 0.049 / SHARES, 1.0) == "flat"
    assert kind_of(SHARES, 100 / SHARES, 100.0) == "none"
    assert kind_of(SHARES, saturating(40), 40.0) == "knee"
    assert kind_of(SHARES, saturating(40), np.nan) == "none"


@pytest.mark.parametrize(
    ("knee", "text"),
    [
        (Knee(30, 25, 40), "knee 30 % (25-40)"),
        (Knee(30, 30, 30), "knee 30 %"),
        (Knee(100, 90, 100, kind="none"), "no knee: scales to 100 % (90-100)"),
        (Knee(5, 5, 5, kind="flat"), "no knee: flat (launch-bound), 5 % is enough"),
        (Knee(np.nan, np.nan, np.nan, "capacity", "none"), "no knee: no share meets the SLO"),
    ],
)
def test_a_knee_reads_as_a_sentence(knee, text):
    assert str(knee) == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knee_pct(SHARES, saturating(20), "elbow"), "rule = 'elbow': must be one of tolerance, chord, marginal"),
        (lambda: knee_pct([50, 20], [1, 2]), "shares"),
        (lambda: knee_pct([0, 20], [1, 2]), "shares"),
        (lambda: knee_pct([10, 20], [1, 2, 3]), "service_ms shape"),
        (lambda: knee_pct([10, 20], [1, -2]), "service_ms = -2.0"),
        (lambda: knee_pct([10, 20], [1, np.nan]), "service_ms = nan"),
        (lambda: knee_pct([10, 20], [2, 1], batch=0), "batch = 0"),
        (lambda: knee_pct([10, 20], [2, 1], "capacity"), "slo_ms"),
        (lambda: knee_pct([10, 20], [2, 1], "capacity", slo_ms=-1), "slo_ms = -1"),
        (lambda: Knee(30, 40, 50), "low, pct, high"),
        (lambda: Knee(30, 30, 30, kind="elbow"), "kind = 'elbow'"),
        (lambda: Knee(30, 30, 30, rule="elbow"), "rule = 'elbow'"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call()
