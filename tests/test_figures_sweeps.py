"""Figures of a period plan and of policies over loads: what is drawn equals the data."""

import numpy as np
import pytest

import dstack_lab as lab
from dstack_lab.policies import PeriodPlan, Window
from dstack_lab.services import Allocation


@pytest.fixture(scope="module")
def profile():
    return lab.load_profile("v100-simulated")


@pytest.fixture(scope="module")
def table(profile):
    services = lab.workload("C-2", profile, load=1)
    return lab.compare(services, profile, loads=(0.4, 2.0), seeds=(0, 1), duration_ms=500)


def test_a_period_plan_is_a_table(profile):
    period = lab.plan_period(lab.optimize(lab.workload("C-3", profile, load=0.5), profile))
    rows = period.to_frame()
    assert list(rows["start_ms"]) == sorted(rows["start_ms"])
    assert [tuple(row) for row in rows.itertuples(index=False)] == [
        (w.service, w.start_ms, w.end_ms, w.gpu_pct, w.batch) for w in period.windows
    ]


def test_windows_are_drawn_whole(profile):
    period = lab.plan_period(lab.optimize(lab.workload("C-3", profile, load=0.5), profile))
    made = lab.figures.period(period, profile.provenance)
    drawn = sum(float(np.sum(np.asarray(bar.x) * np.asarray(bar.width))) for bar in made.data)
    assert drawn == pytest.approx(sum((w.end_ms - w.start_ms) * w.gpu_pct for w in period.windows))
    assert [bar.name for bar in made.data] == ["resnet50", "vgg19", "mobilenet_v2"]
    assert made.layout.title.subtitle.text == str(profile.provenance)
    assert made.layout.xaxis.title.text.endswith("[ms]")
    assert made.layout.yaxis.title.text.endswith("[GPU%]")


def test_a_window_across_the_end_of_a_period_is_drawn_at_both_ends():
    point = Allocation("a", 40, 2, 30.0, 10.0)
    made = lab.figures.period(PeriodPlan(100.0, (Window(80.0, 110.0, "a", 40, 2),), (point,)), "by hand")
    (bar,) = made.data
    assert sorted(zip(bar.base, bar.x, strict=True)) == [(0.0, 10.0), (80.0, 20.0)]
    assert max(np.asarray(bar.base) + np.asarray(bar.x)) == 100


def test_lines_over_loads_are_the_table(table):
    made = lab.figures.loads(table, "p99_ms", service="vgg19")
    for line in made.data:
        mine = table[(table["policy"] == line.name) & (table["service"] == "vgg19")]
        np.testing.assert_array_equal(line.y, mine["p99_ms"])
        np.testing.assert_array_equal(line.x, mine["bound_load"])
        ends = np.asarray(line.y) + np.asarray(line.error_y.array), np.asarray(line.y) - np.asarray(line.error_y.arrayminus)
        np.testing.assert_allclose(ends, [mine["p99_ms_high"], mine["p99_ms_low"]])
    assert made.layout.yaxis.title.text == "p99 latency [ms]"
    assert "simulated" in made.layout.title.subtitle.text


def test_a_load_that_cannot_be_scheduled_is_a_gap(table):
    line = next(line for line in lab.figures.loads(table).data if line.name == "DStack")
    assert np.isnan(line.y).tolist() == [False, True]


def test_gains_show_means_and_intervals(table):
    one = table[table["load"] == 0.4]
    (dots,) = lab.figures.gains(one).data
    mine = one[one["service"] == "all"]
    np.testing.assert_array_equal(dots.x, mine["slo_attainment_gain"])
    np.testing.assert_allclose(np.asarray(dots.x) - np.asarray(dots.error_x.arrayminus), mine["slo_attainment_gain_low"])
    away = (mine["slo_attainment_gain_low"] > 0) | (mine["slo_attainment_gain_high"] < 0)
    assert [symbol == "circle" for symbol in dots.marker.symbol] == away.tolist()


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda t: lab.figures.loads(t, "speed"), "metric = 'speed': must be one of"),
        (lambda t: lab.figures.loads(t, service="bert"), "service = 'bert': must be one of"),
        (lambda t: lab.figures.loads(t.drop(columns="seeds")), "table columns"),
        (lambda t: lab.figures.loads([1]), "table = 'list'"),
        (lambda t: lab.figures.gains(t), "loads in table"),
        (lambda t: lab.figures.gains(t, "jain"), "metric = 'jain'"),
    ],
)
def test_what_does_not_fit_is_named(table, draw, says):
    with pytest.raises(ValueError, match=says):
        draw(table)


def test_a_placement_is_drawn_as_its_replicas(profile):
    services = lab.workload("C-3", profile, load=1.1)
    placed = lab.place(services, lab.Cluster(gpus=2))
    made = lab.figures.placement(placed)
    drawn = {}
    for bar in made.data:
        for row, x in zip(bar.y, bar.x, strict=True):
            drawn[placed.cluster.names[row], bar.name.removesuffix("*")] = x
        assert bar.name.endswith("*") == (len(placed.of(bar.name.removesuffix("*"))) > 1)
    assert drawn == {(r.gpu, r.service): r.demand_pct for r in placed.replicas}
    assert "simulated" in made.layout.title.subtitle.text
