"""Panels: what they say is what the library says, they follow their controls, and trouble is words."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from traitlets import TraitError

import dstack_lab as lab
from dstack_lab.constraints import BINDINGS
from dstack_lab.panels.batch_planner import LIMITS
from dstack_lab.panels.controls import Choice
from dstack_lab.panels.live_figure import live, marks, show
from dstack_lab.workloads import load_of, scaled

V100 = lab.load_profile("v100-simulated")


class Raises(lab.Policy):
    def decide(self, state):
        return 1 / 0


class Lazy(lab.Policy):
    def decide(self, state):
        return []


MAKERS = {
    "KneeExplorer": lambda: lab.panels.KneeExplorer(V100, ["resnet50", "vgg19"]),
    "BatchPlanner": lambda: lab.panels.BatchPlanner(V100, ["resnet50", "vgg19"]),
    "ModelAnatomy": lambda: lab.panels.ModelAnatomy(["alexnet", "squeezenet1_1"]),
    "PolicyRace": lambda: lab.panels.PolicyRace("C-2", V100, [lab.DStack(reject=True), lab.Temporal()], 500),
    "ScheduleExplorer": lambda: lab.panels.ScheduleExplorer("C-2", V100, [lab.DStack(reject=True), lab.Temporal()], 500),
    "LiveRun": lambda: lab.panels.LiveRun(),
}
#: A control of each panel, and another value for it.
MOVES = {
    "KneeExplorer": ("gpu_pct", 30),
    "BatchPlanner": ("slo_ms", 25.0),
    "ModelAnatomy": ("batch", 8),
    "PolicyRace": ("load", 0.9),
    "ScheduleExplorer": ("policy", "Temporal"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_panel_reads_where_no_kernel_runs(name):
    panel = MAKERS[name]()
    bundle = panel._repr_mimebundle_()
    picture = base64.b64decode(bundle["image/png"])
    assert bundle["text/plain"] == panel.describe() == repr(panel)
    assert Image.open(io.BytesIO(picture)).width >= 600
    assert len(picture) < 40_000
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "sendChartToCloud" in panel.figure._config["modeBarButtonsToRemove"]
    assert panel.describe() in panel._words.value.replace("&#x27;", "'")


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_control_changes_facts_words_and_figure_of_its_panel_alone(name):
    first, second = MAKERS[name](), MAKERS[name]()
    before = first.facts()
    assert before == second.facts()
    figure = first.figure
    drawn = figure.to_json()
    field, value = MOVES[name]
    getattr(first, field).value = value
    assert first.facts() != before
    assert first.facts()[field] == value
    assert first.figure is figure
    assert figure.to_json() != drawn
    assert second.facts() == before
    assert first.facts()["drawn"] > 0


OWN = [lab.Service("resnet50", 50, lab.Poisson(100)), lab.Service("vgg19", 100, lab.Poisson(50))]
#: Panels in a state where every control counts, and another value of each.
LEVERS = {
    "KneeExplorer": (
        lambda p: p.rule,
        "capacity",
        {"model": "vgg19", "batch": 4, "gpu_pct": 20, "rule": "tolerance", "slo_ms": 30.0},
    ),
    "BatchPlanner": (None, None, {"model": "vgg19", "slo_ms": 20.0, "rate_rps": 90.0, "objective": "capacity", "gpu_pct": 20}),
    "ModelAnatomy": (None, None, {"model": "squeezenet1_1", "gpu": "H100", "batch": 4, "gpu_pct": 20}),
    "PolicyRace": (lambda p: p.load, 0.9, {"workload": "C-3", "load": 0.7, "arrivals": "gamma", "seed": 2}),
    "ScheduleExplorer": (
        lambda p: p.load,
        0.9,
        {"policy": "Temporal", "load": 0.5, "start_ms": 100.0, "span_ms": 80.0, "seed": 2},
    ),
}


@pytest.mark.parametrize(
    ("name", "field", "own"),
    [(name, field, False) for name, (*_, fields) in LEVERS.items() for field in fields]
    + [(name, field, True) for name in ("PolicyRace", "ScheduleExplorer") for field in LEVERS[name][2] if field != "workload"],
)
def test_no_control_is_only_named(name, field, own):
    """A control that is moved changes more of the facts than its own line, and the words."""
    panel = getattr(lab.panels, name)(profile=V100, duration_ms=500, services=OWN) if own else MAKERS[name]()
    control, value, fields = LEVERS[name]
    if control is not None:
        control(panel).value = value

    def told():
        return {k: v for k, v in panel.facts().items() if k != field}, panel.describe()

    before = told()
    getattr(panel, field).value = fields[field]
    after = told()
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("name", MOVES)
def test_a_panel_without_its_callback_keeps_old_facts(name):
    """What lets a notebook's check notice a disconnected control."""
    panel = MAKERS[name]()
    before = panel.facts()
    field, value = MOVES[name]
    getattr(panel, field).unobserve_all()
    getattr(panel, field).value = value
    assert panel.facts() == before


