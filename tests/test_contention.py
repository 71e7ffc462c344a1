"""What launches cost each other: by hand, as conservation laws, and against published measurements."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.bounds import service_tables
from dstack_lab.contention import Contention, Load
from dstack_lab.policies import Drop, Launch, Policy
from dstack_lab.services import ServiceTable

QUIET = Contention(slowdown=0)  # only the turns that kernels take


def load(ms: float, knee: float = 100.0, batch: int = 1) -> Load:
    times = ServiceTable(ms * np.maximum(1, knee / np.arange(1.0, 101))[None, :])
    return Load(times, batch, 100.0, ms, knee)


class TestStretch:
    def test_alone_nothing_is_felt(self):
        assert Contention().stretch([]) == []
        assert Contention().stretch([load(5)]) == [1]

    def test_the_whole_gpu_is_taken_in_turns(self):
        """Four that each fill the GPU take as long as all four in a row, and end together."""
        loads = [load(ms) for ms in (4, 2, 6, 14)]
        assert [s * x.service_ms for s, x in zip(QUIET.stretch(loads), loads, strict=True)] == pytest.approx([26] * 4)

    def test_what_fits_side_by_side_takes_no_turns(self):
        assert QUIET.stretch([load(4, 50), load(9, 50)]) == [1, 1]
        assert QUIET.stretch([load(4, 60), load(4, 60)]) == pytest.approx([4 / 3, 4 / 3])  # 20 of the other's 60 do not fit

    def test_a_small_one_hardly_disturbs_a_large_one(self):
        large, small = QUIET.stretch([load(10, 100), load(10, 1)])
        assert large == pytest.approx(1.01)
        assert small == pytest.approx(2)  # its kernels wait for the large one's, one by one

    def test_the_longer_of_two_is_felt_more(self):
        short, long = Contention().stretch([load(1, 50), load(16, 50)])
        assert short == pytest.approx(1 + 0.096 * 16**0.1)
        assert long == pytest.approx(1 + 0.096 / 16**0.1)

    def test_proportional_sharing_runs_each_at_a_smaller_share(self):
        """Knees of 100 and 60: the second gets 60 · 100 / 160 = 37.5 %, so it takes 1.6 times as long."""
        assert Contention(0, sharing="proportional").stretch([load(4, 100), load(4, 60)]) == pytest.approx([1.6, 1.6], rel=0.01)
        many = [load(1, 100)] * 300  # a third of a GPU% each
        assert Contention(0, sharing="proportional").stretch(many) == pytest.approx([300] * 300)

    @given(
        works=st.lists(st.tuples(st.floats(0.1, 100), st.floats(1, 100)), min_size=1, max_size=8),
        sharing=st.sampled_from(["turns", "proportional"]),
    )
    def test_never_faster_than_alone_and_never_more_than_the_gpu(self, works, sharing):
        loads = [load(ms, knee) for ms, knee in works]
        stretch = Contention(sharing=sharing).stretch(loads)
        assert all(s >= 1 - 1e-9 for s in stretch)
        used = sum(x.knee_pct / s for x, s in zip(loads, stretch, strict=True))
        assert used <= 100 + (0.5 if sharing == "proportional" else 1e-6)  # tables interpolate between whole GPU%

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"slowdown": -1}, "slowdown = -1"),
            ({"exponent": float("nan")}, "exponent"),
            ({"sharing": "fair"}, "sharing = 'fair'"),
        ],
    )
    def test_bad_constants_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Contention(**arguments)


class AllAtOnce(Policy):
    """Every service as soon as it waits, on the whole GPU."""

    oversubscribes = True

    def decide(self, state):
        return [Launch(s.name, 100, s.queued(s.batch)) for s in state.services if s.ready and not s.in_flight]


WHOLE = ServiceTable(np.where(np.arange(1, 101) < 100, 20.0, 10.0)[None, :])  # one request: 10 ms on the whole GPU, else 20


def two(first: list[float], second: list[float]):
    return plan(("a", 100, lab.Replay(first), 100.0, 1, WHOLE), ("b", 100, lab.Replay(second), 100.0, 1, WHOLE))


def ends(trace: lab.Trace) -> list[tuple]:
    rows = trace.launches[["service", "start_ms", "end_ms"]]
    return [(name, start, pytest.approx(end, abs=1e-5)) for name, start, end in rows.itertuples(index=False)]


class TestEngine:
    def test_ends_move_when_another_starts_and_when_it_ends(self):
        """a runs alone for 4 ms; then both at half speed until a's other 6 ms are done at 16; b ends at 20."""
        trace = lab.simulate(two([0], [4]), AllAtOnce(), 100, contention=QUIET)
        assert ends(trace) == [("a", 0, 16), ("b", 4, 20)]
        assert trace.launches["gpu_pct"].tolist() == pytest.approx([62.5, 62.5])  # 10 ms of the GPU in 16
        assert lab.summary(trace)["utilization"].iloc[-1] == pytest.approx(0.2)  # 20 of 100 ms, not 32

    def test_a_third_that_comes_while_two_run(self):
        three = plan(*[(n, 100, lab.Replay([t]), 100.0, 1, WHOLE) for n, t in (("a", 0.0), ("b", 0.0), ("c", 6.0))])
        # a and b: 3 ms done at 6, then a third of the speed each: 7 ms take 21. c: 7 at 27, then alone.
        assert ends(lab.simulate(three, AllAtOnce(), 100, contention=QUIET)) == [("a", 0, 27), ("b", 0, 27), ("c", 6, 30)]

    def test_by_default_only_for_those_that_oversubscribe(self):
        both = two([0], [0])
        assert lab.simulate(both, AllAtOnce(), 100).launches["end_ms"].max() == pytest.approx(20 * 1.096, abs=1e-5)
        halves = plan(*[(n, 100, lab.Replay([0.0]), 50.0, 1, WHOLE) for n in "ab"])

        class Halves(Policy):
            def decide(self, state):
                return [Launch(s.name, 50, 1) for s in state.services if s.ready and not s.in_flight]

        assert lab.simulate(halves, Halves(), 100).launches["end_ms"].tolist() == [20, 20]
        slowed = lab.simulate(halves, Halves(), 100, contention=Contention()).launches
        assert slowed["end_ms"].tolist() == pytest.approx([20 * 1.096] * 2, abs=1e-5)
        assert slowed["gpu_pct"].tolist() == [50, 50]  # a share that was granted stays that share

    def test_a_policy_is_asked_though_nothing_is_free(self):
        """The second service becomes ready while the first holds 100 GPU%."""
        assert lab.simulate(two([0], [5]), AllAtOnce(), 100).launches["start_ms"].tolist() == [0, 5]

    def test_nobody_beside_it_changes_nothing(self):
        """Contention costs a policy that runs one batch at a time not a nanosecond."""
        both = plan(("a", 50, lab.Poisson(100), 50.0, 4, table()), ("b", 50, lab.Gamma(80, 2), 50.0, 4, table()))
        for variability in (None, lab.Lognormal(0.3)):
            alone, beside = (
                lab.simulate(both, lab.Temporal(), 3000, 1, variability, contention) for contention in (None, Contention())
            )
            assert beside.requests.equals(alone.requests)
            assert beside.launches.equals(alone.launches)

    @pytest.mark.parametrize(
        ("launch", "message"),
        [
            (Launch("a", 101, 1), "gpu_pct must be from 1 to"),
            (Launch("a", float("nan"), 1), "gpu_pct must be from 1 to"),
            (Launch("z", 100, 1), "service must be one of"),
            (Launch("a", 100, 2), "batch must be"),
        ],
    )
    def test_oversubscribing_lifts_only_the_limit_on_the_sum(self, launch, message):
        class Greedy(Policy):
            oversubscribes = True

            def decide(self, state):
                return [Launch("b", 100, 1), launch] if state["b"].waiting else []

        with pytest.raises(lab.PolicyError, match=f"Greedy at 1.000000 ms: .*{message}") as caught:
            lab.simulate(two([0], [1]), Greedy(), 10)
        assert len(caught.value.trace.requests) == 2

    def test_contention_is_checked(self):
        with pytest.raises(ValueError, match=r"contention = True: must be None or Contention\(\)"):
            lab.simulate(two([0], [1]), AllAtOnce(), 10, contention=True)


