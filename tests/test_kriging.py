"""The residual process: it interpolates, forgives outliers, and knows where it knows nothing."""

import numpy as np

from dstack_lab.kriging import correct, doubt_removed


def points(batches=(1, 2, 4, 8, 16, 32), shares=(10, 20, 40, 70, 100)):
    b, g = np.meshgrid(np.array(batches, dtype=float), np.array(shares, dtype=float), indexing="ij")
    return b.ravel(), g.ravel()


def test_a_step_between_batches_is_followed():
    b, g = points()
    residual = np.where(b < 4, -0.3, 0.2)
    mean = correct(b, g, residual, residual).mean(b, g)
    np.testing.assert_allclose(mean, residual, atol=0.03)


def test_beyond_the_measured_range_the_edge_counts():
    b, g = points()
    fitted = correct(b, g, np.where(b < 4, -0.3, 0.2), np.where(b < 4, -0.3, 0.2))
    far = fitted.mean(np.array([500.0]), np.array([2.0]))
    np.testing.assert_allclose(far, fitted.mean(np.array([32.0]), np.array([10.0])))


def test_one_wild_point_is_not_followed():
    b, g = points()
    residual = 0.01 * np.sin(np.arange(b.size))
    residual[12] = 1.0
    mean = correct(b, g, residual, residual).mean(b, g)
    assert np.abs(mean).max() < 0.15


def test_spread_is_the_diagonal_of_the_covariance_and_grows_away_from_points():
    b, g = points((1, 2, 4), (20, 50, 100))
    fitted = correct(b, g, 0.1 * np.cos(b * g), 0.1 * np.cos(b * g))
    x, y = points((1, 3, 64), (5, 50))
    np.testing.assert_allclose(fitted.spread(x, y) ** 2, np.diag(fitted.covariance(x, y)), rtol=1e-6)
    assert fitted.spread(np.array([64.0]), np.array([5.0])) > fitted.spread(np.array([2.0]), np.array([50.0]))


def test_few_points_cannot_prove_no_noise():
    b, g = points((1, 2, 4), (20, 50, 100))
    few = correct(b, g, np.zeros(9), np.zeros(9))
    b, g = points()
    assert few.noise > correct(b, g, np.zeros(30), np.zeros(30)).noise > 0


def test_thousands_of_points_are_thinned():
    b, g = points(range(1, 41), range(1, 101, 2))
    fitted = correct(b, g, 0.2 * np.log(b) / 4, 0.2 * np.log(b) / 4)
    assert len(fitted.at) == 400
    np.testing.assert_allclose(fitted.mean(b, g), 0.05 * np.log(b), atol=0.02)


def test_measuring_where_one_has_measured_removes_least_doubt():
    b, g = points()
    measured = np.zeros(b.size, dtype=bool)
    measured[[0, 4, 25, 29]] = True  # the corners
    removed = doubt_removed(b, g, measured, np.ones(b.size))
    assert removed[measured].max() < removed[~measured].min()
    weights = np.where(b == 8, 100.0, 0.01)
    assert b[np.argmax(doubt_removed(b, g, measured, weights))] == 8