def test_knee_explorer_says_what_the_model_says():
    panel = lab.panels.KneeExplorer(V100, "vgg19")
    panel.batch.value, panel.gpu_pct.value, panel.rule.value = 4, 20, "efficacy"
    fitted = lab.fit(V100, "vgg19")
    facts = panel.facts()
    assert facts["service_ms"] == pytest.approx(fitted.predict(4, 20), abs=1e-3)
    assert facts["slowdown"] == pytest.approx(fitted.predict(4, 20) / fitted.predict(4, 100), abs=1e-3)
    assert facts["knee_pct"] == fitted.knee_pct(4, "efficacy")
    (here,) = [t for t in panel.figure.data if t.name == "vgg19, here"]
    assert (here.x[0], here.y[0]) == (20, fitted.predict(4, 20))


def test_batch_planner_says_what_the_optimizer_says():
    panel = lab.panels.BatchPlanner(V100, "resnet50")
    panel.slo_ms.value, panel.rate_rps.value = 30.0, 200.0
    best = lab.optimize([lab.Service("resnet50", 30, lab.Poisson(200))], V100).allocations[0]
    facts = panel.facts()
    found = facts["best_batch"], facts["best_gpu_pct"], facts["binds"], facts["feasible"]
    assert found == (best.batch, best.gpu_pct, best.binding, True)
    star = next(t for t in panel.figure.data if t.name == "best")
    assert (star.x[0], star.y[0]) == (best.gpu_pct, best.batch)
    panel.slo_ms.value = 1.0
    assert panel.facts()["feasible"] is False
    assert "relax the SLO" in panel.facts()["message"]
    panel.slo_ms.value = 30.0
    assert panel.facts() == facts


@pytest.mark.parametrize(
    ("binds", "objective", "slo_ms", "rate_rps"),
    [
        ("none", "efficacy", 50.0, 400.0),
        ("SLO: fill", "efficacy", 25.0, 400.0),
        ("SLO: wait", "capacity", 50.0, 400.0),
        ("rate", "capacity", 500.0, 400.0),
    ],
)
def test_batch_planner_says_plainly_what_limits_the_best_point(binds, objective, slo_ms, rate_rps):
    panel = lab.panels.BatchPlanner(V100, "resnet50")
    panel.objective.value, panel.slo_ms.value, panel.rate_rps.value = objective, slo_ms, rate_rps
    assert panel.facts()["binds"] == binds
    assert ("No constraint binds" if binds == "none" else f"(“{binds}”)") in panel.describe()
    assert set(LIMITS) == set(BINDINGS) - {"GPU total"}


def test_every_point_of_the_map_is_judged_as_the_optimizer_judges():
    from dstack_lab.constraints import CONSTRAINTS, broken_most
    from dstack_lab.figures.choices import _map, choose

    found = choose(V100, lab.Service("resnet50", 40, lab.Poisson(300)), "efficacy", 50)
    wrong, score = _map(found)
    for batch, share in np.random.default_rng(0).integers([1, 1], [found.table.batch_max + 1, 101], (200, 2)).tolist():
        told = broken_most(found.table.at(batch, share), batch, 40, 300)
        kind = wrong[batch - 1, share - 1]
        assert told == ("none" if kind < 0 else CONSTRAINTS[kind])
        assert np.isnan(score[batch - 1, share - 1]) == (kind >= 0)


