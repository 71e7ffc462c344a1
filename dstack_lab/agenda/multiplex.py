"""Item 5: every policy on the workloads of the comparison, for real, and beside each what the simulator says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab import policies
from dstack_lab.admission import admitted
from dstack_lab.agenda.pages import markdown
from dstack_lab.agenda.record import Record, Step
from dstack_lab.agenda.target import CPU_MODELS, Target
from dstack_lab.arrivals import Poisson
from dstack_lab.bounds import bound, service_tables
from dstack_lab.checks import require
from dstack_lab.devices import Device
from dstack_lab.metrics import summary
from dstack_lab.policies.base import Policy
from dstack_lab.profiler import measure
from dstack_lab.profiles import Profile, load_profile
from dstack_lab.runner import run as run_for_real
from dstack_lab.services import Service
from dstack_lab.traces import Trace
from dstack_lab.trials import plan_for
from dstack_lab.validation import validate
from dstack_lab.workloads import workload

#: Those that a device can run, the comparison's first; `Ideal` changes shares between kernels, which none can.
POLICIES: dict[str, Callable[[], Policy]] = {
    name: getattr(policies, name)
    for name in (
        *("DStack", "Temporal", "Gslice", "Triton", "Uncontrolled", "Nexus", "Gpulet", "Clipper"),
        *("MaxThroughput", "MaxMin", "AdaptiveDStack"),
    )
}
#: Names of the workloads and parts of the bound offered, those that tell most first.
WORKLOADS, LOADS = ("C-4", "C-2", "C-7", "C-3"), (0.8, 1.2, 0.4)
RUN_S, DRAIN_S = 20.0, 5.0
#: Longest wait for the workers of a run [s]: one that hangs must not cost the whole call.
START_S = 200.0
#: SLO of each network on a CPU, in service times of its largest batch on all cores.
CPU_SLO_TIMES = (4, 8)
#: Every policy drops what can no longer be in time, as in the simulated comparison: else overload compares that.
ADMISSION = "one rule"
#: Workers that one device is asked to hold: MPS takes 48 clients at least, of which one holds the parameters.
MOST_WORKERS = 47
SEED = 1
NO_KNEE = "no profile is recorded: first python -m dstack_lab measure --agenda knee"


def run(target: Target, record: Record) -> None:
    """Race what is left: the loads and workloads that tell most first.

    Raises
    ------
    RuntimeError
        If there is no profile of any mechanism: the knee comes first.
    """
    steps: list[Step] = []
    missing = [m for m in target.mechanisms if target.on_gpu and not target.quick and not known_profiles(record, m)]
    if set(missing) == set(target.mechanisms):
        raise RuntimeError(f"{' and '.join(missing)} of {record.device}: {NO_KNEE}")
    seconds = 2.0 if target.quick else RUN_S
    for mechanism in target.mechanisms:
        steps.append(Step(f"profile {mechanism}", lambda m=mechanism: find_profile(target, record, m), 60))  # type: ignore[misc]
        if mechanism in missing:
            continue
        shared = [name for name, kind in POLICIES.items() if kind().oversubscribes and mechanism == "green"]
        if shared:
            record.say(f"not on {mechanism}, whose shares are a true partition: {', '.join(shared)}")
        for load, name, policy in grid(target):
            if policy not in shared:
                work = _race(target, record, mechanism, name, load, policy, seconds)
                steps.append(
                    Step(f"{mechanism} {name} {load:g} {policy}", work, seconds + DRAIN_S + (10 if target.quick else 60))
                )
    record.run(steps)
    table = record.table("runs")
    if table is not None:
        print(f"\n{markdown(table)}\n\n{record.provenance}\n")


def grid(target: Target) -> list[tuple[float, str, str]]:
    """Load, workload and policy of each run, in order."""
    names = WORKLOADS if target.on_gpu else ("cpu-2",)
    if target.quick:
        return [(0.4, "C-2" if target.on_gpu else "cpu-2", policy) for policy in ("DStack", "Temporal")]
    return [(load, name, policy) for load in LOADS for name in names for policy in POLICIES]


def known_profiles(record: Record, mechanism: str) -> list[Path]:
    """Profiles that the knee has recorded: in this call's folder, in the one gone on from, in the data."""
    folders = [record.folder.parent, *([record.resume] if record.resume else []), Path("data/recorded")]
    files = [Path(folder) / "knee" / f"{record.device}-{mechanism}.csv" for folder in folders]
    return [file for file in files if file.exists()]


