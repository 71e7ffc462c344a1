"""The course's figures as files: one for each question, drawn from the simulated profile, the same bytes on every run."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

import dstack_lab as lab
from dstack_lab import figures, gpu_specs, kernels, zoo
from dstack_lab.files import whole_file
from dstack_lab.kernel_model import KernelModel
from dstack_lab.profiles import DEFAULT_PROFILE

HEAD = """\
# Figures

`make figures` draws these pictures and this page, byte for byte the same on every run; a test compares. `make demo` adds
`demo-*.png` of your machine, which are not in git; `lab.figures.save(figure, "name.png")` writes any figure of yours, also as
SVG. Every figure says where its numbers come from: measured or simulated, on what, when. All of these are simulated.
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of the course.

    Parameters
    ----------
    name : str
        Of the file, without ``.png``.
    where : str
        Notebook and panel that show it live.
    caption : str
        What to see in it.
    draw : callable
        Returns the figure.
    """

    name: str
    where: str
    caption: str
    draw: Callable[[lab.Profile], go.Figure]


def knee(profile: lab.Profile) -> go.Figure:
    """Three networks of different size."""
    return figures.knee(profile, ["resnet50", "vgg19", "mobilenet_v2"])


def anatomy(profile: lab.Profile) -> go.Figure:
    """Kernels of a network at half of a V100-like GPU."""
    network = zoo.load("resnet50", device="meta")
    return figures.anatomy(KernelModel(kernels.of_module(network.module, network.example, network.name), gpu_specs.V100), 1, 50)


def batches(profile: lab.Profile) -> go.Figure:
    """One network at four shares."""
    return figures.batches(profile, "resnet50", slo_ms=50)


def choices(profile: lab.Profile) -> go.Figure:
    """Points of one service, and those at 40 GPU%."""
    service = lab.Service("resnet50", slo_ms=50, arrivals=lab.Poisson(rate_rps=400))
    return figures.choices(profile, figures.choose(profile, service, "efficacy", 40))


def waits(profile: lab.Profile) -> go.Figure:
    """One network in turns, its times equal or scattered, beside Pollaczek and Khinchine's formula."""
    ms = float(lab.fit(profile, "vgg19").predict(1, 100))
    kinds = {"equal times": None, "scattered by half": lab.Lognormal(0.5)}
    runs, formulas = [], []
    for kind, scatter in kinds.items():
        cv = scatter.cv if scatter else 0.0
        for rho in np.arange(0.1, 0.96, 0.05):
            formulas.append({"kind": kind, "utilization": rho, "wait_ms": rho * ms * (1 + cv**2) / (2 * (1 - rho))})
        for rho in (0.2, 0.4, 0.6, 0.8, 0.9):
            plan = lab.optimize([lab.Service("vgg19", 20, lab.Poisson(1000 * rho / ms))], profile)
            trace = lab.simulate(plan, lab.Temporal(), 200_000, seed=1, variability=scatter)
            wait = float((trace.requests["start_ms"] - trace.requests["arrival_ms"]).mean())
            runs.append({"kind": kind, "utilization": rho, "wait_ms": wait})
    return figures.waits(pd.DataFrame(runs), pd.DataFrame(formulas), trace.provenance)


def golden_run(profile: lab.Profile) -> lab.Trace:
    """The golden path: two networks, planned and served."""
    services = [
        lab.Service("resnet50", slo_ms=50, arrivals=lab.Poisson(rate_rps=400)),
        lab.Service("vgg19", slo_ms=100, arrivals=lab.Poisson(rate_rps=120)),
    ]
    return lab.simulate(lab.optimize(services, profile), lab.DStack(), 10_000, seed=1)


def golden(profile: lab.Profile) -> go.Figure:
    """Its first 200 ms."""
    return figures.timeline(golden_run(profile), window_ms=200)


def trio(profile: lab.Profile) -> lab.Plan:
    """Plan of the three services of notebook 06."""
    return lab.optimize(lab.workload("C-3", profile, load=0.6), profile)


def period(profile: lab.Profile) -> go.Figure:
    """Its period plan."""
    return figures.period(lab.plan_period(trio(profile)), profile.provenance)


def late(profile: lab.Profile) -> go.Figure:
    """The same plan with nothing beside it."""
    return figures.timeline(lab.simulate(trio(profile), lab.DStack(opportunistic=False), 10_000, seed=1), end_ms=200)


def slots(profile: lab.Profile) -> go.Figure:
    """Trials of seven services in few and many slots."""
    seven = lab.optimize(lab.workload("C-7", profile, load=0.6), profile)
    return figures.slots(lab.try_slots(seven, drop=False), profile.provenance, lab.cut_slots(seven, drop=False).count)


def ablation(profile: lab.Profile) -> go.Figure:
    """What each ingredient is worth."""
    services = lab.workload("C-3", profile, load=0.6)
    return figures.gains(lab.ablate(services, profile, loads=[1.1], seeds=range(4), duration_ms=4_000))