def test_anatomy_adds_up():
    panel = lab.panels.ModelAnatomy("alexnet")
    panel.gpu_pct.value = 20
    facts = panel.facts()
    assert sum(facts["time_pct"].values()) == pytest.approx(100, abs=0.2)
    bars = [np.asarray(t.y, dtype=float) for t in panel.figure.data if t.type == "bar" and t.y[0] is not None]
    assert np.concatenate(bars).sum() == pytest.approx(facts["service_ms"], abs=1e-3)
    assert sum(map(len, bars)) == facts["kernels"] == facts["drawn"] / 2


def test_schedule_explorer_shows_the_simulated_run_and_follows_a_zoom():
    panel = lab.panels.ScheduleExplorer("C-2", V100, lab.Temporal(), 1000)
    panel.load.value = 0.9
    services = lab.workload("C-2", V100, 0.9)
    trace = lab.simulate(lab.optimize(services, V100, overload="reject"), lab.Temporal(), 1000, seed=1)
    assert panel.facts()["launches"] == len(trace.launches)
    assert panel.facts()["attainment"] == round(float(lab.summary(trace)["slo_attainment"].iloc[-1]), 4)
    panel.figure.layout.xaxis.range = (400, 500)
    inside = (trace.launches["start_ms"] < 500) & (trace.launches["end_ms"] > 400)
    assert (panel.start_ms.value, panel.span_ms.value) == (400, 100)
    assert panel.facts()["visible"] == inside.sum()


def test_a_dense_timeline_is_a_raster_and_exact_again_when_zoomed():
    panel = lab.panels.ScheduleExplorer("C-2", V100, lab.DStack(reject=True), 20_000)
    panel.span_ms.value = 20_000
    assert panel.facts()["raster"] is True
    assert {t.type for t in panel.figure.data} <= {"heatmap", "scatter"}
    panel.figure.layout.xaxis.range = (1000, 1100)
    assert panel.facts()["raster"] is False
    assert {t.type for t in panel.figure.data} == {"bar"}


def test_nobody_passes_the_bound_of_the_requests_that_came():
    panel = lab.panels.PolicyRace("C-2", V100, [lab.DStack(reject=True), lab.Temporal(), lab.Ideal()], 1000)
    for load in (0.2, 0.6, 1.2):
        panel.load.value = load
        facts = panel.facts()
        # the last requests of a run may be served after its end: by the longest SLO over the duration
        assert max(facts["goodput_rps"].values()) <= facts["bound_rps"] * 1.1 + 0.1


@pytest.mark.parametrize("own", [False, True])
def test_a_race_under_bursts_is_the_simulated_one(own):
    services = [lab.Service("resnet50", 50, lab.Deterministic(100)), lab.Service("vgg19", 100, lab.Poisson(50))] if own else None
    panel = lab.panels.PolicyRace("C-2", V100, lab.Temporal(), 1000, services)
    panel.load.value = 0.6
    seen = {}
    for kind in ("own", "poisson", "gamma") if own else ("poisson", "gamma"):
        panel.arrivals.value = kind
        part = 0.6 / load_of(services, V100) if own else 1
        makers = {"own": lambda s: s.arrivals, "poisson": lambda s: lab.Poisson(s.rate_rps)}
        makers["gamma"] = lambda s: lab.Gamma(s.rate_rps, cv=3)
        base = scaled(services, part) if own else lab.workload("C-2", V100, 0.6)
        asked = [replace(s, arrivals=makers[kind](s)) for s in base]
        trace = lab.simulate(lab.optimize(asked, V100, overload="reject"), lab.Temporal(), 1000, seed=1)
        seen[kind] = panel.facts()["goodput_rps"]["Temporal"]
        assert seen[kind] == round(float(lab.summary(trace)["goodput_rps"].iloc[-1]), 1)
        assert panel.facts()["arrivals"] == kind
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("name", ["PolicyRace", "ScheduleExplorer"])
def test_a_policy_that_fails_is_words_and_the_panel_goes_on(name):
    panel = getattr(lab.panels, name)("C-2", V100, [Raises(), Lazy(), lab.Temporal()], 300)
    _ = panel.figure
    if name == "PolicyRace":
        goodput = panel.facts()["goodput_rps"]
        assert goodput["Raises"] is None
        assert goodput["Lazy"] == 0 < goodput["Temporal"]
        assert "division by zero" in panel.message
        assert "Lazy launched nothing" in panel.message
        return
    assert "division by zero" in panel.facts()["message"]
    panel.policy.value = "Lazy"
    assert "Lazy launched nothing" in panel.facts()["message"]
    panel.policy.value = "Temporal"
    assert panel.facts()["message"] == ""
    assert panel.facts()["drawn"] > 0