def find_profile(target: Target, record: Record, mechanism: str) -> dict[str, Any]:
    """Keep the profile to plan and simulate with: the knee's; on a CPU or in a quick trial else one measured now."""
    known = known_profiles(record, mechanism)
    if known:
        found = load_profile(known[0])
    elif target.on_gpu and not target.quick:
        raise RuntimeError(NO_KNEE)
    else:
        device = target.device(mechanism)
        point_s = 0.2 if target.quick else 1.0
        shares = target.shares(device)
        found = measure(target.models, device, target.batches, shares, progress=False, seconds_per_point=point_s)
    found.save(record.table_path(f"{mechanism}-profile"))
    return {"from": "the knee" if known else "measured now", "points": len(found.table), "origin": str(found.provenance)}


def services_of(name: str, profile: Profile, load: float) -> tuple[Service, ...]:
    """Return the services of a workload; of ``"cpu-2"`` with SLOs that suit the machine."""
    if name != "cpu-2":
        return workload(name, profile, load)
    asked = [Service(model, 1e6, Poisson(1.0)) for model in CPU_MODELS]
    slos = [n * t.at(t.batch_max, 100) for n, t in zip(CPU_SLO_TIMES, service_tables(asked, profile), strict=True)]
    asked = [replace(s, slo_ms=float(round(slo))) for s, slo in zip(asked, slos, strict=True)]
    areas = bound(asked, profile).area_pct_ms
    rates = [load * 100_000 / len(areas) / area for area in areas]
    return tuple(replace(s, arrivals=Poisson(rate)) for s, rate in zip(asked, rates, strict=True))


def _race(target: Target, record: Record, mechanism: str, name: str, load: float, policy: str, seconds: float) -> Any:
    def work() -> dict[str, Any]:
        path = record.table_path(f"{mechanism}-profile")
        require(path.exists(), f"profile of {mechanism}", "none", "recorded by the step before, which failed")
        profile, chosen = load_profile(path), admitted(POLICIES[policy](), ADMISSION)
        plan = plan_for(services_of(name, profile, load), profile, "efficacy")
        options: dict[str, Any] = {"oversubscribe": True} if chosen.oversubscribes else {}
        if mechanism == "green" and chosen.copies(plan) > 1:  # any slot may come free: a graph for each
            narrowest = min(share for shares in chosen.shares(plan).values() for share in shares)
            options["places"] = max(2, int((100 + 1e-6) // narrowest))
        device: Device = target.device(mechanism, **options)
        at_once = chosen.shares if getattr(device, "prepares_all", False) else chosen.first_shares
        workers = sum(len(shares) for shares in at_once(plan).values())  # of copies the fleet leaves out what is too many
        require(workers <= MOST_WORKERS, f"workers of {policy}", workers, f"at most {MOST_WORKERS}")
        drain_ms = 1000 * min(seconds, DRAIN_S)
        trace = run_for_real(plan, chosen, device, 1000 * seconds, SEED, drain_ms=drain_ms, start_timeout_s=START_S)
        rows = compared(trace, admitted(POLICIES[policy](), ADMISSION))
        head: dict[str, Any] = {"mechanism": mechanism, "workload": name, "load": load, "policy": policy}
        record.add("runs", rows.assign(**head)[[*head, *rows.columns]], f"{mechanism} {name} {load:g} {policy}")
        if policy == "DStack":  # to look at, and to validate with another profile
            with tempfile.TemporaryDirectory() as folder:
                path = trace.save(Path(folder) / f"{mechanism}-{name}-{load:g}-{policy}.npz")
                record.pack("traces", path.name, path.read_bytes())
        whole = rows[rows["service"] == "all"].iloc[0].to_dict()
        return {"faults": trace.events["kind"].value_counts().to_dict()} | {str(k): v for k, v in whole.items()}

    return work


def compared(trace: Trace, policy: Policy | None = None) -> pd.DataFrame:
    """One row per service and one for all: what was recorded, what the simulator says, and how far that is off.

    Columns of `validate`; of `summary` ``throughput_rps``, ``p50_ms``, ``mean_batch``, ``dropped``, ``unserved`` and, where
    the GPU was sampled, ``sm_utilization`` and ``energy_j``, else NaN; ``dispatch_ms``: median of the time of a launch that
    its worker did not compute in.
    """
    seen, errors = summary(trace), validate(trace, policy=policy)
    for column in ("sm_utilization", "energy_j"):
        if column not in seen:
            seen[column] = np.nan
    more = ["service", "throughput_rps", "p50_ms", "mean_batch", "dropped", "unserved", "sm_utilization", "energy_j"]
    table = errors.merge(seen[more], on="service", validate="one_to_one")
    launches = trace.launches
    worked = launches["worker_ms"] if "worker_ms" in launches else pd.Series(np.nan, launches.index)
    cost = launches["end_ms"] - launches["start_ms"] - worked
    by_service = cost.groupby(launches["service"].astype(str)).median()
    table["dispatch_ms"] = table["service"].map({**by_service.to_dict(), "all": cost.median()})
    return table.round(6)
