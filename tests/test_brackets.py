"""Bounds between measured shares, against curves that obey the physics they assume."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_lab.brackets import bracket

EVERYWHERE = np.arange(1.0, 101.0)
KERNELS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(1, 100)), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.floats(0, 10), KERNELS, st.sets(st.integers(1, 100), min_size=1, max_size=8))
def test_any_mixture_of_saturating_kernels_lies_in_its_bracket(serial, kernels, measured):
    def truth(g):
        return serial + sum(work / np.minimum(g, q) for work, q in kernels)

    shares = np.array(sorted(measured), dtype=float)
    low, high = bracket(shares, truth(shares), EVERYWHERE)
    assert (low <= truth(EVERYWHERE) * (1 + 1e-9)).all()
    assert (truth(EVERYWHERE) <= high * (1 + 1e-9)).all()
    np.testing.assert_allclose(low[shares.astype(int) - 1], truth(shares), rtol=1e-9)
    np.testing.assert_allclose(high[shares.astype(int) - 1], truth(shares), rtol=1e-9)


def test_two_ends_leave_room_for_a_corner_and_for_a_chord():
    low, high = bracket(np.array([10.0, 100.0]), np.array([10.0, 4.0]), np.array([20.0, 50.0]))
    # at least the work of 10 % at twice the share, and never below the best; at most the chord in 1 / share
    np.testing.assert_allclose(low, [5.0, 4.0])
    np.testing.assert_allclose(high, [4 + 6 * (0.05 - 0.01) / 0.09, 4 + 6 * (0.02 - 0.01) / 0.09])


def test_a_neighbours_chord_narrows_it():
    shares, ms = np.array([10.0, 20.0, 100.0]), np.array([10.0, 5.5, 4.0])
    low, _ = bracket(shares, ms, np.array([25.0]))
    # the steep chord from 10 % to 20 % goes on below: 5.5 - 90 (1/20 - 1/25)
    assert low[0] == pytest.approx(5.5 - (10 - 5.5) / 0.05 * 0.01)


def test_one_share_bounds_by_work_and_by_speed():
    low, high = bracket(np.array([50.0]), np.array([8.0]), np.array([25.0, 50.0, 100.0]))
    np.testing.assert_allclose(low, [8.0, 8.0, 4.0])
    np.testing.assert_allclose(high, [16.0, 8.0, 8.0])