def test_values_out_of_range_are_taken_back_in_words():
    panel = lab.panels.KneeExplorer(V100, "resnet50")
    panel.gpu_pct.value = 300
    assert panel.facts()["gpu_pct"] == 100
    assert panel.facts()["message"] == "gpu_pct = 300: must be from 1 to 100; took 100"
    assert "gpu_pct = 300" in panel._message.value
    panel.gpu_pct.value = 40
    assert panel.facts()["message"] == ""
    with pytest.raises(TraitError, match="model = 'nobody': must be one of resnet50"):
        panel.model.value = "nobody"
    assert "nobody" in panel.facts()["message"]
    panel.gpu_pct.value = 41
    assert (panel.facts()["model"], panel.facts()["gpu_pct"], panel.facts()["message"]) == ("resnet50", 41, "")


SLIDERS = [
    (name, field)
    for name, fields in {
        "KneeExplorer": ("batch", "gpu_pct", "slo_ms"),
        "BatchPlanner": ("slo_ms", "rate_rps", "gpu_pct"),
        "ModelAnatomy": ("batch", "gpu_pct"),
        "PolicyRace": ("load", "seed"),
        "ScheduleExplorer": ("load", "start_ms", "span_ms", "seed"),
        "LiveRun": ("seconds",),
    }.items()
    for field in fields
]


@pytest.mark.parametrize(("name", "field"), SLIDERS)
def test_any_slider_takes_a_value_beyond_its_range_back_in_words(name, field):
    panel = MAKERS[name]()
    _ = panel.figure
    slider = getattr(panel, field)
    low, high = slider.range()
    for given, kept in ((-5, low), (10 * high + 1, high)):
        slider.value = given
        assert slider.value == pytest.approx(kept)
        assert f"{field} = {given:g}: must be from {low:g} to {high:g}" in panel.facts()["message"]
        assert panel.facts()["message"] in html.unescape(panel._message.value)
    slider.value = low if field == "span_ms" else high
    if name in MOVES:
        other, value = MOVES[name]
        getattr(panel, other).value = value
        assert panel.facts()[other] == value
    assert "must be" not in panel.facts()["message"]


@pytest.mark.parametrize("name", MAKERS)
def test_a_list_refuses_what_it_does_not_offer_and_the_panel_goes_on(name):
    panel = MAKERS[name]()
    lists = {field: control for field, control in panel._watched.items() if isinstance(control, Choice)}
    assert lists
    for field, control in lists.items():
        kept = control.value
        with pytest.raises(TraitError, match=f"{field} = 'nobody': must be one of"):
            control.value = "nobody"
        assert f"{field} = 'nobody'" in panel.facts()["message"]
        assert control.value == kept
        control.value = control.options[-1][1] if isinstance(control.options[-1], tuple) else control.options[-1]
        assert "must be" not in panel.facts()["message"]


