"""The main job from a terminal: measure two networks here, plan, race two policies for real and in simulation."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import dstack_lab as lab
from dstack_lab import figures
from dstack_lab.checks import positive
from dstack_lab.devices import Cpu
from dstack_lab.files import require_writable

MODELS = ("squeezenet1_1", "shufflenet_v2_x1_0")
BATCHES = (1, 2, 4)
#: Parts of the bound offered as load; the first that a plan can be made for is taken.
LOADS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
#: SLO of each service in service times of its largest batch on the whole machine.
SLO_TIMES = (4, 8)
MOST_SHARES = 4
COLUMNS = ("goodput_rps", "slo_attainment", "p50_ms", "p99_ms", "utilization", "mean_batch")


def demo(out: Path, duration_ms: float) -> pd.DataFrame:
    """Run the demonstration and print what it finds.

    Parameters
    ----------
    out : Path
        Folder that gets ``data/runs/`` (profile, traces) and ``figures/``.
    duration_ms : float
        Length of each of the two real runs.

    Returns
    -------
    pandas.DataFrame
        The comparison: one row per policy, measured or simulated, and service.

    Raises
    ------
    OSError
        Before anything is measured, if `out` cannot be written.
    InfeasiblePlan
        If this machine keeps none of the SLOs at any of `LOADS`.
    """
    require_writable(out / "data/runs/cpu.csv")
    require_writable(out / "figures/demo-knee.png")
    positive("duration_ms", duration_ms)
    device = Cpu()
    print(f"1/4  Measuring {' and '.join(MODELS)} on {device.describe()}\n")
    profile = lab.measure(list(MODELS), device=device, batches=BATCHES, shares=spaced(device.shares()))
    profile.save(out / "data/runs/cpu.csv")
    print(profile.table.round(2).to_string(index=False))
    print(f"\n     {profile.provenance}\n\n2/4  Knees (smallest share within 5 % of the best service time)\n")
    print(knees(profile).to_string(index=False))

    plan = feasible_plan(profile)
    limit = lab.bound(plan.services, profile)
    print(f"\n3/4  Plan: share and batch of each service\n\n{plan.to_frame().to_string(index=False)}")
    print(
        f"\n     no schedule can exceed {limit.total_rps:.1f} requests/s in time here\n\n4/4  D-STACK against temporal sharing\n"
    )
    traces = {}
    for policy in (lab.Temporal(), lab.DStack()):
        real = lab.run(plan, policy, device, duration_ms, seed=1, progress=True)
        real.save(out / f"data/runs/{policy.name.lower()}.npz")
        traces[policy.name, "measured"] = real
        traces[policy.name, "simulated"] = lab.simulate(plan, policy, duration_ms, seed=1)
    table = compared(traces)
    print("\n" + table[["policy", "how", "service", *COLUMNS]].round(3).to_string(index=False))

    p99 = {name: float(lab.summary(traces[name, "measured"])["p99_ms"].to_numpy()[-1]) for name in ("DStack", "Temporal")}
    print(f"\nMeasured p99 latency, D-STACK over temporal sharing: {p99['DStack'] / p99['Temporal']:.2f}")
    print(traces["DStack", "measured"].provenance)
    real_rows = table[table["how"] == "measured"]
    real = traces["DStack", "measured"]
    for name, figure in (
        ("knee", figures.knee(profile)),
        ("timeline", figures.timeline(real, window_ms=duration_ms / 5)),
        ("comparison", figures.comparison(real_rows, real.provenance)),
    ):
        print(f"saved {figures.save(figure, out / f'figures/demo-{name}.png')}")
    return table


def spaced(shares: tuple[float, ...]) -> tuple[float, ...]:
    """At most four of the shares, from the smallest to the whole, so that a large machine is measured as fast."""
    if len(shares) <= MOST_SHARES:
        return shares
    return tuple(shares[round(k * (len(shares) - 1) / (MOST_SHARES - 1))] for k in range(MOST_SHARES))


def knees(profile: lab.Profile) -> pd.DataFrame:
    """Knee of each network at each measured batch."""
    rows = []
    for name in profile.models:
        model, of = lab.fit(profile, name), profile.of(name)
        shares = sorted(of["gpu_pct"].unique())
        rows.append(
            {"model": name, **{f"batch {b}": f"{model.knee_pct(b, shares=shares):g} %" for b in sorted(of["batch"].unique())}}
        )
    return pd.DataFrame(rows)


def feasible_plan(profile: lab.Profile) -> lab.Plan:
    """Services that suit this machine: SLOs from its service times, rates from its bound."""
    whole = max(profile.table["gpu_pct"])
    slos = [
        times * float(lab.fit(profile, name).predict(max(BATCHES), whole)) for name, times in zip(MODELS, SLO_TIMES, strict=True)
    ]
    alone = [lab.Service(name, round(slo), lab.Poisson(1)) for name, slo in zip(MODELS, slos, strict=True)]
    areas = lab.bound(alone, profile).area_pct_ms
    for load in LOADS:
        rates = [load * 100_000 / len(areas) / area for area in areas]
        services = [lab.Service(s.model, s.slo_ms, lab.Poisson(round(r, 1))) for s, r in zip(alone, rates, strict=True)]
        try:
            plan = lab.optimize(services, profile)
            lab.DStack().reset(plan)
        except lab.InfeasiblePlan as found:
            reason = found
        else:
            return plan
    raise lab.InfeasiblePlan(f"this machine is too slow or too busy for the demonstration: {reason}")


def compared(traces: dict[tuple[str, str], lab.Trace]) -> pd.DataFrame:
    """Summaries of several traces, with the columns ``policy`` and ``how`` (measured or simulated)."""
    parts: list[pd.DataFrame] = [lab.summary(t).assign(policy=name, how=how) for (name, how), t in traces.items()]
    return pd.concat(parts, ignore_index=True)
