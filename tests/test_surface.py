"""The mixture of kernels against mixtures that are known."""

import numpy as np
import pytest

from dstack_lab.surface import fit_mixture, judge_mixture


def grid(batches=(1, 2, 4, 8, 16), shares=range(10, 101, 10)):
    b, g = np.meshgrid(np.array(batches, dtype=float), np.array(shares, dtype=float))
    return b.ravel(), g.ravel()


@pytest.mark.parametrize(
    "truth",
    [
        lambda b, g: 2.0 + 0.1 * b,
        lambda b, g: 50 * np.maximum(b / g, 1 / 10),
        lambda b, g: 1 + 20 * b / g,
        lambda b, g: 3 + 100 / np.minimum(g, 40) + 0.5 * b,
        lambda b, g: 1 + np.where(b >= 4, 300 / g, 20 / g),
    ],
)
def test_a_mixture_is_found_again(truth):
    b, g = grid()
    np.testing.assert_allclose(fit_mixture(b, g, truth(b, g))(b, g), truth(b, g), rtol=0.02)


def test_weights_are_never_negative_so_the_surface_is_monotone():
    b, g = grid()
    rng = np.random.default_rng(0)
    surface = fit_mixture(b, g, rng.uniform(1, 100, b.size))
    assert (surface.weights >= 0).all()
    x, y = np.meshgrid(np.linspace(1, 100, 80), np.linspace(1, 100, 90), indexing="ij")
    ms = surface(x, y)
    assert (np.diff(ms, axis=0) >= -1e-9).all()
    assert (np.diff(ms, axis=1) <= 1e-9).all()


def test_an_outlier_counts_little():
    b, g = grid()
    ms = 2 + 30 * b / g
    ms[17] *= 10
    fitted = fit_mixture(b, g, ms)(b, g)
    assert np.median(np.abs(fitted / (2 + 30 * b / g) - 1)) < 0.02


def test_a_prior_is_a_term_like_the_others():
    b, g = grid((1, 8), (10, 100))
    prior = lambda b, g: 1 + b**0.7 * 30 / g**0.8  # noqa: E731
    fitted = fit_mixture(b, g, 5 * prior(b, g), shrink=16, prior=prior)
    x, y = grid((3, 20), (20, 45))
    np.testing.assert_allclose(fitted(x, y), 5 * prior(x, y), rtol=0.01)


def test_left_out_errors_show_noise_and_choose_a_stiffer_surface_for_it():
    b, g = grid()
    clean = 2 + 30 * b / np.minimum(g, 60)
    noisy = clean * np.exp(0.2 * np.random.default_rng(0).standard_normal(b.size))
    loose, small = judge_mixture(b, g, clean)
    stiff, large = judge_mixture(b, g, noisy)
    assert stiff >= loose
    assert np.median(np.abs(small)) < 0.02
    assert 0.1 < np.std(large) < 0.4