class WildTogether(Policy):
    """Senseless decisions that ask for several times the GPU, several launches of one service among them."""

    oversubscribes = True

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def reset(self, plan):
        self.rng = np.random.default_rng(self.seed)

    def decide(self, state):
        decisions: list = []
        for service in state.services:
            waiting = service.waiting
            if waiting and self.rng.random() < 0.1:
                decisions.append(Drop(service.name, 1 + int(self.rng.integers(waiting))))
            elif waiting and service.in_flight < 3:
                batch = 1 + int(self.rng.integers(min(waiting, service.batch_max)))
                decisions.append(Launch(service.name, float(self.rng.choice([1, 33.3, 50, 100])), batch))
        return decisions


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    sharing=st.sampled_from(["turns", "proportional"]),
    cv=st.sampled_from([None, 0.5]),
    rates=st.lists(st.floats(10, 300), min_size=1, max_size=4),
)
def test_conservation(seed, sharing, cv, rates):
    """Every request is served or dropped once; nothing is faster than alone; no more than the GPU is ever used."""
    asked = plan(*[(f"s{i}", 80, lab.Poisson(r), 50.0, 3, table(1 + i, 0.5, 20 + 25 * i, 6)) for i, r in enumerate(rates)])
    variability = None if cv is None else lab.Lognormal(cv)
    trace, again = (
        lab.simulate(asked, WildTogether(seed), 300, seed, variability, Contention(sharing=sharing)) for _ in range(2)
    )
    assert again.launches.equals(trace.launches)
    requests, launches = trace.requests, trace.launches
    served = requests[requests["outcome"] == "served"]
    assert served.groupby("launch").size().to_dict() == launches.set_index("launch")["batch"].to_dict()
    assert (served["start_ms"] >= served["arrival_ms"]).all()
    unserved = requests[requests["outcome"] == "unserved"]
    assert unserved.empty or not set(unserved["arrival_ms"]) & set(served["arrival_ms"])
    lasted = launches["end_ms"] - launches["start_ms"]
    if cv is None:
        whole = [asked.tables[int(row.service[1:])].at(row.batch, 100) for row in launches.itertuples()]
        assert (lasted >= np.array(whole) - 1e-5).all()
    used = (lasted * launches["gpu_pct"]).sum()
    if len(launches):
        assert used <= 100.5 * (launches["end_ms"].max() - launches["start_ms"].min())


