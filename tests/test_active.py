"""Choosing points, against truths that are known and against public tables where they are at hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dstack_lab.active import choose_points

BATCHES = (1, 2, 4, 8, 16, 32)
SHARES = tuple(range(10, 101, 10))
PUBLIC = Path(__file__).parents[2] / "shared" / "data"


def smooth(batch, gpu_pct):
    return 1.5 + 0.05 * batch + 40 * (batch + 0.5) / np.minimum(gpu_pct, np.minimum(100, 12 * batch + 10))


def switched(batch, gpu_pct):
    return np.where(batch < 2, 8 + 600 / np.minimum(gpu_pct, 50), 9 + (2400 + 90 * batch) / gpu_pct)


def saturating(batch, gpu_pct):
    """Tolerance knee at 40 % for every batch, on a 10 % grid."""
    return 100.0 * batch / np.minimum(gpu_pct, 40)


class Recorder:
    """Measures a formula and remembers what was asked."""

    def __init__(self, truth, noise=0.0, missing=lambda b, g: False):
        self.truth, self.noise, self.missing = truth, noise, missing
        self.asked, self.rng = [], np.random.default_rng(1)

    def __call__(self, batch, gpu_pct):
        assert type(batch) is int
        assert type(gpu_pct) is float
        self.asked.append((batch, gpu_pct))
        if self.missing(batch, gpu_pct):
            return float("nan")
        return float(self.truth(float(batch), gpu_pct)) * np.exp(self.noise * self.rng.standard_normal())


def rest_errors(choice, truth):
    asked = set(zip(choice.table["batch"], choice.table["gpu_pct"], strict=True))
    rest = np.array([(b, g) for b in BATCHES for g in SHARES if (b, g) not in asked], dtype=float)
    return np.abs(choice.model.predict(rest[:, 0], rest[:, 1]) / truth(rest[:, 0], rest[:, 1]) - 1)


@pytest.mark.parametrize("truth", [smooth, switched, saturating])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_twelve_points_tell_the_rest_of_the_grid(truth, noise):
    measure = Recorder(truth, noise)
    choice = choose_points(measure, BATCHES, SHARES, budget=12)
    assert len(measure.asked) == len(set(measure.asked)) == len(choice.table) == 12
    errors = rest_errors(choice, truth)
    assert np.median(errors) < 0.04
    assert np.quantile(errors, 0.9) < 0.15


@pytest.mark.parametrize("truth", [smooth, switched, saturating])
def test_the_knees_found_are_those_of_the_truth(truth):
    choice = choose_points(Recorder(truth), BATCHES, SHARES)
    inside, near = [], []
    for row in choice.knees.itertuples():
        curve = truth(float(row.batch), np.array(SHARES, dtype=float))
        true = SHARES[int(np.argmax(curve <= 1.05 * curve.min()))]
        inside.append(row.low_pct - 10 <= true <= row.high_pct + 10)
        near.append(abs(row.knee_pct - true) <= 10)
    assert all(inside)
    assert np.mean(near) >= 0.6
    assert list(choice.knees.columns) == ["batch", "knee_pct", "low_pct", "high_pct", "kind"]


@pytest.mark.parametrize(("truth", "slo_ms"), [(smooth, 40.0), (switched, 120.0), (saturating, 100.0)])
def test_the_operating_point_is_nearly_the_best_and_is_measured(truth, slo_ms):
    choice = choose_points(Recorder(truth), BATCHES, SHARES, slo_ms=slo_ms)
    b, g = np.meshgrid(np.array(BATCHES, dtype=float), np.array(SHARES, dtype=float), indexing="ij")
    efficacy = np.where(truth(b, g) <= slo_ms / 2, b / (truth(b, g) ** 2 * g), 0)
    i, j = BATCHES.index(choice.operating_point[0]), SHARES.index(choice.operating_point[1])
    assert efficacy[i, j] >= 0.9 * efficacy.max()


def test_a_tight_slo_has_no_operating_point():
    assert choose_points(Recorder(smooth), BATCHES, SHARES, slo_ms=0.1).operating_point is None
    assert choose_points(Recorder(smooth), BATCHES, SHARES).operating_point is None


def test_more_points_leave_less_doubt():
    def doubt(budget):
        return choose_points(Recorder(switched, 0.01), BATCHES, SHARES, budget=budget).doubt

    assert doubt(60) < doubt(12)


def test_the_same_answers_lead_to_the_same_questions():
    one, other = Recorder(smooth), Recorder(smooth)
    choose_points(one, BATCHES, SHARES)
    choose_points(other, BATCHES[::-1], SHARES[::-1])
    assert one.asked == other.asked


def test_a_budget_of_the_grid_measures_the_grid():
    measure = Recorder(smooth)
    choice = choose_points(measure, (1, 2), (50, 100), budget=40)
    assert sorted(measure.asked) == [(1, 50.0), (1, 100.0), (2, 50.0), (2, 100.0)]
    assert "4 points" in str(choice)


def test_one_share_or_one_batch_is_enough_to_go_on_with():
    assert choose_points(Recorder(smooth), BATCHES, (50,), budget=4, slo_ms=40.0).knees["knee_pct"].isna().all()
    assert len(choose_points(Recorder(smooth), (4,), SHARES, budget=6, slo_ms=40.0).table) == 6


@pytest.mark.parametrize("budget", [2, 3, 5])
def test_a_tiny_budget_is_kept(budget):
    assert len(choose_points(Recorder(smooth), BATCHES, SHARES, budget=budget).table) == budget


def test_a_point_out_of_memory_counts_and_is_not_asked_again():
    measure = Recorder(smooth, missing=lambda b, g: b == 32)
    choice = choose_points(measure, BATCHES, SHARES)
    assert len(measure.asked) == len(set(measure.asked)) == 12
    assert choice.table["service_ms"].isna().sum() == sum(b == 32 for b, _ in measure.asked) >= 2
    assert choice.model.predict(16, 50) == pytest.approx(float(smooth(16.0, 50)), rel=0.1)


def test_a_long_list_of_batches_is_thinned_and_stays_fast():
    measure = Recorder(smooth)
    choice = choose_points(measure, range(1, 65), range(1, 101), budget=8)
    assert len(measure.asked) == 8
    assert len(choice.knees) == 64


def test_a_prior_helps_where_points_are_few():
    def error(prior):
        choice = choose_points(Recorder(smooth), BATCHES, SHARES, budget=3, prior=prior)
        return np.median(rest_errors(choice, smooth))

    assert error(lambda b, g: 3 * smooth(b, g)) < 0.01 < error(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1}, "budget = 1"),
        ({"batches": ()}, "batches"),
        ({"shares": ()}, "shares"),
        ({"batches": (0, 1)}, "batch = 0"),
        ({"shares": (50, 120)}, "gpu_pct = 120"),
        ({"slo_ms": -1.0}, "slo_ms = -1"),
        ({"measure": lambda b, g: 0.0}, r"measure\(batch, gpu_pct\) = 0.0"),
        ({"measure": lambda b, g: float("inf")}, r"measure\(batch, gpu_pct\) = inf"),
        ({"measure": lambda b, g: float("nan")}, "points that could be measured = 0"),
    ],
)
def test_bad_input_names_itself(change, message):
    with pytest.raises(ValueError, match=message):
        choose_points(**{"measure": Recorder(smooth), "batches": BATCHES, "shares": SHARES, **change})


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public tables are not here")
@pytest.mark.parametrize("name", ["resnet50_trt", "vgg19_trt", "alexnet_cntk"])
def test_public_tables_are_told_by_twelve_points(name):
    rows = pd.read_csv(PUBLIC / "v100_gslice_authors.csv")
    rows = rows[(rows["model"] == name) & rows["set"].str.startswith("optim")]
    known = {(b, float(g)): ms for b, g, ms in zip(rows["batch"], rows["gpu_pct"], rows["median_latency_ms"], strict=True)}
    choice = choose_points(lambda b, g: known[b, g], BATCHES, SHARES)
    asked = set(zip(choice.table["batch"], choice.table["gpu_pct"], strict=True))
    errors = [abs(float(choice.model.predict(*at)) / ms - 1) for at, ms in known.items() if at not in asked]
    assert np.median(errors) <= 0.06
    assert np.quantile(errors, 0.9) <= 0.15
