"""The headline figures: how much of the provable bound each policy serves, on every workload and two GPUs.

For each profile and workload, and each policy of `dstack_lab.policies`: the highest load, as a part of the
batch-level bound, at which every service keeps 99 % of its requests within SLO; the SLO attainment at
loads 0.65 and 0.8 and goodput and utilization at 0.95, as parts of the ideal's. Rates are inverse to area, so that each
service asks for the same GPU time; arrivals are Poisson. Every policy may use all shares that the GPU grants.

    python benchmarks/headline.py [--quick] [--out headline.csv] [--folder cache] [--admission "one rule"] [--policies NAME ...]

``--policies DStack Gpulet`` races only these.
``--quick`` does two workloads with short runs and a coarser search, in about two minutes on two cores.
With ``--folder`` an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path

import pandas as pd

import dstack_lab as lab
from dstack_lab.files import whole_file

PROFILES = ("v100-simulated", "h200-simulated")
WORKLOADS = {False: ("C-2", "C-3", "C-4", "C-7"), True: ("C-2", "C-4")}
SEEDS = {False: (0, 1, 2), True: (0, 1)}
#: Shortest and longest run [ms], and about how many requests at load 1: a faster GPU needs less time for as many.
RUNS = {False: (2_000.0, 10_000.0, 60_000), True: (1_000.0, 4_000.0, 10_000)}
SEARCH = {False: {"step": 0.1, "tolerance": 0.0025}, True: {"step": 0.2, "tolerance": 0.03}}
LOADS = (0.65, 0.8, 0.95)


def all_policies() -> dict[str, lab.Policy]:
    """Every policy class of the package, with its default parameters."""
    found = [kind for kind in vars(lab.policies).values() if inspect.isclass(kind) and issubclass(kind, lab.Policy)]
    return {kind.__name__: kind() for kind in found if kind is not lab.Policy}


def setting(profile: str, workload: str, quick: bool) -> tuple[lab.Profile, tuple[lab.Service, ...], tuple[float, ...], float]:
    """Profile, services at load 1, the shares that the GPU grants, and the length of a run [ms]."""
    table = lab.load_profile(profile)
    shares = lab.gpu_specs.SPECS[profile.removesuffix("-simulated")].shares()
    services = lab.workload(workload, table, load=1, shares=shares)
    least, most, requests = RUNS[quick]
    return table, services, shares, min(most, max(least, 1000 * requests / sum(s.rate_rps for s in services)))


def figures(profile: str, workload: str, policy: lab.Policy, quick: bool, admission: str) -> dict[str, object]:
    """One row of the table; a policy that breaks a rule says so instead of ending the benchmark."""
    table, services, shares, duration_ms = setting(profile, workload, quick)
    same = {"seeds": SEEDS[quick], "duration_ms": duration_ms, "admission": admission, "shares": shares}
    try:
        highest = lab.max_load(policy, services, table, **same, **SEARCH[quick])
        runs = lab.compare(services, table, [policy], LOADS, baseline=policy.name, **same)
    except lab.PolicyError as error:
        return {"max_load": float("nan"), "said": str(error)}
    row = dict(highest.to_frame().iloc[0][["max_load", "fails_at", "sustained", "total_rps"]])
    for load in LOADS:
        mine = runs[runs["load"] == load].set_index("service")
        row |= {f"{name}_{load:g}": mine.loc["all", name] for name in ("slo_attainment", "goodput_rps", "utilization")}
        row[f"worst_attainment_{load:g}"] = mine["slo_attainment"].drop("all").min()
    return {**row, "said": highest.to_frame()["fails_because"].iloc[0]}


def against_others(table: pd.DataFrame) -> pd.DataFrame:
    """D-STACK beside Temporal, the best other (the ideal left out, which nothing can run) and the ideal, per workload."""
    rows = []
    for (profile, workload), part in table.groupby(["profile", "workload"], sort=False):
        loads = part.set_index("policy")
        others = loads["max_load"].drop(["DStack", "AdaptiveDStack", "Ideal"], errors="ignore").dropna()
        mine = loads.loc["DStack"]
        row = {"profile": profile, "workload": workload, "DStack": mine["max_load"], "Temporal": others["Temporal"]}
        row |= {"best other": others.idxmax(), "its load": others.max(), "ratio": mine["max_load"] / others.max()}
        row |= {
            "attained at 0.65": mine["slo_attainment_0.65"],
            "attained at 0.8": mine["slo_attainment_0.8"],
            "worst at 0.8": mine["worst_attainment_0.8"],
        }
        if "Ideal" in loads.index:
            ideal = loads.loc["Ideal"]
            row["goodput/ideal at 0.95"] = mine["goodput_rps_0.95"] / ideal["goodput_rps_0.95"]
            row["utilization/ideal at 0.95"] = mine["utilization_0.95"] / ideal["utilization_0.95"]
        rows.append(row)
    return pd.DataFrame(rows)


def ceilings(best: pd.DataFrame, quick: bool) -> pd.DataFrame:
    """What the requests themselves forbid, per workload."""
    rows = []
    for row in best.itertuples():
        table, services, shares, duration_ms = setting(row.profile, row.workload, quick)
        top = lab.ceiling(services, table, seeds=SEEDS[quick], duration_ms=duration_ms, shares=shares)
        part = row.DStack / min(1.0, top.load)
        rows.append({"profile": row.profile, "workload": row.workload, "ceiling": top.load, "DStack of it": part})
    return pd.DataFrame(rows)


def print_comparison(best: pd.DataFrame, quick: bool) -> None:
    """Print D-STACK beside the others, the median, and the ceilings."""
    print("\nDStack beside the others; '-' where it has no plan for that load")
    print(best.round(3).to_string(index=False, na_rep="-"))
    print(f"\nMedian max_load of DStack over workloads: {best['DStack'].median():.3f} of the bound")
    print("\nHighest load that no schedule can pass, knowing when requests come (lab.ceiling), and DStack's part of it")
    print(ceilings(best, quick).round(3).to_string(index=False))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two workloads, short runs, coarse search")
    parser.add_argument("--out", type=Path, help="write every figure to this CSV file")
    parser.add_argument("--folder", type=Path, help="keep finished figures here, to go on later")
    parser.add_argument("--admission", default="own", choices=["own", "one rule"], help="who turns requests away")
    parser.add_argument("--jobs", type=int, default=-1, help="processes; -1 for one per core")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--policies", nargs="+", metavar="NAME", choices=[*all_policies()], help="race these; all by default")
    chosen = parser.parse_args()
    racing = {name: policy for name, policy in all_policies().items() if name in (chosen.policies or all_policies())}
    begin = time.perf_counter()
    table = lab.sweep(
        figures,
        profile=PROFILES,
        workload=WORKLOADS[chosen.quick],
        policy=racing,
        quick=[chosen.quick],
        admission=[chosen.admission],
        folder=chosen.folder,
        jobs=chosen.jobs,
        progress=chosen.progress,
    )
    loads = table.pivot(index=["profile", "workload"], columns="policy", values="max_load").reindex(PROFILES, level=0)
    print(f"Highest load as a part of the batch-level bound (simulated; admission: {chosen.admission})")
    print(loads.round(3).to_string(na_rep="-"))
    if {"DStack", "Temporal"} <= set(racing):
        print_comparison(against_others(table), chosen.quick)
    for row in table[table["sustained"] < table["max_load"]].itertuples():
        where = f"{row.policy} on {row.workload}, {row.profile}"
        print(f"{where}: holds up to {row.sustained:.3g}, fails somewhere above it, holds again up to {row.max_load:.3g}")
    broken = table[table["max_load"].isna()]
    for row in broken.itertuples():
        print(f"{row.policy} on {row.workload}, {row.profile}: {row.said}")
    if chosen.out is not None:
        with whole_file(chosen.out) as temporary:
            table.to_csv(temporary, index=False)
        print(f"Every figure is in {chosen.out}")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
