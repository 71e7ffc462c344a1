"""Pictures on paper: what is on the page is the plotly figure, mark by mark and word by word, the same bytes every time."""

import html
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

import dstack_lab as lab
from dstack_lab import figures, gallery
from dstack_lab.figures import page, style, timelines
from dstack_lab.panels.live_figure import live

COMMITTED = Path(__file__).parents[1] / "figures"
ODD = "half < whole & $co$"


@pytest.fixture(scope="module")
def profile():
    return lab.load_profile("v100-simulated")


@pytest.fixture(scope="module")
def rigid(profile):
    """A run with late launches."""
    plan = lab.optimize(lab.workload("C-3", profile, load=0.6), profile)
    return lab.simulate(plan, lab.DStack(opportunistic=False), 1_000, seed=1)


@pytest.fixture(scope="module")
def every(profile, rigid):
    """A figure of each kind, some with words that matplotlib or plotly would read as markup."""
    services = [lab.Service("resnet50", 50, lab.Poisson(300), ODD), lab.Service("vgg19", 100, lab.Poisson(60))]
    plan = lab.optimize(services, profile)
    trace = lab.simulate(plan, lab.Temporal(), 1_000, seed=1)
    table = lab.compare(services, profile, [lab.Temporal(), lab.DStack()], (0.5, 0.8), seeds=(1, 2), duration_ms=500)
    waits = pd.DataFrame({"kind": "k", "utilization": [0.2, 0.5], "wait_ms": [1.0, 30.0]})
    whole = pd.concat([lab.summary(t).assign(policy=p) for p, t in (("a", trace), ("b", trace))])
    return {
        "knee": figures.knee(profile, ["resnet50", "vgg19"], at_pct=30),
        "batches": figures.batches(profile, "resnet50", slo_ms=50),
        "choices": figures.choices(profile, figures.choose(profile, services[0], "efficacy", 40)),
        "anatomy": gallery.anatomy(profile),
        "plan": figures.plan(plan),
        "period": figures.period(lab.plan_period(plan), profile.provenance),
        "timeline": figures.timeline(rigid, end_ms=200),
        "raster": figures.timeline(rigid, exact=10),
        "latency": figures.latency(trace),
        "waits": figures.waits(waits, waits, "made up"),
        "comparison": figures.comparison(whole, trace.provenance, bound_rps=400),
        "loads": figures.loads(table),
        "gains": figures.gains(table[table["load"] == 0.8]),
        "placement": figures.placement(lab.place(services, lab.Cluster(gpus=2, profile=profile))),
        "progress": figures.progress(figures.replay(trace)),
        "nothing": style.nothing("Nothing", "made up", "because " * 40),
    }


NAMES = (
    *("knee", "batches", "choices", "anatomy", "plan", "period", "timeline", "raster", "latency", "waits"),
    *("comparison", "loads", "gains", "placement", "progress", "nothing"),
)


def drawn(figure):
    """Sheet of a figure."""
    sheet = page.Sheet(Figure(figsize=(figure.layout.width * style.INCH, figure.layout.height * style.INCH)), figure)
    sheet.draw()
    return sheet


def plain(text):
    """Words of plotly's HTML, without spaces: lines may break elsewhere."""
    return re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]+>", "", text)))


