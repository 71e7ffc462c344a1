"""What planning with contention brings; predicted contention beside published V100 measurements.

Three tables: D-STACK told of contention, not told, and learning it, beside others, all of which drop what is
lost; then 750 pairs on disjoint shares, and four networks without a partition.

Where the law of turns breaks: "batches learnt". It lets all that share the GPU end together, so that the lightest
network, alexnet, takes 26.5 ms with one image beside the others, which is all of its SLO of 25: its batch cannot
grow. The log says 13.5 ms for that, and 1 ms more for every further image: room for 12 more, and that log's mean
batch is 13. The rule that learns is the log's own; the error is the law's, in who waits how long and not in the sum.

    python benchmarks/contention.py [FOLDER]

Without FOLDER, the first table only. FOLDER holds ``v100_igniter_pairs.csv`` (both sides of pairs, and their solo times) and
``v100_gslice_authors.csv`` (times of four TensorRT networks by batch and share). Both come from public
repositories and are not part of this one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import dstack_lab as lab
from dstack_lab.bounds import service_tables
from dstack_lab.contention import Load
from dstack_lab.services import ServiceTable

#: The authors' logs of four networks, about 1,600 images/s offered to each: SLO [ms]; images/s, batch under default MPS;
#: images/s under GSLICE, and its slices [GPU%].
LOGS = {
    "alexnet": (25, 520, 13, 1394, 40),
    "mobilenet": (25, 110, 3, 460, 10),
    "resnet50": (25, 25, 1, 256, 25),
    "vgg19": (26, 36, 1, 13, 25),
}
#: The same under default MPS with one image a batch.
SINGLE_RPS = {"alexnet": 74, "mobilenet": 45, "resnet50": 25, "vgg19": 37}
OFFERED_RPS, DURATION_MS = 1600, 10_000

#: Of the first table: profiles and workloads, parts of the bound, seeds.
RACES = {"v100-simulated": ("C-3", "C-4", "C-7"), "h200-simulated": ("C-4", "C-7")}
LOADS, SEEDS = (0.5, 0.65, 0.8, 1.5), (1, 2, 3)
#: About this many requests a run at load 1, and its shortest length [ms]: to learn takes a third of a second.
REQUESTS, SHORTEST_MS = 20_000, 2_000


def planners(profile: str, workload: str) -> pd.DataFrame:
    """Goodput [requests/s], part in time of all requests and of the worst service's, by load and policy, with contention."""
    times = lab.load_profile(profile)
    shares = lab.gpu_specs.SPECS[profile.removesuffix("-simulated")].shares()
    services = lab.workload(workload, times, load=1, shares=shares)
    same = {"loads": LOADS, "seeds": SEEDS, "contention": lab.Contention(), "admission": "one rule", "shares": shares}
    same["duration_ms"] = max(SHORTEST_MS, 1000 * REQUESTS / sum(s.rate_rps for s in services))
    others = {"D-STACK learns": lab.AdaptiveDStack(), "Temporal": lab.Temporal(), "Gslice": lab.Gslice(), "Gpulet": lab.Gpulet()}
    told = lab.compare(services, times, {"D-STACK told": lab.DStack()}, **same)
    rest = lab.compare(services, times, {"D-STACK not told": lab.DStack(), **others}, told=False, **same)
    rows = pd.concat([told, rest])
    whole = rows[rows["service"] == "all"].set_index(["load", "policy"])[["goodput_rps", "slo_attainment"]]
    worst = rows[rows["service"] != "all"].groupby(["load", "policy"], sort=False)["slo_attainment"].min()
    return whole.assign(worst=worst).rename(columns={"goodput_rps": "goodput", "slo_attainment": "in time"})


def pair_errors(path: Path, contention: lab.Contention) -> np.ndarray:
    """Absolute error of the predicted slowdown, both sides of each pair."""
    flat = ServiceTable(np.ones((1, 100)))
    errors = []
    for row in pd.read_csv(path).itertuples():
        alone = np.array([row.solo_latency1_ms, row.solo_latency2_ms])
        shares = (row.gpu_pct1, row.gpu_pct2)
        loads = [Load(flat, 1, share, ms, share) for ms, share in zip(alone, shares, strict=True)]
        errors.extend(np.abs(np.array([row.latency1_ms, row.latency2_ms]) / alone - contention.stretch(loads)))
    return np.array(errors)