@pytest.mark.parametrize(("name", "where"), [("KneeExplorer", "profile"), ("BatchPlanner", "profile"), ("ModelAnatomy", "zoo")])
@pytest.mark.parametrize("asked", [["alexnet", "nobody"], "nobody", []])
def test_a_network_that_nobody_knows_is_named(name, where, asked):
    panel = lab.panels.ModelAnatomy(asked) if where == "zoo" else getattr(lab.panels, name)(V100, asked)
    missing = "nobody" if asked else "no network"
    assert f"{missing} is not in the {where}, which holds " in panel.facts()["message"]
    assert "nobody" not in panel.model.options
    assert len(panel.model.options) == (1 if "alexnet" in asked else len(lab.zoo.names() if where == "zoo" else V100.models))
    panel.gpu_pct.value = 33
    assert panel.facts()["gpu_pct"] == 33
    assert missing in panel.facts()["message"]


@pytest.mark.parametrize("name", ["PolicyRace", "ScheduleExplorer", "LiveRun"])
def test_services_of_a_network_that_the_profile_lacks_are_refused(name):
    few = lab.Profile(V100.of("resnet50"), V100.provenance)
    with pytest.raises(ValueError, match=r"model of bert_base = 'bert_base': must be one of resnet50"):
        getattr(lab.panels, name)(profile=few, services=[lab.Service("bert_base", 100, lab.Poisson(10))])


def test_a_workload_that_the_profile_cannot_serve_is_words():
    few = lab.Profile(V100.table[V100.table["model"].isin(["resnet50", "vgg19"])], V100.provenance)
    panel = lab.panels.PolicyRace("C-4", few, [lab.Temporal()], 300)
    assert "must be one of resnet50, vgg19" in panel.facts()["message"]
    panel.workload.value = "C-2"
    assert panel.facts()["message"] == ""
    assert panel.facts()["goodput_rps"]["Temporal"] > 0


def test_a_strict_panel_raises_where_a_control_was_set():
    panel = lab.panels.ScheduleExplorer("C-2", V100, [lab.Temporal(), Raises()], 300)
    panel.strict = True
    with pytest.raises(ValueError, match="division by zero"):
        panel.policy.value = "Raises"


@pytest.mark.parametrize("name", MAKERS)
def test_every_slider_stands_beside_a_labelled_number_box(name):
    panel = MAKERS[name]()
    for control in panel._watched.values():
        row = next(r for r in panel._rows if r is control or control in getattr(r, "children", ()))
        labelled = row if row is control else row.children[0]
        assert labelled.description
        assert control.tooltip
        assert labelled.value == control.value


@pytest.mark.parametrize(("given", "kept"), [(398.1071705534972, 398.0), (400.0, 400.0), (1234.5, 1234.5), (120.0, 120.0)])
def test_a_logarithmic_slider_stands_on_round_numbers_and_keeps_what_is_typed(given, kept):
    panel = lab.panels.BatchPlanner()
    panel.rate_rps.value = given
    assert panel.rate_rps.value == kept
    panel.slo_ms.value = 55.00000000000001
    assert panel.slo_ms.value == 55.0
    assert panel.facts()["message"] == ""


def test_show_brings_one_figure_up_to_another():
    first = lab.figures.knee(V100, "resnet50", 8, at_pct=30)
    for second in (lab.figures.knee(V100, "vgg19", 4, at_pct=60), lab.figures.knee(V100, ["vgg19", "alexnet"], 3)):
        widget = live(first)
        show(widget, second)
        kept = widget.to_plotly_json()
        for trace in kept["data"]:
            trace.pop("uid", None)
        assert settled(kept["layout"]) == settled(live(second).to_plotly_json()["layout"])
        assert marks(widget) == marks(second)
        assert [t.name for t in widget.data] == [t.name for t in second.data]


def settled(value):
    """Layout in comparable form: order does not matter, and an empty list is none."""
    if isinstance(value, dict):
        return {k: settled(v) for k, v in sorted(value.items()) if v is not None and not (isinstance(v, (list, tuple)) and not v)}
    return [settled(v) for v in value] if isinstance(value, (list, tuple)) else np.asarray(value).tolist()
