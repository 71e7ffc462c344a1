"""What holds for every run in slots: nothing idles, nothing is lost, and what is given up is given up for something."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from slot_builders import Keeps, asks, check_never_idle, cut, takes

import dstack_lab as lab
from dstack_lab.policies.slots import cut as give_up

TICKS = st.lists(st.integers(0, 120), min_size=1, max_size=40).map(lambda ticks: [t / 2 for t in sorted(ticks)])
SOME = st.lists(
    st.tuples(st.integers(5, 60), TICKS, st.integers(1, 5), st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=3
)


@settings(max_examples=100, deadline=None)
@given(
    some=SOME,
    count=st.sampled_from([1, 2, 3, 4, 7]),
    copies=st.integers(1, 4),
    room=st.sampled_from([100.0, 60.0]),
    drop=st.booleans(),
    fair=st.booleans(),
)
def test_nothing_idles_while_somebody_waits_who_may_begin(some, count, copies, room, drop, fair):
    """All are answered, nobody has more copies or the greedy more room than allowed, and none idles else."""
    made = asks(**{f"s{i}": (slo, came, takes(ms, item, most)) for i, (slo, came, ms, item, most) in enumerate(some)})
    room = max(room, 100 / count)
    greedy = (room < 100,) + (False,) * (len(some) - 1)
    trace = lab.simulate(made, Keeps(cut(made, count, copies, greedy=greedy, greedy_pct=room), drop=drop, fair=fair), 300)
    assert trace.requests["outcome"].isin(["served", "dropped"] if drop else ["served"]).all()
    check_never_idle(trace, count, [min(copies, int(room * count / 100 + 1e-6)) if g else copies for g in greedy])


@settings(max_examples=60, deadline=None)
@given(some=SOME, count=st.integers(1, 4), worth=st.sampled_from([1.02, 1.1, 2.0]))
def test_who_may_give_up_is_never_late(some, count, worth):
    """What is launched is in time, where times are as expected."""
    made = asks(**{f"s{i}": (slo, came, takes(ms, item, most)) for i, (slo, came, ms, item, most) in enumerate(some)})
    requests = lab.simulate(made, Keeps(cut(made, count, worth=worth), drop=True), 300).requests
    slo_ms = requests["service"].map({s.name: s.slo_ms for s in made.services}).astype(float)
    took = (requests["finish_ms"] - requests["arrival_ms"])[requests["outcome"] == "served"]
    assert (took <= slo_ms[took.index]).all()


@settings(max_examples=200, deadline=None)
@given(
    times=st.lists(st.integers(1, 30), min_size=1, max_size=6).map(sorted),
    slack=st.lists(st.integers(-5, 40), min_size=1, max_size=12).map(sorted),
    worth=st.sampled_from([1.0, 1.25]),
)
def test_giving_up_beside_brute_force(times, slack, worth):
    """Until all that is left is in time. What is chosen is faster than giving up less, and not much slower than more."""
    ways = {}
    for lost in range(len(slack)):
        rest = min(len(times), len(slack) - lost)
        fits = [batch for batch in range(1, rest + 1) if times[batch - 1] <= slack[lost]]
        if fits:
            ways[lost] = (fits[-1], fits[-1] / times[fits[-1] - 1])
            if fits[-1] == rest:
                break
    lost, batch = give_up([0, *times], len(slack), 0, slack.__getitem__, worth)
    if not ways:
        assert (lost, batch) == (len(slack), 0)
        return
    assert batch == ways[lost][0]
    for other, (_, per_ms) in ways.items():
        if other < lost:
            assert per_ms < ways[lost][1]
        else:
            assert per_ms <= worth * ways[lost][1] * (1 + 1e-9)
