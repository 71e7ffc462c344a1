"""Simulated requests per second, beside SimPy and beside itself at other sizes.

The toy: services with Poisson arrivals and deterministic service times share one GPU, loaded so that a
batch holds few requests. C-4: four networks at load 0.8 on a simulated H200, with batches of tens. Then every
workload of `lab.workload` at load 0.8 on two simulated GPUs, by policy and engine.
An engine works by the batch, so requests per batch stand beside every figure. The SimPy version, one
batch at a time, earliest deadline first, is written lean: arrivals are sampled arrays, a queue is a
position in one, and its processes are the arrivals of each service and one server.

    python benchmarks/engine.py [--requests 400000] [--rounds 3] [--python-exponent 7]

Prints the median over rounds; each round runs every contender once, in turn, so that a slow moment of
the machine hits all of them. The compiled engine is timed at ten times as many requests. Each run
follows one that is not timed: that compiles, `DStack` makes the plan that later runs of the same plan
use (how long that takes stands beside it), and a virtual machine hands out memory for the first time.
Runs of 10^5 to 10^7 show whether a request always costs the same. Needs SimPy: ``make bench`` installs it.
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
from dstack_lab.workloads import WORKLOADS

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


def workload_plan() -> lab.Plan:
    """Four networks of `lab.workload` at load 0.8 on a simulated H200: batches of tens of requests."""
    profile = lab.load_profile("h200-simulated")
    return lab.optimize(lab.workload("C-4", profile, load=0.8), profile)


def contender(plan: lab.Plan, policy: lab.Policy, requests: float, engine: str) -> Callable[[], tuple[int, int]]:
    """A run of about so many requests."""
    duration = requests / sum(s.rate_rps for s in plan.services) * 1000
    return lambda: lab_run(plan, policy, duration, 1, engine)


def contenders(requests: int) -> dict[str, Callable[[], tuple[int, int]]]:
    """Runs by name, in the order of the table; the compiled ones are ten times as long."""
    real = workload_plan()
    runs: dict[str, Callable[[], tuple[int, int]]] = {}
    small = make_plan(4, LOAD_RPS["Temporal"])
    for name, plan in (("toy, 4 services", small), ("C-4", real)):
        duration = requests / sum(s.rate_rps for s in plan.services) * 1000
        runs[f"SimPy, Temporal, {name}"] = lambda plan=plan, duration=duration: simpy_run(plan, duration, 1)  # type: ignore[misc]
    for engine, policy in itertools.product(("python", "compiled"), (lab.Temporal(), lab.DStack())):
        length = requests * (10 if engine == "compiled" else 1)
        for services in (4, 32):
            plan = make_plan(services, LOAD_RPS[policy.name])
            runs[f"{engine}, {policy.name}, toy, {services} services"] = contender(plan, policy, length, engine)
        runs[f"{engine}, {policy.name}, C-4"] = contender(real, policy, length, engine)
    return runs


def workload_speeds(requests: int) -> None:
    """Print simulated requests per second on every workload and two GPUs, at load 0.8; compiled runs are ten times as long."""
    columns = list(itertools.product((lab.Temporal(drop_late=True), lab.DStack(reject=True)), ("python", "compiled")))
    print(
        "\nMillions of requests/s at load 0.8      "
        + "".join(f"{f'{p.name}, {e}':>20}" for p, e in columns)
        + "  DStack's batch  plan [ms]"
    )
    slowest = dict.fromkeys(range(len(columns)), float("inf"))
    for device, name in itertools.product(("v100", "h200"), WORKLOADS):
        profile, shares = lab.load_profile(f"{device}-simulated"), lab.gpu_specs.SPECS[device].shares()
        plan = lab.optimize(lab.workload(name, profile, load=0.8, shares=shares), profile, shares=shares)
        cells, mean = [], 0.0
        begin = time.process_time()
        lab.cut_slots(plan)
        planned_ms = 1000 * (time.process_time() - begin)
        for k, (policy, engine) in enumerate(columns):
            run = contender(plan, policy, requests * (10 if engine == "compiled" else 1), engine)
            run()
            speed, mean = rate_of(run)
            slowest[k] = min(slowest[k], speed)
            cells.append(f"{speed / 1e6:20.2f}")
        print(f"{f'{name}, {device}-simulated':40}{''.join(cells)}{mean:16.1f}{planned_ms:11.0f}")
    print(f"{'slowest':40}" + "".join(f"{speed / 1e6:20.2f}" for speed in slowest.values()))


def flatness(longest: dict[str, int]) -> None:
    """Print what a request costs in runs of 10^5 to 10^n requests, relative to the shortest; four services."""
    for engine, policy in itertools.product(longest, (lab.Temporal(), lab.DStack())):
        plan, costs = make_plan(4, LOAD_RPS[policy.name]), []
        for exponent in range(5, longest[engine] + 1):
            run = contender(plan, policy, 10**exponent, engine)
            run()
            rounds = range(5 if exponent == 5 else 1)  # a run of 10^5 is too short to time once
            costs.append(statistics.median(1e9 / rate_of(run)[0] for _ in rounds))
        cells = ", ".join(f"10^{5 + i}: {cost:.0f} ns" for i, cost in enumerate(costs))
        print(f"cost of a request, {engine}, {policy.name}: {cells}; longest / shortest run {costs[-1] / costs[0]:.2f}")


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
    """Run all contenders and print the table, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python-exponent", type=int, default=6, help="longest Python run: 10 to this power; 7 takes a minute")
    options = parser.parse_args()
    runs = contenders(options.requests)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            if not name.startswith("SimPy"):
                run()
            found[name].append(rate_of(run))
    median = {name: statistics.median(r for r, _ in rows) for name, rows in found.items()}
    print(f"{'':40}{'requests/s':>12}{'x SimPy':>9}{'requests/batch':>16}   (median of {options.rounds}, of processor time)")
    for name, value in median.items():
        base = median["SimPy, Temporal, C-4" if name.endswith("C-4") else "SimPy, Temporal, toy, 4 services"]
        print(f"{name:40}{value:12,.0f}{value / base:9.1f}{found[name][0][1]:16.2f}")
    for engine, policy in itertools.product(("python", "compiled"), ("Temporal", "DStack")):
        few, many = (median[f"{engine}, {policy}, toy, {n} services"] for n in (4, 32))
        print(f"cost with 32 services / with 4, {engine}, {policy}: {few / many:.2f} (limit 3)")
    workload_speeds(options.requests)
    flatness({"python": options.python_exponent, "compiled": 7})
    four, duration = make_plan(4, LOAD_RPS["Temporal"]), options.requests / LOAD_RPS["Temporal"] * 1000
    for engine, part in (("python", duration / 8), ("compiled", duration)):
        print(f"peak memory, {engine}: {bytes_per_request(four, part, engine):.0f} bytes a request (limit 100)")


if __name__ == "__main__":
    main()
