"""Time of planning 20 services over 64 batches x 20 shares, beside the same search point by point.

The GPU% models are fitted before the clock starts, as in any comparison that plans more than once. The
loop version takes each point from its definition and stops at the best point of each service: it
neither moves services to fit together nor says what binds, so its time is a floor for such a search.

    python benchmarks/optimizer.py [--rounds 30]

Prints medians over rounds; each round runs both, in turn, so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import pandas as pd

import dstack_lab as lab
from dstack_lab.bounds import service_tables

SERVICES, BATCH_MAX, LIMIT_MS = 20, 64, 50.0
SHARES = tuple(float(g) for g in range(5, 101, 5))
LOADS = {"alone": 0.5, "together": 0.97}  # of the bound: each has its best point, or some must move to a cheaper one


def make_profile() -> lab.Profile:
    """Networks whose fixed time, time per request and knee are drawn at random."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(SERVICES):
        fixed, item, knee = rng.uniform(1, 5), rng.uniform(0.1, 1), rng.uniform(20, 80)
        for batch in (1, 2, 4, 8, 16, 32, BATCH_MAX):
            for share in (10, 20, 40, 60, 80, 100):
                # the knee moves right with the batch, as it does on every GPU
                ms = (fixed + item * batch) * max(1, knee * (1 + batch / 64) / share) ** 0.9
                rows.append((f"m{i:02}", batch, share, ms))
    table = pd.DataFrame(rows, columns=["model", "batch", "gpu_pct", "service_ms"])
    return lab.Profile(table, lab.Provenance("simulated", "toy GPU", "model"))


def make_services(profile: lab.Profile, load: float) -> list[lab.Service]:
    """Services of equal GPU time, at a part of what any schedule can serve."""
    asked = [lab.Service(m, 200 + 20 * i, lab.Poisson(1.0)) for i, m in enumerate(profile.models)]
    areas = lab.bound(asked, profile, SHARES).area_pct_ms
    rates = [load * 100_000 / SERVICES / area for area in areas]
    return [lab.Service(s.model, s.slo_ms, lab.Poisson(r)) for s, r in zip(asked, rates, strict=True)]


def loop(services: list[lab.Service], profile: lab.Profile) -> list[tuple[float, int, float]]:
    """Best (score, batch, share) of each service, point by point."""
    found = []
    for service, times in zip(services, service_tables(services, profile), strict=True):
        best, slo, rate = (0.0, 0, 0.0), service.slo_ms, service.rate_rps
        for batch in range(1, BATCH_MAX + 1):
            for share in SHARES:
                ms = times.at(batch, share)
                if max((batch - 1) * 1000 / rate, ms) + ms <= slo and rate * ms <= 1000 * batch:
                    best = max(best, (batch / (ms * ms * share), batch, share))
        found.append(best)
    return found


def milliseconds(run: object, *arguments: object) -> float:
    start = time.perf_counter()
    run(*arguments)  # type: ignore[operator]
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    profile = make_profile()
    for name, load in LOADS.items():
        services = make_services(profile, load)
        plan = lab.optimize(services, profile, shares=SHARES)  # also fits the models
        if name == "alone":
            same = [(a.batch, a.gpu_pct) for a in plan.allocations] == [best[1:] for best in loop(services, profile)]
            assert same, "the two searches must agree where every service has its best point"
        times = [
            (milliseconds(lambda s: lab.optimize(s, profile, shares=SHARES), services), milliseconds(loop, services, profile))
            for _ in range(rounds)
        ]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{SERVICES} services x {BATCH_MAX} batches x {len(SHARES)} shares, {name} ({load:.0%} of the bound, "
            f"{sum(a.binding == 'GPU total' for a in plan.allocations)} moved): {ours:.1f} ms = {ours / LIMIT_MS:.2f} x "
            f"{LIMIT_MS:.0f} ms; point by point {theirs:.1f} ms = {theirs / ours:.1f} x as long"
        )


if __name__ == "__main__":
    main()
