"""Figures: what is drawn equals the data, every axis has its unit, and every subtitle its origin."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab import figures
from dstack_lab.figures import space, style, timelines

MARK = "four workers on two cores"
ORIGIN = lab.Provenance("simulated", "made-up GPU <x> & co", "model", date="2026-01-01", marks=(MARK,))


class Side(lab.Policy):
    """Whatever is ready, at its planned share, if it fits; above 100 too with `crowd`."""

    def __init__(self, crowd=False):
        self.oversubscribes = crowd

    def decide(self, state):
        free, starts = (1e9 if self.oversubscribes else state.free_pct), []
        for s in state.services:
            share = s.gpu_pct
            if s.ready and not s.in_flight and share <= free:
                starts.append(lab.Launch(s.name, share, min(s.waiting, s.batch), "side by side"))
                free -= share
        return starts


@pytest.fixture(scope="module")
def profile():
    rows = [
        (model, b, g, base + b * work / min(g, cap))
        for model, base, work, cap in (("small", 1.0, 20.0, 30), ("middle", 2.0, 60.0, 50), ("large", 4.0, 300.0, 80))
        for b in (1, 2, 4, 8)
        for g in (10.0, 20.0, 30.0, 50.0, 80.0, 100.0)
    ]
    return lab.Profile(pd.DataFrame(rows, columns=["model", "batch", "gpu_pct", "service_ms"]), ORIGIN)


@pytest.fixture(scope="module")
def plan(profile):
    rates = {"small": (15, 300), "middle": (40, 100), "large": (120, 60)}
    return lab.optimize([lab.Service(m, slo, lab.Poisson(rate)) for m, (slo, rate) in rates.items()], profile)


@pytest.fixture(scope="module")
def trace(plan):
    return lab.simulate(plan, Side(), 2000, seed=1)


@pytest.fixture(scope="module")
def crowd(plan):
    return lab.simulate(plan, Side(crowd=True), 2000, seed=1)


@pytest.fixture(scope="module")
def table(trace, crowd):
    return pd.concat([lab.summary(t).assign(policy=name) for name, t in (("Side", trace), ("Crowd", crowd))])


@pytest.fixture(scope="module")
def every(profile, plan, trace, table):
    return {
        "knee": figures.knee(profile),
        "batches": figures.batches(profile, "middle", slo_ms=20),
        "timeline": figures.timeline(trace),
        "raster": figures.timeline(trace, exact=10),
        "comparison": figures.comparison(table, trace.provenance, bound_rps=360),
        "latency": figures.latency(trace),
        "plan": figures.plan(plan),
    }


NAMES = ("knee", "batches", "timeline", "raster", "comparison", "latency", "plan")


def drawn(figure):
    """Rectangles of a timeline: low and high time, low and high GPU%."""
    parts = [
        np.column_stack([b.base, b.base + b.x, b.y - b.width / 2, b.y + b.width / 2])
        for b in figure.data
        if b.customdata is not None  # the others are keys of the legend
    ]
    return np.concatenate(parts)


def area(trace, start, end, service=None):
    runs = trace.launches if service is None else trace.launches[trace.launches["service"] == service]
    return float(((runs["end_ms"].clip(start, end) - runs["start_ms"].clip(start, end)) * runs["gpu_pct"]).sum())


def overlaps(boxes, eps=1e-6):
    t0, t1, g0, g1 = boxes.T
    in_time = np.minimum.outer(t1, t1) - np.maximum.outer(t0, t0) > eps
    in_space = np.minimum.outer(g1, g1) - np.maximum.outer(g0, g0) > eps
    return int(np.triu(in_time & in_space, k=1).sum())


# --- timeline


@pytest.mark.parametrize("which", ["trace", "crowd"])
@pytest.mark.parametrize("view", [(None, None), (0, 2000), (333.3, 512.5)])
def test_timeline_draws_each_gpu_percent_millisecond_once(which, view, request):
    run = request.getfixturevalue(which)
    boxes = drawn(figures.timeline(run, *view))
    start, end = (0, 500) if view[0] is None else view
    assert boxes[:, 0].min() >= start
    assert boxes[:, 1].max() <= end + 1e-9
    assert ((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])).sum() == pytest.approx(area(run, start, end))
    assert overlaps(boxes) == 0


def test_timeline_stays_within_the_gpu_unless_it_is_oversubscribed(trace, crowd):
    assert drawn(figures.timeline(trace, 0, 2000))[:, 3].max() <= 100 + 1e-3
    over = figures.timeline(crowd, 0, 2000)
    assert drawn(over)[:, 3].max() > 100
    assert "oversubscribed" in over.to_json()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 15), st.floats(1, 100), st.sampled_from("abc")), min_size=1, max_size=25
    )
)
def test_places_never_overlap_and_add_up(runs):
    runs.sort()
    launches = pd.DataFrame(
        [(s, float(t), float(t + d), g) for t, d, g, s in runs], columns=["service", "start_ms", "end_ms", "gpu_pct"]
    )
    pieces = figures.place(launches)
    whole = launches.iloc[pieces["row"]]
    assert overlaps(np.column_stack([whole["start_ms"], whole["end_ms"], pieces["low_pct"], pieces["high_pct"]]), 1e-5) == 0
    sums = (pieces["high_pct"] - pieces["low_pct"]).groupby(pieces["row"]).sum()
    assert np.allclose(sums.reindex(range(len(launches))), launches["gpu_pct"], atol=1e-4)


def test_a_launch_without_a_wide_enough_gap_is_cut_over_several():
    rows = [("a", 0.0, 9.0, 30.0), ("b", 0.0, 5.0, 40.0), ("c", 0.0, 9.0, 10.0), ("d", 5.0, 9.0, 55.0)]
    pieces = figures.place(pd.DataFrame(rows, columns=["service", "start_ms", "end_ms", "gpu_pct"]))
    spans = pieces[["row", "low_pct", "high_pct"]].to_numpy().tolist()
    assert spans == [[0, 0, 30], [1, 30, 70], [2, 70, 80], [3, 30, 70], [3, 80, 95]]


def test_a_service_keeps_its_place_where_it_can():
    rows = [("a", 0.0, 5.0, 30.0), ("b", 0.0, 5.0, 40.0), ("b", 5.0, 9.0, 40.0), ("a", 6.0, 9.0, 30.0)]
    pieces = figures.place(pd.DataFrame(rows, columns=["service", "start_ms", "end_ms", "gpu_pct"]))
    assert pieces["low_pct"].tolist() == [0, 30, 30, 0]


def test_late_launches_are_hatched_and_no_others(crowd):
    tight = crowd.services.assign(slo_ms=crowd.services["slo_ms"] / 4)
    run = dataclasses.replace(crowd, services=tight)
    took = run.requests["finish_ms"] - run.requests["arrival_ms"]
    slo = run.requests["service"].astype(object).map(tight.set_index("service")["slo_ms"]).astype(float)
    expected = set(run.requests["launch"][(took > slo) & (run.requests["launch"] >= 0)])
    assert 0 < len(expected) < len(run.launches)
    assert set(run.launches["launch"][(space.late_requests(run) > 0).to_numpy()]) == expected
    made = figures.timeline(run, 0, 2000)
    for bar in made.data:
        if bar.customdata is None:
            continue
        shapes = np.broadcast_to(np.asarray(bar.marker.pattern.shape or ""), len(bar.x))
        assert ((shapes == timelines.LATE) == (bar.customdata[:, 4] > 0)).all()
    assert made.data[-1].name == timelines.LATE_WORDS


@pytest.mark.parametrize("columns", [1, 37, 900])
def test_raster_holds_the_exact_area_of_every_service(trace, columns):
    edges, held = figures.raster(trace, 100.0, 731.7, columns)
    assert held.shape == (3, columns)
    for row, service in zip(held, trace.services["service"], strict=True):
        assert (row * np.diff(edges)).sum() == pytest.approx(area(trace, 100.0, 731.7, service))
    third = columns // 3
    first = trace.services["service"].iloc[0]
    assert held[0, third] == pytest.approx(area(trace, edges[third], edges[third + 1], first) / (edges[1] - edges[0]), abs=1e-6)


def test_many_launches_become_a_raster_of_fixed_width(trace):
    made = figures.timeline(trace, 0, 2000, exact=10)
    maps = [t for t in made.data if isinstance(t, go.Heatmap)]
    assert [m.z.shape for m in maps] == [(1, timelines.COLUMNS)] * 3
    total = sum(float(m.z.sum()) * m.dx for m in maps)
    assert total == pytest.approx(area(trace, 0, 2000), rel=1e-4)
    assert len(made.to_json()) < 30_000


def test_full_colour_is_the_most_that_a_service_holds_at_once(plan):
    """Two launches of one service side by side hold twice the share of either, and look it."""

    class Twice(lab.Policy):
        def decide(self, state):
            s = state["small"]
            return [lab.Launch("small", 30, 1)] * min(2 - s.in_flight, s.waiting) if s.ready else []

    run = lab.simulate(plan, Twice(), 2000, seed=1)
    made = figures.timeline(run, 0, 2000, exact=10)
    maps = [t for t in made.data if isinstance(t, go.Heatmap)]
    most = max(float(m.z.max()) for m in maps)
    assert 30 < most <= 60
    assert [float(m.zmax) for m in maps] == pytest.approx([most] * len(maps))
    assert f"full colour = {most:.3g} GPU%" in made.layout.title.subtitle.text


def test_the_window_is_in_the_title_and_must_lie_in_the_run(trace):
    assert "first 500 of" in figures.timeline(trace).layout.title.text
    assert "100 to 300 of" in figures.timeline(trace, 100, 300).layout.title.text
    for bad in ((-1, 10), (5000, None), (10, 10), (0, 9000), (float("nan"), 3)):
        with pytest.raises(ValueError, match="_ms = "):
            figures.timeline(trace, *bad)


def test_an_empty_run_says_so(trace):
    empty = dataclasses.replace(trace, launches=trace.launches.iloc[:0], requests=trace.requests.iloc[:0])
    assert "No launch" in figures.timeline(empty).layout.annotations[0].text
    assert "No request" in figures.latency(empty).layout.annotations[0].text
    assert MARK in figures.timeline(empty).layout.title.subtitle.text


# --- the other figures


def test_knee_marks_what_the_model_says(profile):
    made = figures.knee(profile, ["small", "large"], batch=4, rule="efficacy")
    for model in ("small", "large"):
        fitted = lab.fit(profile, model)
        pct = fitted.knee_pct(4, "efficacy")
        (mark,) = [t for t in made.data if t.name == f"{model}, knee"]
        assert (mark.x[0], mark.y[0]) == (pct, fitted.predict(4, pct))
        (dots,) = [t for t in made.data if t.name == f"{model}, profile"]
        rows = profile.of(model)
        assert list(dots.y) == list(rows.loc[rows["batch"] == 4, "service_ms"])
        assert any(f"{model}: " in a.text and f"{pct:.0f} %" in a.text for a in made.layout.annotations)


def test_knee_without_an_answer_is_words_and_no_mark(profile):
    made = figures.knee(profile, "large", 8, "capacity", slo_ms=1)
    assert not [t for t in made.data if t.name.endswith("knee")]
    assert "no share meets the SLO" in made.layout.annotations[0].text


def test_batches_beyond_the_slo_are_hollow(profile):
    made = figures.batches(profile, "middle", slo_ms=20, shares=[30])
    dots = [t for t in made.data if t.mode == "markers"]
    rows = profile.of("middle").query("gpu_pct == 30")
    assert list(dots[0].y) == list(rows["service_ms"])
    assert np.allclose(dots[1].y, 1000 * rows["batch"] / rows["service_ms"])
    assert [s.endswith("open") for s in dots[0].marker.symbol] == list(rows["service_ms"] > 20)


def test_comparison_stacks_to_the_goodput_of_all(table, trace):
    made = figures.comparison(table, trace.provenance)
    stacked = sum(np.asarray(t.x) for t in made.data if isinstance(t, go.Bar))
    assert np.allclose(stacked, table.loc[table["service"] == "all", "goodput_rps"])


def test_comparison_averages_runs_and_owns_up_to_missing_origin(table, trace):
    twice = pd.concat([table, table.assign(goodput_rps=0.0)])
    made = figures.comparison(twice)
    assert "origin not stated" in made.layout.title.subtitle.text
    assert "means of 2 runs" in made.layout.title.subtitle.text
    once = figures.comparison(table.assign(provenance=str(trace.provenance)))
    assert MARK in once.layout.title.subtitle.text
    assert made.data[0].x[0] == pytest.approx(once.data[0].x[0] / 2)


def test_latency_reaches_the_slo_attainment_at_the_slo(trace):
    made = figures.latency(trace)
    told = lab.summary(trace).set_index("service")["slo_attainment"]
    for service, slo in zip(trace.services["service"], trace.services["slo_ms"], strict=True):
        (mark,) = [t for t in made.data if t.name == f"{service}, SLO"]
        assert (mark.x[1], mark.y[1]) == (slo, pytest.approx(told[service]))
        (line,) = [t for t in made.data if t.name == service]
        assert len(line.x) <= 400
        assert (np.diff(line.y) > 0).all()


def test_latency_counts_requests_that_were_never_served(trace):
    lost = trace.requests.copy()
    lost.loc[lost.index[::2], "finish_ms"] = np.nan
    made = figures.latency(dataclasses.replace(trace, requests=lost))
    assert max(t.y[-1] for t in made.data if t.name in set(trace.services["service"])) == pytest.approx(0.5, abs=0.01)


def test_demand_bars_end_at_the_demand(plan):
    made = figures.plan(plan)
    (bars,) = [t for t in made.data if t.name == "Demand"]
    assert bars.base[-1] + bars.x[-1] == pytest.approx(plan.demand_pct)
    assert np.allclose(bars.base[1:], np.cumsum(bars.x)[:-1])


#: Figures and what they are drawn from -> the argument.
DRAWN_FROM = {
    figures.anatomy: "model",
    figures.comparison: "table",
    figures.gains: "table",
    figures.knee: "profile",
    figures.latency: "trace",
    figures.loads: "table",
    figures.period: "plan",
    figures.place: "launches",
    figures.placement: "placed",
    figures.plan: "plan",
    figures.progress: "so_far",
    figures.replay: "trace",
    figures.slots: "trials",
    figures.timeline: "trace",
}


@pytest.mark.parametrize("wrong", [None, 7])
@pytest.mark.parametrize(("draw", "field"), DRAWN_FROM.items(), ids=lambda x: getattr(x, "__name__", x))
def test_what_cannot_be_drawn_is_named(draw, field, wrong):
    said = None if wrong is None else "int"
    with pytest.raises(ValueError, match=f"^{field} = {said!r}: must be "):
        draw(wrong)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda p, t: figures.batches(None, "small"), "profile"),
        (lambda p, t: figures.choices(None, None), "profile"),
        (lambda p, t: figures.choices(p, None), "found"),
        (lambda p, t: figures.cues(None), "names"),
        (lambda p, t: figures.raster(None, 0, 1), "trace"),
        (lambda p, t: figures.waits(None, None), "simulated"),
        (lambda p, t: figures.waits(pd.DataFrame(columns=["kind", "utilization", "wait_ms"]), None), "formulas"),
        (lambda p, t: figures.knee(p, "nobody"), "model"),
        (lambda p, t: figures.knee(p, []), "models"),
        (lambda p, t: figures.knee(p, batch=0), "batch"),
        (lambda p, t: figures.knee(p, rule="guess"), "rule"),
        (lambda p, t: figures.batches(p, "nobody"), "model"),
        (lambda p, t: figures.batches(p, "small", slo_ms=-1), "slo_ms"),
        (lambda p, t: figures.batches(p, "small", shares=[0]), "shares"),
        (lambda p, t: figures.comparison(t.drop(columns="policy")), "table columns"),
        (lambda p, t: figures.comparison(t.iloc[:0]), "table rows"),
        (lambda p, t: figures.comparison(t, bound_rps=0), "bound_rps"),
        (lambda p, t: figures.knee(p, width=10), "width"),
    ],
)
def test_bad_input_is_named(profile, table, call, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        call(profile, table)


# --- all figures


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_units_origin_and_the_house_style(every, name):
    made = every[name]
    axes = [*made.select_xaxes(), *made.select_yaxes()]
    titles = [axis.title.text for axis in axes if axis.title.text]
    assert titles
    assert all(re.search(r"\[(ms|GPU%|requests|requests/s|fraction.*)\]", title) for title in titles)
    # an axis without a title lists names
    assert all(axis.title.text or axis.ticktext or axis.matches for axis in axes)
    assert style.plain(str(ORIGIN)) in made.layout.title.subtitle.text.replace("<br>", " ")
    assert made.layout.width == style.WIDTH == 800  # beside the side bar of a laptop
    assert made.layout.paper_bgcolor == made.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert not made.layout.template.layout.to_plotly_json()
    assert "sendChartToCloud" in made.layout.modebar.remove
    assert len(made.to_json()) < 60_000


def test_the_cloud_button_is_gone():
    assert "sendChartToCloud" in pio.renderers["plotly_mimetype"].config["modeBarButtonsToRemove"]


def test_thirty_five_services_look_different():
    cues = style.cues(map(str, range(35))).values()
    assert len({(c.color, c.dash) for c in cues}) == len({(c.color, c.symbol) for c in cues}) == 35
    assert len(set(style.COLORS)) == len(style.COLORS) == 7
    assert len(set(style.SYMBOLS)) == len(style.SYMBOLS) == len(style.GLYPHS) == len(style.MPL_MARKERS)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.1, 9))
def test_labels_are_moved_apart_and_stay_in_order(places, gap):
    moved = style.spread(places, gap)
    order = np.argsort(places, kind="stable")
    assert (np.diff(np.array(moved)[order]) >= gap - 1e-6).all()
    assert np.mean(moved) == pytest.approx(np.mean(places), abs=1e-6)


def test_labels_with_room_stay_where_they_are():
    assert style.spread([5.0, 1.0, 9.0], 2.0) == [5.0, 1.0, 9.0]


def test_the_package_alone_imports_no_plotly():
    code = "import sys, dstack_lab; assert not {'plotly', 'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
