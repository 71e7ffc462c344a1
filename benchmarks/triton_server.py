"""A real Triton Inference Server beside its simulation, and beside D-STACK, on this machine's cores.

The same requests five times at each load: to the real server, to our workers under the rule of `lab.Triton`
(which let core sets meet) and under D-STACK, and to the simulations of both. `make triton` installs the server first.

    python benchmarks/triton_server.py [--loads 0.4,0.8] [--seconds 15] [--server build/triton] [--profile FILE] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

import dstack_lab as lab
from dstack_lab.devices import Cpu

MODELS = ("squeezenet1_1", "shufflenet_v2_x1_0")
BATCHES = (1, 2, 4, 8)
#: SLO of each service in service times of its largest batch on the whole machine.
SLO_TIMES = (4, 8)
COLUMNS = ("goodput_rps", "slo_attainment", "p50_ms", "p99_ms", "mean_batch", "utilization", "dropped", "unserved")


def services_at(profile: lab.Profile, load: float) -> list[lab.Service]:
    """Two services that together ask for `load` of the bound, half of it each."""
    whole = max(profile.table["gpu_pct"])
    slos = [t * float(lab.fit(profile, m).predict(max(BATCHES), whole)) for m, t in zip(MODELS, SLO_TIMES, strict=True)]
    alone = [lab.Service(model, round(slo), lab.Poisson(1)) for model, slo in zip(MODELS, slos, strict=True)]
    areas = lab.bound(alone, profile).area_pct_ms
    rates = [round(load * 100_000 / len(areas) / area, 1) for area in areas]
    return [lab.Service(s.model, s.slo_ms, lab.Poisson(rate)) for s, rate in zip(alone, rates, strict=True)]


def runs(plan: lab.Plan, duration_ms: float, seed: int, server: str | None) -> Iterator[tuple[str, str, Callable[[], lab.Trace]]]:
    """What schedules, how, and the run itself."""
    same = (duration_ms, seed)
    yield "Triton", "real server", lambda: lab.peers.triton(plan, lab.Triton(), Cpu(), *same, server=server)
    yield "Triton", "our workers", lambda: lab.run(plan, lab.Triton(), Cpu(oversubscribe=True), *same)
    yield "Triton", "simulated", lambda: lab.simulate(plan, lab.Triton(), *same)
    yield "DStack", "our workers", lambda: lab.run(plan, lab.DStack(), Cpu(), *same)
    yield "DStack", "simulated", lambda: lab.simulate(plan, lab.DStack(), *same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=lambda text: [float(part) for part in text.split(",")], default=[0.4, 0.8])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", help="program tritonserver, or a folder that nvidia-pytriton was installed into")
    parser.add_argument("--profile", type=Path, help="of this machine's cores; measured if there is no such file")
    parser.add_argument("--out", type=Path, help="folder for the traces")
    options = parser.parse_args()
    known = options.profile is not None and options.profile.exists()
    profile = lab.load_profile(options.profile) if known else lab.measure(list(MODELS), device=Cpu(), batches=BATCHES)
    if options.profile is not None and not known:
        profile.save(options.profile)
    print(profile.table.round(2).to_string(index=False), f"\n{profile.provenance}\n")
    for load in options.loads:
        services = services_at(profile, load)
        print(f"load {load:g}: " + ", ".join(f"{s.model} {s.rate_rps:g}/s within {s.slo_ms:g} ms" for s in services))
        plan = lab.optimize(services, profile, overload="reject")
        rows = []
        for policy, how, run in runs(plan, options.seconds * 1000, options.seed, options.server):
            try:
                trace = run()
            except lab.InfeasiblePlan as reason:
                print(f"  {policy}, {how}: {reason}")
                continue
            if options.out is not None:
                trace.save(options.out / f"{load:g}-{policy}-{how.replace(' ', '-')}.npz")
            marks = "; ".join(mark.partition(":")[0] for mark in trace.provenance.marks)
            rows.append(lab.summary(trace).assign(policy=policy, how=how, marks=marks))
            if how == "real server":
                print(f"  {trace.provenance.mechanism}")
        print(pd.concat(rows)[["policy", "how", "service", *COLUMNS, "marks"]].round(3).to_string(index=False) + "\n", flush=True)


if __name__ == "__main__":
    main()
