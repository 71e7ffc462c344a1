"""The monotone table: straight whatever went in, unchanged where it was straight."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dstack_lab.monotone import MonotoneTable, straighten, tightened

TABLES = arrays(float, st.tuples(st.integers(2, 8), st.integers(2, 8)), elements=st.floats(-5, 5))


@given(TABLES)
def test_straightened_tables_are_monotone_and_stay_so(table):
    flat = straighten(table)
    assert (np.diff(flat, axis=0) >= 0).all()
    assert (np.diff(flat, axis=1) <= 0).all()
    np.testing.assert_array_equal(straighten(flat), flat)
    assert flat.min() >= table.min()
    assert flat.max() <= table.max()


@settings(deadline=None)
@given(TABLES)
def test_between_and_beyond_nodes_it_is_monotone_too(table):
    m, n = table.shape
    made = MonotoneTable(np.geomspace(1, 64, m), np.geomspace(1, 100, n), straighten(table))
    b, g = np.meshgrid(np.geomspace(1, 1000, 60), np.linspace(1, 100, 50), indexing="ij")
    logs = made.log(b, g)
    assert (np.diff(logs, axis=0) >= -1e-12).all()
    assert (np.diff(logs, axis=1) <= 1e-12).all()


def test_a_power_law_is_exact_everywhere():
    b, g = np.array([1.0, 10.0]), np.array([1.0, 100.0])
    made = MonotoneTable(b, g, np.log(3 * b[:, None] ** 0.8 / g**0.5))
    at = np.array([2.0, 7.0, 300.0]), np.array([3.0, 50.0, 99.0])
    np.testing.assert_allclose(np.exp(made.log(*at)), 3 * at[0] ** 0.8 / at[1] ** 0.5)


def test_an_upper_bound_is_lowered_to_what_the_sure_points_allow():
    b, g = np.array([1.0, 1, 4, 4]), np.array([50.0, 100, 50, 100])
    ms, loose = np.array([9.0, 25, 39, 58]), np.array([False, True, True, True])
    np.testing.assert_array_equal(tightened(b, g, ms, loose), [9, 9, 39, 58])  # nothing sure is said about batch 4
    loose[2] = False
    np.testing.assert_array_equal(tightened(b, g, ms, loose), [9, 9, 39, 39])
    np.testing.assert_array_equal(tightened(b, g, ms, ~np.zeros(4, dtype=bool)), ms)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_sure_points_stay_and_no_true_time_is_undercut(n, seed, part):
    """Loose points are true times, made longer: what is made of them lies between the two."""
    rng = np.random.default_rng(seed)
    b, g = rng.integers(1, 9, n).astype(float), rng.integers(1, 101, n).astype(float)
    true = (1 + b) / np.minimum(g, 40)
    loose = rng.random(n) < part
    told = np.where(loose, true * (1 + 3 * rng.random(n)), true)
    made = tightened(b, g, told, loose)
    np.testing.assert_array_equal(made[~loose], true[~loose])
    assert (made <= told).all()
    assert (made >= true - 1e-12).all()
