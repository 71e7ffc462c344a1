"""Simulated requests per second, beside SimPy and beside itself at other sizes.

The system: services with Poisson arrivals and deterministic service times share one GPU, one batch at a
time, earliest deadline first, loaded so that a batch holds about four requests. The SimPy version is
written lean: arrivals are sampled arrays, a queue is a position in one, and its processes are the
arrivals of each service and one server.

    python benchmarks/engine.py [--requests 400000] [--rounds 3]

Prints the median over rounds; each round runs every contender once, in turn, so that a slow moment of
the machine hits all of them. The compiled engine is timed at ten times as many requests, and at 10^5
to 10^7 to see whether a request always costs the same. It is compiled before the clock starts, and
each run follows one that is not timed: a virtual machine that hands out memory for the first time
takes as long as the run. Needs SimPy: ``make bench`` installs it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

import dstack_lab as lab
from dstack_lab.services import ServiceTable
from dstack_lab.simulator import sample_arrivals

#: Service time of a batch of b on the whole GPU [ms], and GPU% beyond which it does not shrink.
FIXED_MS, PER_REQUEST_MS, KNEE_PCT, BATCH_MAX = 0.4, 0.1, 45, 8
LOAD_RPS = {"Temporal": 4900, "DStack": 5000}  # of all services: about four requests a batch


def make_plan(services: int, rate_rps: float) -> lab.Plan:
    """Services alike but for their SLO."""
    batch, share = np.arange(1, BATCH_MAX + 1)[:, None], np.arange(1, 101)[None, :]
    times = ServiceTable((FIXED_MS + PER_REQUEST_MS * batch) * np.maximum(1, KNEE_PCT / share))
    rate = rate_rps / services
    asked = tuple(lab.Service(f"s{i}", 10.0 * services / 4 + i, lab.Poisson(rate)) for i in range(services))
    given = tuple(lab.Allocation(s.name, 50.0, 4, times.at(4, 50), rate) for s in asked)
    return lab.Plan(
        asked, given, (times,) * services, (25.0, 50.0, 100.0), "benchmark", lab.Provenance("simulated", "toy", "model")
    )


def simpy_run(plan: lab.Plan, duration_ms: float, seed: int) -> tuple[int, int]:
    """Temporal sharing in SimPy; returns requests and batches."""
    import simpy

    env = simpy.Environment()
    queues = [times.tolist() for times in sample_arrivals(plan, duration_ms, seed)]
    slos = [s.slo_ms for s in plan.services]
    times = [[0.0, *(t.at(b, 100) for b in range(1, t.batch_max + 1))] for t in plan.tables]
    most = [max(b for b in range(1, t.batch_max + 1) if 2 * t.at(b, 100) <= s) for t, s in zip(plan.tables, slos, strict=True)]
    heads, arrived = [0] * len(queues), [0] * len(queues)
    latencies: list[list[float]] = [[] for _ in queues]
    idle = env.event()
    batches = 0

    def arrivals(i: int):
        nonlocal idle
        last = 0.0
        for at in queues[i]:
            yield env.timeout(at - last)
            last = at
            arrived[i] += 1
            if not idle.triggered:
                idle.succeed()

    def server():
        nonlocal idle, batches
        while True:
            best, nearest = -1, float("inf")
            for i, queue in enumerate(queues):
                if heads[i] < arrived[i] and queue[heads[i]] + slos[i] < nearest:
                    best, nearest = i, queue[heads[i]] + slos[i]
            if best < 0:
                if all(head == len(queue) for head, queue in zip(heads, queues, strict=True)):
                    return
                idle = env.event()
                yield idle
                continue
            head = heads[best]
            batch = min(arrived[best] - head, most[best])
            heads[best] = head + batch
            yield env.timeout(times[best][batch])
            batches += 1
            now = env.now
            latencies[best].extend([now - at for at in queues[best][head : head + batch]])

    for i in range(len(queues)):
        env.process(arrivals(i))
    env.run(env.process(server()))
    return sum(map(len, latencies)), batches


def lab_run(plan: lab.Plan, policy: lab.Policy, duration_ms: float, seed: int, engine: str = "python") -> tuple[int, int]:
    """The same through `simulate`, arrivals and trace included."""
    trace = lab.simulate(plan, policy, duration_ms, seed, engine=engine)
    return len(trace.requests), len(trace.launches)


def rate_of(run: Callable[[], tuple[int, int]]) -> tuple[float, float]:
    """Requests per second of processor time, and requests per batch."""
    start = time.process_time()
    requests, batches = run()
    return requests / (time.process_time() - start), requests / batches


def compiled_run(policy: lab.Policy, services: int, requests: float) -> Callable[[], tuple[int, int]]:
    """A run of so many requests on the compiled engine."""
    load = LOAD_RPS[policy.name]
    plan = make_plan(services, load)
    return lambda: lab_run(plan, policy, requests / load * 1000, 1, "compiled")


def bytes_per_request(plan: lab.Plan, duration_ms: float, engine: str) -> float:
    """Growth of peak memory per request, between a run and one four times as long."""
    peaks, counts = [], []
    for duration in (duration_ms, 4 * duration_ms):
        tracemalloc.start()
        counts.append(lab_run(plan, lab.Temporal(), duration, 1, engine)[0])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (counts[1] - counts[0])


def main() -> None:
    """Run all contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rate = LOAD_RPS["Temporal"]
    duration = options.requests / rate * 1000
    four = make_plan(4, rate)
    runs: dict[str, Callable[[], tuple[int, int]]] = {
        "SimPy, Temporal, 4 services": lambda: simpy_run(four, duration, 1),
        "dstack_lab, Temporal, 4 services": lambda: lab_run(four, lab.Temporal(), duration, 1),
        "dstack_lab, Temporal, 32 services": lambda: lab_run(make_plan(32, rate), lab.Temporal(), duration, 1),
        "dstack_lab, DStack, 4 services": lambda: lab_run(make_plan(4, LOAD_RPS["DStack"]), lab.DStack(), duration, 1),
        "dstack_lab, Temporal, 4 services, a tenth as long": lambda: lab_run(four, lab.Temporal(), duration / 10, 1),
    }
    for policy, services in itertools.product((lab.Temporal(), lab.DStack()), (4, 32)):
        compiled_run(policy, services, 1000)()  # compiles, or loads what was compiled before
        name = f"compiled, {policy.name}, {services} services"
        runs[name] = compiled_run(policy, services, 10 * options.requests)
    for exponent in (5, 6, 7):
        runs[f"compiled, Temporal, 4 services, 10^{exponent} requests"] = compiled_run(lab.Temporal(), 4, 10**exponent)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            if name.startswith("compiled"):
                run()
            found[name].append(rate_of(run))
    median = {name: statistics.median(r for r, _ in rows) for name, rows in found.items()}
    base = median["SimPy, Temporal, 4 services"]
    print(f"{'':52}{'requests/s':>12}{'x SimPy':>9}{'a batch':>9}   (median of {options.rounds}, of processor time)")
    for name, value in median.items():
        print(f"{name:52}{value:12,.0f}{value / base:9.1f}{found[name][0][1]:9.2f}")
    for engine, part in (("python", duration / 8), ("compiled", duration)):
        print(f"peak memory, {engine}: {bytes_per_request(four, part, engine):.0f} bytes a request (limit 100)")


if __name__ == "__main__":
    main()
