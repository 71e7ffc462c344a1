"""A run of slots without an engine is what the engine does: who is late, and how late on average."""

from __future__ import annotations

import numpy as np
import pytest
from builders import plan
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_builders import Keeps, cut, takes

import dstack_lab as lab
from dstack_lab.policies.slot_plan import _Planner
from dstack_lab.policies.slot_trial import Rider, late_in_slots
from dstack_lab.policies.slots import Slots
from dstack_lab.services import ServiceTable


def rider(came: list[float], slo_ms: float, *times: float, gpu_pct: float = 100.0, full: int = 1, wait_ms: float = 0.0) -> Rider:
    """Who is alone, or one of a few in one slot; service times of a batch of 1, 2 and so on."""
    return Rider(came, slo_ms, gpu_pct, 9, False, [0.0, *times], full, wait_ms)


class TestByHand:
    def test_who_has_to_begin_first_begins(self):
        """a has to begin by 6, b by 7: a until 4 and until 8, then b until 13, a ms late. It waited 4/10, 8/10, 13/12."""
        a, b = rider([0.0, 0.0], 10, 4), rider([0.0], 12, 5)
        late, latency = late_in_slots([a, b], 1.02, drop=False)
        assert late == [0, 1]
        assert latency == pytest.approx((0.4 + 0.8 + 13 / 12) / 3)
        late, latency = late_in_slots([a, b], 1.02, drop=True)  # given up at 8, when 5 ms no longer reach 12
        assert late == [0, 1]
        assert latency == pytest.approx(0.6)
        assert late_in_slots([a._replace(times=[0, 4, 5]), b], 1.02, drop=False)[0] == [0, 0]  # to 5, then to 10

    def test_giving_up_early_saves_the_others(self):
        """Two come at 0, due at 5, in batches of one of 4 ms. Serving the lost one makes that of 4 ms late as well."""
        crowd = rider([0.0, 0.0, 4.0], 5, 4)
        assert late_in_slots([crowd], 1.02, drop=False)[0] == [2]  # ends at 4, 8 and 12
        assert late_in_slots([crowd], 1.02, drop=True)[0] == [1]  # 0 to 4, one given up, 4 to 8
        halves = crowd._replace(gpu_pct=50.0)
        assert late_in_slots([halves], 1.02, drop=False)[0] == [0]  # two slots

    def test_who_has_to_begin_now_is_not_late_yet(self):
        """At 10 x has to begin, y should have by 5: y until 15, then x until 20, due at 15."""
        assert late_in_slots([rider([3.0], 12, 5), rider([0.0] * 3, 10, 5)], 1.02, drop=False)[0] == [1, 1]

    def test_sums_that_round_are_not_late(self):
        """Three times 0.1 ms is more than 0.3 by a hair."""
        assert late_in_slots([rider([0.0] * 3, 0.3, 0.1)], 1.02, drop=False)[0] == [0]

    def test_nothing_asked_is_nothing_late(self):
        assert late_in_slots([rider([], 5, 4)], 1.02, drop=True) == ([0], 0.0)

    def test_what_never_begins_is_late(self):
        """A share wider than the room of the greedy."""
        assert late_in_slots([rider([0.0, 1.0], 5, 4)._replace(greedy=True)], 1.02, True, 60.0) == ([2], 0.0)


def compare(made: lab.Plan, slots: Slots, drop: bool) -> list[float]:
    """Check a trial on the requests of `made` against the engine; return the late part of each service."""
    planner = _Planner(made, drop, None)
    planner.arrivals = [list(s.arrivals.times_ms) for s in made.services]
    planner.span_ms = 1e9  # of all of them
    late, latency = planner.late(slots, 1.0)
    requests = lab.simulate(made, Keeps(slots, drop), 400).requests
    took = requests["finish_ms"] - requests["arrival_ms"]
    slo_ms = requests["service"].map({s.name: s.slo_ms for s in made.services}).astype(float)
    in_time = (took <= slo_ms + 1e-6) & (requests["outcome"] == "served")  # clocks count whole nanoseconds
    seen = 1 - in_time.groupby(requests["service"], observed=False).mean()
    assert late == pytest.approx([seen.get(s.name, 0.0) for s in made.services], abs=1e-12)
    served = requests["outcome"] == "served"
    assert latency == pytest.approx((took / slo_ms)[served].mean() if served.any() else 0.0, abs=1e-6)
    return list(late)


#: In 64ths of a ms both clocks are exact, so that ties are ties in both.
GRID = 64
ARRIVALS = st.lists(st.integers(0, 150), min_size=1, max_size=120).map(lambda ms: [float(t) for t in sorted(ms)])
SERVICES = st.tuples(
    st.integers(5, 60),
    ARRIVALS,
    st.lists(st.integers(GRID // 2, 12 * GRID), min_size=1, max_size=8).map(sorted),
    st.integers(1, 8),  # a batch is full
    st.sampled_from([20.0, 25.0, 100 / 3, 100 / 7, 50.0, 100.0]),
    st.booleans(),  # greedy
    st.integers(1, 4),  # copies
)


@settings(max_examples=200, deadline=None)
@given(
    some=st.lists(SERVICES, min_size=1, max_size=4),
    drop=st.booleans(),
    wait_part=st.sampled_from([0.0, 0.125, 0.5]),
    worth=st.sampled_from([1.02, 1.5]),
    room=st.sampled_from([100.0, 60.0]),
)
def test_a_trial_is_what_the_engine_does(some, drop, wait_part, worth, room):
    points = []
    for i, (slo, came, times, full, _, _, _) in enumerate(some):
        table = ServiceTable(np.repeat(np.array(times)[:, None] / GRID, 100, axis=1))
        slo = max(slo, times[0] / GRID)  # else no share is enough for it
        points.append((f"s{i}", slo, lab.Replay(came), 20.0, min(full, len(times)), table))
    made = plan(*points)
    shares, greedy, copies = (tuple(one[k] for one in some) for k in (4, 5, 6))
    room = max(room, *shares)  # all are answered
    compare(
        made, cut(made, 1, gpu_pct=shares, greedy=greedy, copies=copies, wait_part=wait_part, worth=worth, greedy_pct=room), drop
    )


@pytest.mark.parametrize("seed", range(12))
def test_where_times_do_not_round_either(seed):
    """The engine rounds each launch to a nanosecond: after hundreds in a row it is still the same requests."""
    rng = np.random.default_rng(seed)
    names, drop, count = "abc"[: 1 + seed % 3], bool(seed % 2), int(rng.integers(1, 6))
    points = []
    for name in names:
        times = np.sort(rng.uniform(0.5, 1.0, 8)) * (1 + np.arange(8) * rng.uniform(0.1, 0.6))
        came = np.unique(rng.integers(0, 400, int(rng.integers(100, 900)))).astype(float)
        table = ServiceTable(np.repeat(times[:, None], 100, axis=1))
        points.append((name, int(rng.integers(5, 30)), lab.Replay(came), 20.0, int(rng.integers(1, 8)), table))
    made = plan(*points)
    slots = cut(made, count, copies=int(rng.integers(1, 4)), wait_part=rng.choice([0.0, 0.1, 0.3]))
    compare(made, slots, drop)


def test_lateness_is_seen_at_all():
    """The same check, where a part is late: neither side calls all or none late."""
    made = plan(("a", 10, lab.Replay(np.arange(400) / 2), 20.0, 1, takes(6.5, most=2)))
    for drop in (False, True):
        (late,) = compare(made, cut(made, 3), drop)
        assert 0.05 < late < 1