def loads(profile: lab.Profile) -> go.Figure:
    """Five schedulers over six loads."""
    racers = [lab.Temporal(), lab.Clipper(), lab.Gpulet(), lab.MaxThroughput(), lab.DStack()]
    services = lab.workload("C-4", profile, load=1)
    same = {"seeds": range(3), "duration_ms": 2_000, "admission": "one rule"}
    return figures.loads(lab.compare(services, profile, racers, (0.3, 0.5, 0.65, 0.8, 1.0, 1.2), **same))


def race(profile: lab.Profile) -> go.Figure:
    """Schedulers side by side under one load, service by service."""
    services = lab.workload("C-4", profile, load=0.65)
    plan = lab.optimize(services, profile)
    table = []
    for policy in (lab.Temporal(drop_late=True), lab.Gslice(), lab.Gpulet(), lab.DStack(reject=True)):
        trace = lab.simulate(plan, policy, 4_000, seed=1)
        table.append(lab.summary(trace).assign(policy=policy.name))
    origin = f"{profile.provenance}; seed 1, 4000 ms"
    return figures.comparison(pd.concat(table), origin, lab.bound(services, profile).total_rps)


def placement(profile: lab.Profile) -> go.Figure:
    """Seven services on three GPUs."""
    return figures.placement(lab.place(lab.workload("C-7", profile, load=1.6), lab.Cluster(gpus=3, profile=profile)))


def live(profile: lab.Profile) -> go.Figure:
    """The golden path's run as `LiveRun` shows one while it runs."""
    return figures.progress(figures.replay(golden_run(profile)))


#: In the order of the course.
PICTURES = (
    Picture(
        "timeline-readme",
        "00 and 05; `ScheduleExplorer`",
        "Each launch is a rectangle: as wide as its service time, as high as its share. Launches lie beside each other, "
        "and what is empty was free.",
        golden,
    ),
    Picture(
        "knee-readme",
        "01; `KneeExplorer`",
        "Beyond its knee (the hollow mark, with its interval) a network gains almost nothing from more of the GPU.",
        knee,
    ),
    Picture(
        "anatomy",
        "02; `ModelAnatomy`",
        "Above, the time of every kernel and what bounds it; below, the share beyond which that kernel is hardly "
        "faster. Many have enough long before the whole network has.",
        anatomy,
    ),
    Picture(
        "batches",
        "03",
        "A larger batch takes longer and serves more: left the cost, right what it buys. Hollow points are beyond the SLO.",
        batches,
    ),
    Picture(
        "choices",
        "03; `BatchPlanner`",
        "Every batch and share of one service: what is allowed (the darker the better), and what forbids the rest. "
        "Right, one share alone.",
        choices,
    ),
    Picture(
        "waits",
        "04",
        "Mean wait before service, simulated (marks) and by the formula of Pollaczek and Khinchine (lines): it grows "
        "without end as utilization nears 1, and faster if service times scatter.",
        waits,
    ),
    Picture(
        "period",
        "06",
        "A plan of windows, after the paper: one is reserved for each launch so often that no request misses its SLO.",
        period,
    ),
    Picture(
        "late",
        "06; `ScheduleExplorer`",
        "The same plan served rigidly, without opportunistic launches: requests wait for their windows beside GPU% that is free. "
        "Hatched with a red edge: launches that hold late requests.",
        late,
    ),
    Picture(
        "slots",
        "06",
        "Seven networks on one GPU that is cut into few slots or many, each of them open to all. In few, requests queue behind "
        "each other; in many, each launch takes long.",
        slots,
    ),
    Picture(
        "ablation",
        "06, as a table; such figures in 07",
        "What leaving out one ingredient of D-STACK changes, with 95 % intervals; a hollow dot is a difference that "
        "these seeds do not show.",
        ablation,
    ),
    Picture(
        "loads",
        "07",
        "Goodput as a part of the provable bound (dashed), over the load, with 95 % intervals: schedulers part ways "
        "where the GPU fills.",
        loads,
    ),
    Picture(
        "race",
        "07; `PolicyRace`",
        "One load, service by service: who is served, how many of them in time, and how late the last percent is.",
        race,
    ),
    Picture(
        "live",
        "09; `LiveRun`",
        "What a live run shows while it runs, service by service; here a simulated one.",
        live,
    ),
    Picture(
        "placement",
        "10",
        "Which service is on which GPU, and how much of it the requests need on average. An asterisk: on several GPUs.",
        placement,
    ),
)


def draw(out: Path) -> Iterator[Path]:
    """Write every picture, then the page that lists them; yield each path as it is written."""
    profile = lab.load_profile(DEFAULT_PROFILE)
    page = [HEAD]
    for one in PICTURES:
        figure = one.draw(profile)
        title = figure.layout.title
        head, origin = (html.unescape(text.replace("<br>", " ")) for text in (title.text, title.subtitle.text))
        page.append(f"## {one.name}\n\n![{head}]({one.name}.png)\n\n{one.caption} Notebook {one.where}.\n\n*{origin}*\n")
        yield figures.save(figure, out / f"{one.name}.png")
    path = out / "README.md"
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    yield path
