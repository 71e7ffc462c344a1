"""Comparisons, sweeps and the highest load, against plain loops, queueing theory and counted calls."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED, profile

import dstack_lab as lab
from dstack_lab import capacity, trials
from dstack_lab.admission import admitted
from dstack_lab.cells import run_cells
from dstack_lab.digests import digest
from dstack_lab.experiments import mean_interval
from dstack_lab.workloads import WORKLOADS, Faster, load_of

TOY = profile(small=(1.0, 0.5, 40.0), large=(2.0, 1.0, 80.0))
QUICK = {"seeds": (0, 1, 2), "duration_ms": 400.0}


def toy_services(rate=1.0):
    return (lab.Service("small", 25, lab.Poisson(300 * rate)), lab.Service("large", 50, lab.Poisson(100 * rate)))


class Refuses(lab.Temporal):
    """Serves up to a total rate, or refuses: a policy whose capacity is known."""

    def __init__(self, above_rps=0.0, until_rps=math.inf):
        super().__init__()
        self.above_rps, self.until_rps = above_rps, until_rps

    def reset(self, plan):
        super().reset(plan)
        asked = sum(s.rate_rps for s in plan.services)
        if self.above_rps < asked < self.until_rps:
            raise lab.InfeasiblePlan(f"asked for {asked:g}/s")


class DropsAll(lab.Policy):
    def decide(self, state):
        return [lab.Drop(s.name, n) for s in state.services if (n := s.waiting)]


class OneByOne(lab.Policy):
    """First come, first served, without any switch."""

    def decide(self, state):
        waiting = [s for s in state.services if s.ready]
        if not waiting or state.free_pct < 100:
            return []
        return [lab.Launch(min(waiting, key=lambda s: s.oldest_arrival_ms).name, 100, 1)]


@pytest.fixture
def simulated(monkeypatch):
    """List that grows by one entry for each simulation in this process."""
    calls = []

    def counting(plan, policy, *rest):
        calls.append(policy.name)
        return lab.simulate(plan, policy, *rest)

    monkeypatch.setattr(trials, "simulate", counting)
    return calls


# workloads


@pytest.mark.parametrize("split", ["equal_time", "equal_rate"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_asks_for_its_load(name, split):
    table = lab.load_profile("v100-simulated")
    services = lab.workload(name, table, load=0.7, split=split)
    assert len(services) == int(name[2:])
    areas = lab.bound(services, table).area_pct_ms
    rates = [s.rate_rps for s in services]
    assert sum(r * a for r, a in zip(rates, areas, strict=True)) == pytest.approx(70_000)
    equal = rates if split == "equal_rate" else [r * a for r, a in zip(rates, areas, strict=True)]
    assert equal == pytest.approx([equal[0]] * len(equal))
    assert load_of(services, table) == pytest.approx(0.7)


def test_arrivals_of_a_workload():
    table = lab.load_profile("v100-simulated")
    poisson = lab.workload("C-3", table)
    rates = [s.rate_rps for s in poisson]
    assert {s.model: s.slo_ms for s in poisson} == {"resnet50": 50, "vgg19": 100, "mobilenet_v2": 25}
    assert [s.arrivals for s in lab.workload("C-3", table, arrivals="gamma")] == [lab.Gamma(r, 3) for r in rates]
    first, *others = (s.arrivals for s in lab.workload("C-3", table, arrivals="steps"))
    assert first == lab.Steps(((0, rates[0]), (5000, 2 * rates[0]), (10_000, rates[0] / 2)))
    assert others == [s.arrivals for s in poisson[1:]]
    assert lab.workload("C-3", table, arrivals=lab.Deterministic)[0].arrivals == lab.Deterministic(rates[0])


@dataclass(frozen=True)
class Own:
    rate_rps: float = 100.0

    def sample(self, duration_ms, rng):
        return lab.Poisson(self.rate_rps).sample(duration_ms, rng)


def test_scaled_rates():
    kinds = [lab.Poisson(10), lab.Gamma(10, 2), lab.Deterministic(10), lab.Steps(((0, 10), (500, 30)))]
    kinds += [lab.Replay([100.0, 400.0]), Own()]
    services = [lab.Service("small", 25, a, f"s{i}") for i, a in enumerate(kinds)]
    got = [s.arrivals for s in lab.scaled(services, 2)]
    assert got[:4] == [lab.Poisson(20), lab.Gamma(20, 2), lab.Deterministic(20), lab.Steps(((0, 20), (500, 60)))]
    assert got[4].times_ms.tolist() == [50, 200]
    assert got[5] == Faster(Own(), 2)
    assert [a.rate_rps for a in got] == pytest.approx([2 * a.rate_rps for a in kinds])


def test_a_process_sped_up_is_the_process_at_a_higher_rate():
    fast = Faster(lab.Poisson(100), 3).sample(5000, np.random.default_rng(1))
    assert fast == pytest.approx(lab.Poisson(300).sample(5000, np.random.default_rng(1)))


# comparisons


def test_interval_of_known_numbers():
    half = 2.7764451051977987 * math.sqrt(2.5) / math.sqrt(5)  # t of 4 degrees of freedom, from a table
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half))
    assert mean_interval([2.0, 2.0, 2.0]) == (2, 2, 2)
    mean, low, high = mean_interval([7.0])
    assert mean == 7
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, mean_interval([1.0, math.nan, 2.0])))


def test_compare_is_a_loop_over_simulate():
    table = lab.compare(toy_services(), TOY, [lab.DStack(), lab.Temporal()], loads=(0.5, 1.5), **QUICK)
    assert list(table.groupby(["policy", "load"], sort=False).size()) == [3] * 4
    for load in (0.5, 1.5):
        plan = lab.optimize(toy_services(load), TOY)
        seen = {}
        for policy in (lab.DStack(), lab.Temporal()):
            traces = [lab.simulate(plan, policy, 400, seed) for seed in QUICK["seeds"]]
            seen[policy.name] = pd.concat([lab.summary(t).assign(seed=t.seed) for t in traces])
        for row in table[table["load"] == load].to_dict("records"):
            mine, base = (s[s["service"] == row["service"]] for s in (seen[row["policy"]], seen["Temporal"]))
            for metric in ("throughput_rps", "goodput_rps", "slo_attainment", "p50_ms", "p99_ms", "utilization"):
                assert (row[metric], row[f"{metric}_low"], row[f"{metric}_high"]) == pytest.approx(mean_interval(mine[metric]))
            gain = mean_interval(mine["goodput_rps"] - base["goodput_rps"])
            assert (row["goodput_rps_gain"], row["goodput_rps_gain_low"], row["goodput_rps_gain_high"]) == pytest.approx(gain)
            ratio = mean_interval(mine["p99_ms"] / base["p99_ms"])
            assert (row["p99_ms_ratio"], row["p99_ms_ratio_low"], row["p99_ms_ratio_high"]) == pytest.approx(ratio)
            assert row["seeds"] == 3


def test_pairs_cancel_what_arrivals_share():
    """The twin of the baseline gains exactly nothing, though its own goodput varies from seed to seed."""
    row = lab.compare(toy_services(), TOY, {"twin": lab.Temporal()}, **QUICK).iloc[-1]
    assert row["goodput_rps_high"] > row["goodput_rps_low"]
    assert [row[f"goodput_rps_gain{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert [row[f"utilization_ratio{end}"] for end in ("", "_low", "_high")] == [1, 1, 1]


def test_a_policy_that_serves_nothing():
    table = lab.compare(toy_services(), TOY, [DropsAll(), lab.Temporal()], **QUICK).set_index(["policy", "service"])
    nothing, temporal = table.loc[("DropsAll", "all")], table.loc[("Temporal", "all")]
    assert (nothing["goodput_rps"], nothing["slo_attainment"], nothing["bound_ratio"]) == (0, 0, 0)
    assert math.isnan(nothing["p99_ms"])
    assert nothing["goodput_rps_gain_low"] == pytest.approx(-temporal["goodput_rps_high"])
    other = lab.compare(toy_services(), TOY, [lab.Temporal(), DropsAll()], baseline="DropsAll", **QUICK)
    assert other["goodput_rps_ratio"].isna().all(), "nothing is a ratio of nothing"


@pytest.mark.parametrize("load", [0.3, 1.2, 3.0])
def test_no_policy_passes_the_bound(load):
    services = [replace(s, arrivals=lab.Deterministic(s.rate_rps)) for s in toy_services()]
    services = lab.scaled(services, 1 / load_of(services, TOY))
    table = lab.compare(services, TOY, [lab.Temporal(drop_late=True), lab.DStack(reject=True)], [load], (0,), 2000)
    assert table["bound_load"].to_numpy() == pytest.approx(load)
    assert (table["bound_ratio"] <= 1 + 50 / 2000).all()
    if load < 1:
        assert table["bound_ratio"].to_numpy() == pytest.approx(table["slo_attainment"].to_numpy())


def test_a_load_that_a_policy_cannot_schedule_has_a_note():
    table = lab.compare(toy_services(), TOY, [Refuses(500), lab.Temporal()], (0.5, 2.0), **QUICK)
    refused = table[(table["policy"] == "Refuses") & (table["load"] == 2)]
    assert refused["service"].tolist() == ["small", "large", "all"]
    assert refused["goodput_rps"].isna().all()
    assert set(refused["note"]) == {"asked for 800/s"}
    assert set(refused["seeds"]) == {0}
    assert table.drop(refused.index)["goodput_rps"].notna().all()
    assert set(table.drop(refused.index)["note"]) == {""}


def test_a_comparison_draws_itself_and_says_where_it_is_from():
    table = lab.compare(toy_services(), TOY, [Refuses(), lab.Temporal()], **QUICK)
    assert (table.attrs["provenance"].kind, table.attrs["provenance"].device) == ("simulated", "toy GPU")
    assert table["provenance"].str.contains("simulated, toy GPU").all()
    assert "toy GPU" in lab.figures.comparison(table[table["note"] == ""]).layout.title.subtitle.text


def test_services_beyond_an_operating_point_still_compare():
    """Just below the bound, a lone service may have no point where one launch at a time keeps up."""
    services = lab.scaled([toy_services()[0]], 0.999 / load_of([toy_services()[0]], TOY))
    with pytest.raises(lab.InfeasiblePlan):
        lab.optimize(services, TOY)
    table = lab.compare(services, TOY, [lab.Temporal()], **QUICK)
    assert table["throughput_rps"].notna().all()


# admission


def test_one_rule_turns_switches_on_and_leaves_the_policy_alone():
    mine = lab.Temporal()
    assert admitted(mine, "one rule").drop_late is True
    assert admitted(mine, "own").drop_late is False
    assert mine.drop_late is False
    assert admitted(lab.DStack(), "one rule").reject is True


def test_one_rule_for_a_policy_without_a_switch():
    plan = lab.optimize(toy_services(4), TOY, overload="reject")
    dropped = {style: lab.summary(lab.simulate(plan, admitted(OneByOne(), style), 500, 1)) for style in ("own", "one rule")}
    assert dropped["own"]["dropped"].iloc[-1] == 0
    assert dropped["one rule"]["dropped"].iloc[-1] > 0
    assert dropped["one rule"]["goodput_rps"].iloc[-1] > dropped["own"]["goodput_rps"].iloc[-1]
    changed = admitted(OneByOne(), "one rule")
    assert changed.name == "OneByOne"
    assert isinstance(changed, OneByOne)


# cells


def test_finished_cells_are_not_computed_again(tmp_path, simulated):
    def go(policies, **changed):
        return lab.compare(toy_services(), TOY, policies, (0.5, 1.0), folder=tmp_path / "new", **{**QUICK, **changed})

    first = go([lab.Temporal()])
    assert simulated == ["Temporal"] * 6
    pd.testing.assert_frame_equal(go([lab.Temporal()]), first)
    assert len(simulated) == 6
    go([lab.Temporal(), OneByOne()])
    assert simulated[6:] == ["OneByOne"] * 6, "only the new policy"
    go([lab.Temporal(drop_late=True)])
    assert len(simulated) == 18, "a parameter is part of the content"
    go([lab.Temporal()], seeds=(0, 1, 2, 3))
    assert len(simulated) == 20, "the new seed at both loads"
    go([lab.Temporal()], variability=lab.Lognormal(0.1))
    assert len(simulated) == 26
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".json"}
    pd.testing.assert_frame_equal(lab.compare(toy_services(), TOY, [lab.Temporal()], (0.5, 1.0), **QUICK), first)


def test_equal_cells_are_computed_once(tmp_path, simulated):
    lab.compare(toy_services(), TOY, {"a": OneByOne(), "b": OneByOne()}, baseline="a", folder=tmp_path, **QUICK)
    assert len(simulated) == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_cell_is_computed_again(tmp_path, simulated, damage):
    def go():
        return lab.compare(toy_services(), TOY, [lab.Temporal()], folder=tmp_path, **QUICK)

    first = go()
    victim = sorted(tmp_path.glob("*.json"))[1]
    text = victim.read_text()
    digit = text.index("0.", text.index("slo_attainment"))
    broken = {"cut": text[:-40], "changed": text[:digit] + "1." + text[digit + 2 :], "empty": "", "other": "[1, 2]"}
    victim.write_text(broken[damage])
    pd.testing.assert_frame_equal(go(), first)
    assert len(simulated) == 4, "three, and one again"
    assert victim.read_text() == text


def test_an_interrupted_comparison_goes_on(tmp_path, simulated, monkeypatch):
    counting = trials.simulate

    def interrupted(*arguments):
        if len(simulated) == 4:
            raise KeyboardInterrupt
        return counting(*arguments)

    monkeypatch.setattr(trials, "simulate", interrupted)
    arguments = (toy_services(), TOY, [lab.Temporal()], (0.5, 1.0))
    with pytest.raises(KeyboardInterrupt):
        lab.compare(*arguments, folder=tmp_path, **QUICK)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(trials, "simulate", counting)
    lab.compare(*arguments, folder=tmp_path, **QUICK)
    assert len(simulated) == 6


@pytest.mark.slow
def test_processes_give_the_same_table(tmp_path):
    arguments = (toy_services(3), TOY, [OneByOne(), lab.DStack(reject=True)], (0.5, 1.0))
    serial = lab.compare(*arguments, admission="one rule", **QUICK)
    parallel = lab.compare(*arguments, admission="one rule", jobs=2, folder=tmp_path, **QUICK)
    pd.testing.assert_frame_equal(parallel, serial)
    assert len(list(tmp_path.iterdir())) == 18, "Temporal too, as the baseline"


def test_results_must_fit_a_table():
    with pytest.raises(ValueError, match=r"result x = \[1\]: must be a number"):
        run_cells(lambda: [{"x": [1]}], [()])


def test_progress_bar(capsys):
    lab.compare(toy_services(), TOY, [lab.Temporal()], progress=True, **QUICK)
    shown = capsys.readouterr().err
    assert "Comparing" in shown
    assert "3/3" in shown


# digests


def test_digest_tells_kinds_and_borders_apart():
    values = [1, 1.0, True, "1", b"1", None, (1,), [1], {1}, {1: 1}, np.array([1]), np.array([1.0]), ("ab", "c"), ("a", "bc")]
    values += [0.1, 0.1 + 2**-56, lab.Poisson(1), lab.Deterministic(1), TOY, profile(small=(1.0, 0.5, 40.0))]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(np.arange(6).reshape(2, 3)) != digest(np.arange(6).reshape(3, 2))
    assert digest(profile(small=(1.0, 0.5, 40.0))) == digest(profile(small=(1.0, 0.5, 40.0)))
    assert digest(toy_services()) == digest(toy_services())


def defined(source, name="f"):
    space = {"__name__": "notebook"}
    exec(source, space)
    return space[name]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return x + 1", "def f(x): return x + 2"),
        ("def f(x): return x.min()", "def f(x): return x.max()"),
        ("def f(x=1): return x", "def f(x=2): return x"),
        ("rate = 1\ndef f(): return rate", "rate = 2\ndef f(): return rate"),
        ("def g(): return 1\ndef f(): return g()", "def g(): return 2\ndef f(): return g()"),
        ("def make(n):\n def f(): return n\n return f\nf = make(1)", "def make(n):\n def f(): return n\n return f\nf = make(2)"),
        ("class f:\n def go(self): return 1", "class f:\n def go(self): return 2"),
        ("class f:\n limit = 1", "class f:\n limit = 2"),
        ("from functools import partial as p\nf = p(max, 1)", "from functools import partial as p\nf = p(max, 2)"),
    ],
)
def test_digest_follows_code(one, other):
    assert digest(defined(one)) == digest(defined("\n\n" + one)), "where it stands does not matter"
    assert digest(defined(one)) != digest(defined(other))


def test_digest_of_what_refers_to_itself():
    again = "def f(n): return n and f(n - 1)"
    assert digest(defined(again)) == digest(defined(again))
    base = "class g:\n def go(self): return 1\nclass f(g):\n def go(self): return super().go()"
    assert digest(defined(base)) == digest(defined(base))
    assert digest(defined(base)()) != digest(defined(base.replace("return 1", "return 2"))())


def test_digest_is_the_same_in_another_process():
    code = "import dstack_lab as lab; from dstack_lab.digests import digest\n"
    code += "print(digest({'a', 'b', 'c'}, lab.DStack(), lab.Poisson(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest({"a", "b", "c"}, lab.DStack(), lab.Poisson(3))


def test_what_has_no_content(tmp_path):
    with open(tmp_path / "file", "w") as file, pytest.raises(ValueError, match="folder=None"):
        digest(file)


# sweeps


def test_sweep_is_a_grid():
    table = lab.sweep(lambda a, b: 10 * a + b, a=[1, 2], b=(3, 4))
    assert table.to_dict("list") == {"a": [1, 1, 2, 2], "b": [3, 4, 3, 4], "value": [13, 14, 23, 24]}


def test_what_a_swept_function_may_return():
    plan = lab.optimize(toy_services(), TOY)
    traces = lab.sweep(lambda policy: lab.simulate(plan, policy, 200), policy=[lab.Temporal(), lab.DStack()])
    assert traces["policy"].tolist() == ["Temporal"] * 3 + ["DStack"] * 3
    assert traces["service"].tolist() == ["small", "large", "all"] * 2
    framed = lab.sweep(lambda load: lab.bound(toy_services(load), TOY), load=[1])
    assert framed["bound_rps"].tolist() == pytest.approx([300, 100, 400])
    mapped = lab.sweep(lambda who: {"x": np.float64(who.patience), "y": np.True_}, who={"calm": lab.DStack(patience=0.5)})
    assert mapped.to_dict("list") == {"who": ["calm"], "x": [0.5], "y": [True]}


def test_sweep_remembers(tmp_path):
    log = tmp_path / "log"

    def go(text, grid):
        f = defined(f"def f(a):\n with open({str(log)!r}, 'a') as file: file.write('x')\n return {text}")
        return lab.sweep(f, a=grid, folder=tmp_path / "cells")["value"].tolist()

    assert go("a / 3", [1, 2]) == [1 / 3, 2 / 3]
    assert go("a / 3", [2, 1, 5]) == [2 / 3, 1 / 3, 5 / 3]
    assert len(log.read_text()) == 3, "only the new point"
    assert go("a / 4", [1]) == [1 / 4]
    assert len(log.read_text()) == 4, "another function"


# the highest load

ONE = pd.DataFrame([{"model": "m", "batch": 1, "gpu_pct": g, "service_ms": 4.0} for g in (50.0, 100.0)])
ALONE = lab.Profile(ONE, SIMULATED)


def highest(policy, services, **changed):
    """Where only the whole GPU is granted and a request takes 4 ms of it: load 1 is about 250 requests/s."""
    return lab.max_load(policy, services, ALONE, shares=[100], **changed)


def unit_rps():
    """Rate at load 1; the GPU% model smooths the 4 ms a little."""
    return 100_000 / lab.bound(lone(lab.Poisson(1)), ALONE, [100]).area_pct_ms[0]


def lone(arrivals, slo_ms=16.0):
    return [lab.Service("m", slo_ms, arrivals)]


def md1_waits_at_most(services, load):
    """P(wait <= `services` service times) of an M/D/1 queue (Erlang 1909)."""
    terms = (
        (load * (k - services)) ** k / math.factorial(k) * math.exp(-load * (k - services)) for k in range(int(services) + 1)
    )
    return (1 - load) * sum(terms)


def test_highest_load_of_an_md1_queue():
    """A request is in time if it waits at most SLO less service time: three service times."""
    exact = max(x for x in np.arange(0.2, 0.95, 0.0005) if md1_waits_at_most(3.0, x) >= 0.99)
    found = highest(lab.Temporal(), lone(lab.Poisson(1)), duration_ms=60_000, seeds=(0, 1, 2, 3))
    assert found.load == pytest.approx(exact, abs=0.03)
    assert found.rates_rps["m"] == pytest.approx(unit_rps() * found.load)
    assert 0 < found.bracket[1] - found.bracket[0] <= 0.01
    assert found.attained >= 0.99


def test_highest_load_without_chance_is_the_bound():
    found = highest(lab.Temporal(), lone(lab.Deterministic(3)), duration_ms=20_000, seeds=(0,), tolerance=0.002)
    assert found.load == pytest.approx(1, abs=0.004)


def test_highest_load_of_a_known_capacity():
    found = highest(Refuses(above_rps=100), lone(lab.Deterministic(7)), seeds=(0,), tolerance=0.001)
    low, fails = found.bracket
    assert low * unit_rps() <= 100 < fails * unit_rps()
    assert fails - low <= 0.001
    assert found.evaluations[-1].note.startswith("asked for")
    assert found.sustained == found.load
    assert "Refuses keeps 0.99 of every service's requests within SLO up to load 0.398 of the bound (m " in str(found)
    assert "fails: asked for" in str(found)
    assert found.to_frame()["max_load"].tolist() == [found.load]


def test_a_gap_below_the_highest_load_is_told():
    """A policy that fails somewhere in the middle is not judged by that alone, but it is said."""
    whole, gap = (highest(p, lone(lab.Deterministic(7)), seeds=(0,)) for p in (lab.Temporal(), Refuses(70, 80)))
    assert gap.load == whole.load == whole.sustained
    assert gap.sustained == 0.2
    assert "; so does, below it, 0.3 (asked for 75.3" in str(gap)
    assert "below it" not in str(whole)


def test_all_or_nothing():
    never = highest(DropsAll(), lone(lab.Poisson(1)), duration_ms=2000, seeds=(0,))
    assert (never.load, never.rates_rps) == (0, {"m": 0})
    assert math.isnan(never.attained)
    assert "at no load tried" in str(never)
    always = highest(lab.Temporal(), lone(lab.Poisson(1)), high=0.2, duration_ms=2000, seeds=(0,))
    assert always.load == 0.2
    assert math.isnan(always.bracket[1])
    assert "no load up to 0.2 fails" in str(always)


def test_doubtful_loads_get_more_seeds(simulated):
    def runs(in_time):
        return pd.DataFrame({"seed": [0, 1], "service": "m", "requests": 1000, "in_time": in_time})

    assert capacity._close(runs([980, 1000]), 0.99)
    assert capacity._close(runs([975, 995]), 0.99)
    assert not capacity._close(runs([900, 910]), 0.99)
    assert not capacity._close(runs([1000, 1000]), 0.99)
    found = highest(lab.Temporal(), lone(lab.Poisson(1)), duration_ms=2000, seeds=(0, 1))
    assert 2 * len(found.evaluations) < len(simulated) <= 4 * len(found.evaluations)


def test_every_service_must_hold():
    """The sum of services may keep 99 % while one of them does not."""
    services = [*lone(lab.Poisson(90)), lab.Service("m", 8.5, lab.Poisson(10), "tight")]
    found = highest(OneByOne(), services, duration_ms=4000)
    assert next(e for e in found.evaluations if e.load == found.bracket[1]).worst == "tight"
    assert found.load < highest(OneByOne(), lone(lab.Poisson(90)), duration_ms=4000).load


def test_loads_tried_are_kept(tmp_path, simulated):
    arguments = (lab.Temporal(), lone(lab.Poisson(1)))
    first = highest(*arguments, duration_ms=1000, folder=tmp_path)
    count = len(simulated)
    assert highest(*arguments, duration_ms=1000, folder=tmp_path) == first
    assert len(simulated) == count
    assert {json.loads(path.read_text())["format"] for path in tmp_path.iterdir()} == {"dstack_lab cell 1"}


# bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: lab.workload("C-9", TOY), "name = 'C-9': must be one of C-2, C-3, C-4, C-7"),
        (lambda: lab.workload("C-2", TOY), "model of resnet50 = 'resnet50': must be one of large, small"),
        (lambda: lab.workload("C-2", TOY, load=0), "load = 0: must be a finite number above 0"),
        (lambda: lab.workload("C-2", TOY, split="fair"), "split = 'fair'"),
        (lambda: lab.workload("C-2", TOY, arrivals="rare"), "arrivals = 'rare'"),
        (lambda: lab.scaled(toy_services(), -1), "factor = -1"),
        (lambda: lab.compare(toy_services(), TOY, []), r"policies = \[\]: must be 1 or more"),
        (lambda: lab.compare(toy_services(), TOY, ["DStack"]), "policies = 'DStack': must be Policy objects"),
        (lambda: lab.compare(toy_services(), TOY, [OneByOne(), OneByOne()]), "names of policies = .* must be distinct"),
        (lambda: lab.compare(toy_services(), TOY, loads=[]), r"loads = \[\]"),
        (lambda: lab.compare(toy_services(), TOY, loads=[0]), "loads = 0: must be a finite number above 0"),
        (lambda: lab.compare(toy_services(), TOY, seeds=[1, 1]), r"seeds = \(1, 1\): must be 1 or more, each listed once"),
        (lambda: lab.compare(toy_services(), TOY, seeds=[-1]), "seeds = -1"),
        (lambda: lab.compare(toy_services(), TOY, admission="none"), "admission = 'none'"),
        (lambda: lab.compare(toy_services(), TOY, baseline="Best"), "baseline = 'Best'"),
        (lambda: lab.compare(toy_services(), TOY, jobs=0), "jobs = 0: must be an integer, 1 or more, or -1"),
        (lambda: lab.sweep(lambda: 1), "grids"),
        (lambda: lab.sweep(lambda a: 1, a=[]), r"a = \[\]"),
        (lambda: lab.sweep(lambda a: 1, a=[lab.DStack(), lab.DStack()]), "a mapping names them"),
        (lambda: lab.sweep(lambda a: {"a": 1}, a=[1]), r"columns of the result = \['a'\]"),
        (lambda: lab.max_load("DStack", toy_services(), TOY), "policy = 'DStack'"),
        (lambda: lab.max_load(lab.Temporal(), toy_services(), TOY, attainment=1), "attainment = 1"),
        (lambda: lab.max_load(lab.Temporal(), toy_services(), TOY, high=0.05), "high = 0.05"),
        (
            lambda: highest(lab.Temporal(), lone(lab.Deterministic(1)), duration_ms=1),
            "no request of m came at load 0.1",
        ),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_policy_that_breaks_a_rule_stops_the_comparison():
    class Wrong(lab.Policy):
        def decide(self, state):
            return [lab.Launch("nobody", 100, 1)]

    with pytest.raises(lab.PolicyError, match="Wrong at 0"):
        lab.compare(toy_services(), TOY, [Wrong()], **QUICK)
