"""The GPU% model against surfaces whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_lab.gpu_model import fit
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance

BY_HAND = Provenance("simulated", "a formula", "model")
BATCHES = (1, 2, 4, 8, 16, 32)
SHARES = tuple(range(10, 101, 10))


def truth(batch, gpu_pct):
    """Serial part, parallel work and a saturation share that grows with the batch."""
    batch = np.asarray(batch, dtype=float)
    return 1.5 + 0.05 * batch + 40 * (batch + 0.5) / np.minimum(gpu_pct, np.minimum(100, 12 * batch + 10))


def profile_of(points, model="net"):
    table = pd.DataFrame(points, columns=["batch", "gpu_pct", "service_ms"])
    return Profile(table.assign(model=model), BY_HAND, strict=False)


def sampled(function, batches=BATCHES, shares=SHARES):
    return profile_of([(b, g, float(function(b, g))) for b in batches for g in shares])


def grid():
    b, g = np.meshgrid(np.arange(1, 65), np.arange(1, 101), indexing="ij")
    return b, g


def test_a_full_grid_is_reproduced():
    model = fit(sampled(truth), "net")
    b, g = np.meshgrid(BATCHES, SHARES)
    assert np.median(np.abs(model.predict(b, g) / truth(b, g) - 1)) < 0.02
    assert model.error < 0.02


def test_scalars_give_a_float_and_arrays_broadcast():
    model = fit(sampled(truth), "net")
    assert type(model.predict(4, 50)) is float
    assert type(model.predict(np.int64(4), np.float64(50))) is float
    assert model.predict(4, [20, 50]).shape == (2,)
    assert model.predict(np.array([[1], [2], [3]]), [20, 50]).shape == (3, 2)
    assert model.predict(4, [20, 50])[1] == pytest.approx(model.predict(4, 50), rel=1e-12)


def test_six_points_of_a_small_machine_are_enough():
    model = fit(sampled(truth, (1, 4, 8), (50, 100)), "net")
    assert model.predict(2, 50) == pytest.approx(truth(2, 50), rel=0.25)
    assert model.predict(8, 100) == pytest.approx(truth(8, 100), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 8, 20, 64]), st.sampled_from([2, 10, 25, 50, 75, 100]), st.floats(0.01, 1e4)),
        min_size=2,
        max_size=25,
        unique_by=lambda p: p[:2],
    )
)
def test_never_slower_with_more_gpu_nor_faster_with_a_larger_batch(points):
    model = fit(profile_of(points), "net")
    ms = model.predict(*grid())
    assert np.isfinite(ms).all()
    assert (ms > 0).all()
    assert (np.diff(ms, axis=0) >= -1e-9 * ms[:-1]).all()
    assert (np.diff(ms, axis=1) <= 1e-9 * ms[:, :-1]).all()


def test_what_was_never_varied_is_constant_and_said():
    one_batch = fit(sampled(truth, batches=(4,)), "net")
    assert one_batch.predict(64, 50) == pytest.approx(one_batch.predict(1, 50))
    assert any("batch" in note for note in one_batch.notes)
    one_share = fit(sampled(truth, shares=(50,)), "net")
    assert one_share.predict(4, 10) == pytest.approx(one_share.predict(4, 100))
    assert any("gpu_pct" in note for note in one_share.notes)


def test_more_work_beyond_the_measured_batches_takes_proportionally_longer():
    model = fit(sampled(truth), "net")
    assert model.predict(128, 50) == pytest.approx(truth(128, 50), rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(sampled(truth), "vgg"), "model = 'vgg': must be one of net"),
        (lambda: fit(profile_of([(1, 10, 1.0)]), "net"), "points of net = 1"),
        (lambda: fit(sampled(truth), "net").predict(0.5, 50), "batch = 0.5"),
        (lambda: fit(sampled(truth), "net").predict([1, np.nan], 50), "batch = nan"),
        (lambda: fit(sampled(truth), "net").predict(1, 0.5), "gpu_pct = 0.5"),
        (lambda: fit(sampled(truth), "net").predict(1, [50, 101]), "gpu_pct = 101"),
        (lambda: fit(sampled(truth), "net").knee_pct(1, "elbow"), "rule = 'elbow'"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call()