def four_networks(path: Path) -> lab.Plan:
    """Plan of the four networks with the batches of the log, from a profile fitted to the authors' solo times."""
    rows = pd.read_csv(path)
    rows = rows[
        rows["set"].isin(["mobilenet", "optim_nov26_netml"]) & rows["model"].str.endswith("_trt") & (rows["gpu_pct"] >= 10)
    ]
    table = rows.rename(columns={"median_latency_ms": "service_ms"})[["model", "batch", "gpu_pct", "service_ms"]]
    table["model"] = table["model"].str.removesuffix("_trt")
    origin = lab.Provenance("measured", "V100", "mps")
    services = tuple(lab.Service(name, slo, lab.Poisson(OFFERED_RPS)) for name, (slo, *_) in LOGS.items())
    tables = service_tables(services, lab.Profile(table, origin))
    points = tuple(
        lab.Allocation(name, float(share), batch, times.at(batch, share), OFFERED_RPS)
        for (name, (_, _, batch, _, share)), times in zip(LOGS.items(), tables, strict=True)
    )
    return lab.Plan(services, points, tables, tuple(float(s) for s in range(5, 101, 5)), "as logged", origin)


def single(plan: lab.Plan) -> lab.Plan:
    """The same plan, one image a batch."""
    ones = zip(plan.allocations, plan.tables, strict=True)
    return replace(plan, allocations=tuple(replace(a, batch=1, service_ms=t.at(1, a.gpu_pct)) for a, t in ones))


def rates(plan: lab.Plan, policy: lab.Policy, contention: lab.Contention) -> list[float]:
    """Images per second that finish while requests arrive, by network, and of all."""
    trace = lab.simulate(plan, policy, DURATION_MS, seed=1, contention=contention)
    done = trace.requests[trace.requests["finish_ms"] <= DURATION_MS]
    counts = done["service"].value_counts()
    found = [counts.get(name, 0) * 1000 / DURATION_MS for name in LOGS]
    return [*found, sum(found)]


def _short(value: float) -> str:
    return f"{value:.3f}" if value <= 1 else f"{value:.0f}"


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    for profile, workloads in RACES.items():
        for workload in workloads:
            table = planners(profile, workload).unstack("load").swaplevel(axis=1).sort_index(axis=1, sort_remaining=False)
            print(
                f"{workload} on {profile}, simulated with contention, by load", table.round(3).to_string(), sep="\n", end="\n\n"
            )
    if folder is None:
        return
    print("error of the predicted slowdown, 750 pairs [points]: median, 95 % quantile")
    for name, contention in (("longer is felt more", lab.Contention()), ("a constant", lab.Contention(exponent=0))):
        errors = 100 * pair_errors(folder / "v100_igniter_pairs.csv", contention)
        print(f"  {name:24}{np.median(errors):6.1f}{np.quantile(errors, 0.95):6.1f}")
    plan = four_networks(folder / "v100_gslice_authors.csv")
    slices = {name: float(share) for name, (*_, share) in LOGS.items()}
    measured = {
        "MPS, one image": list(SINGLE_RPS.values()),
        "MPS": [x for _, x, *_ in LOGS.values()],
        "GSLICE": [x for _, _, _, x, _ in LOGS.values()],
    }
    mps, plain = lab.Uncontrolled("plan"), lab.Contention()
    runs = {
        "default MPS, batches of the log": ("MPS", plan, mps, plain),
        "  the same, proportional shares": ("MPS", plan, mps, lab.Contention(sharing="proportional")),
        "default MPS, one image a batch": ("MPS, one image", single(plan), mps, plain),
        "default MPS, batches learnt": ("MPS", plan, lab.Uncontrolled("adaptive"), plain),
        "GSLICE, its slices": ("GSLICE", plan, lab.Gslice(slices, resize=False), plain),
    }
    print(f"\nimages/s{'':26}" + "".join(f"{name:>11}" for name in (*LOGS, "all")) + "   all to measured")
    for name, (log, asked, policy, contention) in runs.items():
        seen = [*measured[log], sum(measured[log])]
        found = rates(asked, policy, contention)
        print(f"{name:34}" + "".join(f"{x:11.0f}" for x in found) + f"{found[-1] / seen[-1] - 1:+14.0%}")
        print(f"{'  measured':34}" + "".join(f"{x:11.0f}" for x in seen))


if __name__ == "__main__":
    main()