@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_the_figure_is_on_paper(every, name, tmp_path):
    figure = every[name]
    path = figures.save(figure, tmp_path / "a.svg")
    texts = re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(encoding="utf-8"), re.DOTALL)
    on_paper = "".join(plain(text) for text in texts)
    layout = figure.layout
    words = [layout.title.text, layout.title.subtitle.text, *(note.text for note in layout.annotations)]
    for axis in [*figure.select_xaxes(), *figure.select_yaxes()]:
        if axis.visible is not False:
            words += [axis.title.text or "", *([] if axis.showticklabels is False else axis.ticktext or ())]
    words += [t.name for t in figure.data if layout.showlegend and t.showlegend is not False]
    glyphs = re.compile(f"^[{style.GLYPHS}]")
    missing = [word for word in words if glyphs.sub("", plain(word)) not in on_paper]
    assert len(words) > 2
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_marks_are_where_plotly_has_them(every, name):
    sheet = drawn(every[name])
    for trace in every[name].data:
        if trace.type != "scatter" or (trace.mode or "lines") == "text":
            continue
        x, y = np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)
        lines = sheet.axes[trace.xaxis or "x", trace.yaxis or "y"].lines
        points = [set(zip(*line.get_data(), strict=True)) for line in lines]
        wanted = {(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(a + b)}
        best = max((len(p & wanted) for p in points), default=0)
        shown = len(set().union(*points) & wanted) if "markers" in (trace.mode or "") else best
        assert shown == len(wanted)


@pytest.mark.parametrize("name", ["timeline", "period", "placement", "plan", "comparison", "anatomy"])
def test_bars_cover_what_they_cover_in_plotly(every, name):
    figure = every[name]
    sheet = drawn(figure)
    boxes = [
        (*path.vertices.min(axis=0), *path.vertices.max(axis=0))
        for axes in sheet.axes.values()
        for group in axes.collections
        for path in group.get_paths()
        if len(path.vertices) == 5  # corners of a bar, not an error bar
    ]
    area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    expected = 0.0
    for bar in (t for t in figure.data if t.type == "bar" and t.x[0] is not None):
        length = np.asarray(bar.x if bar.orientation == "h" else bar.y, dtype=float)
        expected += float(np.nansum(length * (np.asarray(bar.width, dtype=float) if bar.width is not None else 0.9)))
    assert area == pytest.approx(expected)


def test_bars_that_are_stacked_stand_on_each_other(every):
    figure = every["comparison"]
    boxes = [p.vertices for g in drawn(figure).axes["x", "y"].collections for p in g.get_paths()]
    sums = sum(np.asarray(t.x, dtype=float) for t in figure.data if t.type == "bar")
    for row, total in enumerate(sums):
        mine = [b for b in boxes if b[:, 1].min() < row < b[:, 1].max()]
        assert max(b[:, 0].max() for b in mine) == pytest.approx(total)


def test_late_launches_have_a_red_edge_and_a_hatch_and_so_has_the_legend(every):
    """The live figure's two cues, on paper too: neither colour alone nor hatch alone."""
    figure = every["timeline"]
    sheet = drawn(figure)
    red = to_hex(style.LATE)
    late = [g for g in sheet.axes["x", "y"].collections if to_hex(g.get_edgecolor()[0]) == red]
    assert late
    assert {g.get_hatch() for g in late} == {"xxx"}
    others = [g for g in sheet.axes["x", "y"].collections if g not in late]
    assert {g.get_hatch() for g in others} == {None}
    number = sum(int((bar.customdata[:, 4] > 0).sum()) for bar in figure.data if bar.customdata is not None)
    assert sum(len(g.get_paths()) for g in late) == number > 0
    legend = sheet.page.legends[0]
    told = {text.get_text(): sign for text, sign in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    sign = told[timelines.LATE_WORDS]
    assert (to_hex(sign.get_edgecolor()), sign.get_hatch()) == (red, "xxx")


def test_late_slices_of_a_raster_have_a_red_mark(every):
    marks = [line for line in drawn(every["raster"]).axes["x", "y"].lines if line.get_marker() == "v"]
    assert marks
    assert {to_hex(line.get_markerfacecolor()) for line in marks} == {to_hex(style.LATE)}


def test_a_map_is_as_opaque_as_its_value(every):
    figure = every["raster"]
    images = drawn(figure).axes["x", "y"].images
    maps = [t for t in figure.data if t.type == "heatmap"]
    assert len(images) == len(maps) == 3
    for image, trace in zip(images, maps, strict=True):
        part = np.asarray(trace.z, dtype=float) / trace.zmax
        alpha = np.interp(part, [s for s, _ in trace.colorscale], np.round(np.sqrt([s for s, _ in trace.colorscale]), 3))
        assert np.asarray(image.get_array())[..., 3] == pytest.approx(alpha, abs=1e-6)
        assert image.get_extent()[:2] == pytest.approx((0, 500))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", ["timeline", "raster", "knee", "comparison", "choices"])
def test_files_are_the_same_bytes_twice(every, name, suffix, tmp_path):
    first, second = (figures.save(every[name], tmp_path / f"{n}{suffix}") for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {f"a{suffix}", f"b{suffix}"}


def test_a_live_figure_looks_like_the_still_one(every, tmp_path):
    still, moving = tmp_path / "still.png", tmp_path / "live.png"
    figures.save(every["timeline"], still)
    figures.save(live(every["timeline"]), moving)
    assert still.read_bytes() == moving.read_bytes()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f, p: figures.save(f, p / "a.pdf"), r"path = .*\.png or \.svg"),
        (lambda f, p: figures.save("knee", p / "a.png"), "figure = 'str'"),
        (lambda f, p: figures.save(go.Figure(), p / "a.png"), "figure = 'without width"),
        (lambda f, p: figures.save(go.Figure(f).add_trace(go.Pie()), p / "a.png"), "trace = 'pie'"),
        (lambda f, p: figures.save(go.Figure(f).update_traces(marker_symbol="hexagon"), p / "a.png"), "symbol = 'hexagon'"),
        (lambda f, p: figures.save(go.Figure(f).update_shapes(line_dash="longdashdot"), p / "a.svg"), "dash = 'longdashdot'"),
        (lambda f, p: figures.save(go.Figure(f).add_vline(1, xref="x7"), p / "a.png"), "reference of a note"),
    ],
)
def test_what_cannot_be_drawn_is_named_and_leaves_no_file(every, make, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make(every["gains"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_words_that_fit_lie_or_stand():
    size = style.BAR_SIZES[0]
    assert style.fitting("abc", 200, 50) == (size, 0)
    assert style.fitting("abc", 20, 50) == (size, 90)
    assert style.fitting("abc", 11.5, 50) == (style.BAR_SIZES[1], 90)
    assert style.fitting("abc", 5, 50) is None
    assert style.fitting("a long name", 20, 30) is None


def test_names_of_windows_grow_shorter_where_they_must(profile):
    plan = lab.plan_period(lab.optimize(lab.workload("C-3", profile, load=0.6), profile))
    bars = {t.name: set(t.text) for t in figures.period(plan).data}
    assert all(", batch " in text for text in bars["vgg19"])
    narrow = {t.name: set(t.text) for t in figures.period(plan, width=420).data}
    assert narrow["mobilenet_v2"] == {"mobilenet_v2"}


def test_the_eighth_service_has_a_hatch_of_its_own():
    looks = [(cue.color, cue.hatch) for cue in style.cues(map(str, range(35))).values()]
    assert len(set(looks)) == 35
    assert {hatch for _, hatch in looks[:7]} == {""}
    assert timelines.LATE not in {hatch for _, hatch in looks}


# --- a run in slices


@pytest.mark.parametrize("slices", [1, 7, 20])
def test_a_replay_holds_all_requests_and_all_gpu_time(rigid, slices):
    seen = figures.replay(rigid, slices)
    total = lab.summary(rigid).set_index("service")
    step_s = seen.length_s / slices
    for i, name in enumerate(seen.services):
        mine = rigid.launches[rigid.launches["service"] == name]
        good = total.loc[name, "goodput_rps"] * rigid.duration_ms / 1000
        assert seen.values["in_time_rps"][i].sum() * step_s == pytest.approx(good)
        area = float(((mine["end_ms"] - mine["start_ms"]) * mine["gpu_pct"]).sum())
        assert seen.values["held_pct"][i].sum() * step_s * 1000 == pytest.approx(area)
    took = (rigid.requests["finish_ms"] - rigid.requests["arrival_ms"])[rigid.requests["service"] == seen.services[0]]
    if slices == 1:
        assert seen.values["latency_ms"][0, 0] == pytest.approx(took.median())
    assert set(seen.values) == set(figures.PANES)


def test_a_replay_of_nothing_is_empty(rigid):
    empty = replace(rigid, launches=rigid.launches.iloc[:0], requests=rigid.requests.iloc[:0])
    assert np.isnan(figures.replay(empty).values["latency_ms"]).all()
    with pytest.raises(ValueError, match="slices = 0"):
        figures.replay(rigid, 0)


# --- the gallery


def test_every_panel_has_a_picture():
    shown = " ".join(picture.where for picture in gallery.PICTURES)
    assert [name for name in lab.panels.__all__ if name not in shown] == []
    assert set(re.findall(r"\d\d", shown)) >= {f"{n:02}" for n in range(8)} | {"09", "10"}


@pytest.mark.slow
def test_make_figures_draws_what_is_in_git(tmp_path):
    """Letters may be a shade off with another FreeType; another schedule is not."""
    subprocess.run([sys.executable, "-m", "dstack_lab", "figures", "--out", str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {path.name for path in COMMITTED.iterdir()}
    hint = "the pictures are not those of this code: run make figures"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (COMMITTED / "README.md").read_text(encoding="utf-8"), hint
    for name in sorted(names - {"README.md"}):
        fresh, kept = imread(tmp_path / name), imread(COMMITTED / name)
        assert fresh.shape == kept.shape, f"{name}: {hint}"
        assert float((np.abs(fresh - kept).max(axis=-1) > 0.25).mean()) < 0.002, f"{name}: {hint}"
        assert (COMMITTED / name).stat().st_size < 120_000