def test_slowdown_of_published_pairs(shared_data):
    """Both sides of 750 pairs on disjoint shares of a V100: the median error is at most 5 points, and below a constant's."""
    pairs = pd.read_csv(shared_data / "v100_igniter_pairs.csv")
    errors, constant = [], []
    for row in pairs.itertuples():
        alone = (row.solo_latency1_ms, row.solo_latency2_ms)
        loads = [load(ms, share) for ms, share in zip(alone, (row.gpu_pct1, row.gpu_pct2), strict=True)]
        measured = np.array([row.latency1_ms, row.latency2_ms]) / alone
        errors.extend(abs(measured - Contention().stretch(loads)))
        constant.extend(abs(measured - 1.09))
    assert np.median(errors) <= 0.025
    assert np.median(errors) < 0.9 * np.median(constant)
    assert np.quantile(errors, 0.95) <= 0.10


#: The published logs of four networks on a V100, about 1,600 images/s offered to each: SLO [ms]; images/s and batch under
#: default MPS; images/s under GSLICE and its slices [GPU%].
LOGS = {
    "alexnet": (25, 520, 13, 1394, 40.0),
    "mobilenet": (25, 110, 3, 460, 10.0),
    "resnet50": (25, 25, 1, 256, 25.0),
    "vgg19": (26, 36, 1, 13, 25.0),
}


@pytest.fixture(scope="module")
def four_networks(shared_data) -> lab.Plan:
    """With the batches of the log, from a profile fitted to solo times of the same engines."""
    rows = pd.read_csv(shared_data / "v100_gslice_authors.csv")
    rows = rows[
        rows["set"].isin(["mobilenet", "optim_nov26_netml"]) & rows["model"].str.endswith("_trt") & (rows["gpu_pct"] >= 10)
    ]
    rows = rows.assign(model=rows["model"].str.removesuffix("_trt"), service_ms=rows["median_latency_ms"])
    services = [lab.Service(name, slo, lab.Poisson(1600)) for name, (slo, *_) in LOGS.items()]
    profile = lab.Profile(rows[["model", "batch", "gpu_pct", "service_ms"]], lab.Provenance("measured", "V100", "mps"))
    tables = service_tables(services, profile)
    points = [(s.name, s.slo_ms, s.arrivals, LOGS[s.name][4], LOGS[s.name][2], t) for s, t in zip(services, tables, strict=True)]
    return plan(*points, shares=(10.0, 25.0, 40.0, 100.0))


def images_per_s(trace: lab.Trace) -> pd.Series:
    """By network, while requests arrive."""
    done = trace.requests[trace.requests["finish_ms"] <= trace.duration_ms]
    return done["service"].value_counts() * 1000 / trace.duration_ms


def test_four_networks_under_default_mps(four_networks):
    """The law of turns, at the batches of the log. Learnt batches stay too small: see the benchmark."""
    rates = images_per_s(lab.simulate(four_networks, lab.Uncontrolled("plan"), 10_000, seed=1))
    assert rates.sum() == pytest.approx(691, rel=0.25)
    assert all(rates[name] == pytest.approx(seen, rel=0.25) for name, (_, seen, *_) in LOGS.items())
    proportional = lab.simulate(
        four_networks, lab.Uncontrolled("plan"), 10_000, seed=1, contention=Contention(sharing="proportional")
    )
    assert images_per_s(proportional).sum() > 2 * 691  # why it is not the default


def test_four_networks_in_slices(four_networks):
    """GSLICE, batches learnt; vgg19 ran another, three times slower engine in the log at batch 1."""
    policy = lab.Gslice({name: share for name, (*_, share) in LOGS.items()}, resize=False)
    rates = images_per_s(lab.simulate(four_networks, policy, 10_000, seed=1, contention=Contention()))
    assert rates.sum() == pytest.approx(2123, rel=0.25)
    assert all(rates[name] == pytest.approx(LOGS[name][3], rel=0.25) for name in ("alexnet", "mobilenet", "resnet50"))
