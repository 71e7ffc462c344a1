"""Slots at run time: each rule of `SlotKeeper` as a log small enough to check by hand."""

from __future__ import annotations

import pytest
from slot_builders import Keeps, asks, cut, takes

import dstack_lab as lab
from dstack_lab.policies.slots import Slots

#: Of b and c only.
CALM = ["0-4 c1@33.33", "4-8 c1@33.33", "8-20 b1@33.33"]
CROWDED = ["0-4 c1@33.33", "4-16 b1@33.33", "16-20 c1@33.33"]


def run(made: lab.Plan, slots: Slots, **how) -> lab.Trace:
    return lab.simulate(made, Keeps(slots, **how), 300)


def log(trace: lab.Trace) -> str:
    """``start-end service batch@GPU%`` of each launch; then who gave up how many."""
    rows = trace.launches[["start_ms", "end_ms", "service", "batch", "gpu_pct"]].itertuples(index=False)
    launches = ", ".join(f"{start:.6g}-{end:.6g} {name}{batch}@{share:.4g}" for start, end, name, batch, share in rows)
    lost = trace.requests.loc[trace.requests["outcome"] == "dropped", "service"].value_counts()
    return launches + "".join(f"; {name} gave up {n}" for name, n in sorted(lost.items()) if n)


class TestWhere:
    def test_any_service_in_any_slot_and_a_hot_one_in_several(self):
        """a takes three of four slots, which are its copies, b one; at 10 a takes three again, though a fourth is free."""
        made = asks(a=(40, [0.0] * 6, takes(10)), b=(60, [0.0], takes(10)))
        first = "0-10 a1@25, 0-10 b1@25, 0-10 a1@25, 0-10 a1@25"
        assert log(run(made, cut(made, 4, copies=3))) == f"{first}, 10-20 a1@25, 10-20 a1@25, 10-20 a1@25"

    def test_fewer_copies_than_planned(self):
        """A device that prepared two workers is asked for no third."""
        made = asks(a=(99, [0.0] * 5, takes(10)))
        found = log(run(made, cut(made, 4, copies=3), copies=2))
        assert found == "0-10 a1@25, 0-10 a1@25, 10-20 a1@25, 10-20 a1@25, 20-30 a1@25"
        assert found == log(run(made, cut(made, 4, copies=2), copies=3))

    def test_a_queue_longer_than_the_largest_batch_begins_in_two_slots_at_one_instant(self):
        made = asks(a=(50, [0.0] * 7, takes(10, most=4)))
        assert log(run(made, cut(made, 2))) == "0-10 a4@50, 0-10 a3@50"
        assert log(run(made, cut(made, 1))) == "0-10 a4@100, 10-20 a3@100"

    @pytest.mark.parametrize(
        ("slo_a", "rows"),
        [
            (100, "0-10 a1@25, 0-10 a1@25, 10-20 b1@75, 10-20 a1@25"),  # b has to begin by 11, a's third by 92
            (12, "0-10 a1@25, 0-10 a1@25, 2-12 a1@25, 10-20 b1@75"),  # a's third by 4
        ],
    )
    def test_who_comes_first_and_does_not_fit_is_waited_for(self, slo_a, rows):
        """b needs 75 %, and 50 are free from 0 to 10: a would fit at 2."""
        made = asks(a=(slo_a, [0, 0, 2], takes(10)), b=(20, [1], takes(10)))
        assert log(run(made, cut(made, 4, gpu_pct=(25.0, 75.0)))) == rows

    def test_the_greedy_leave_room(self):
        """Two of four slots are for g; at 2 it is g's turn, but b begins, for whom the others are kept."""
        made = asks(g=(15, [0.0] * 4, takes(10)), b=(60, [0, 2, 3], takes(10)))
        free, kept = (log(run(made, cut(made, 4, greedy=(True, False), greedy_pct=pct))) for pct in (100, 50))
        assert free == ("0-10 g1@25, 0-10 b1@25, 0-10 g1@25, 0-10 g1@25, 10-20 g1@25, 10-20 b1@25, 10-20 b1@25")
        assert kept == ("0-10 g1@25, 0-10 b1@25, 0-10 g1@25, 2-12 b1@25, 10-20 g1@25, 10-20 b1@25, 10-20 g1@25")


class TestWhen:
    def test_who_has_to_begin_first_begins(self):
        """a is due at 40 and takes 10 ms, b at 45 and 30: b has to begin by 15, a by 30."""
        made = asks(a=(40, [0], takes(10)), b=(45, [0], takes(30)))
        assert log(run(made, cut(made, 1))) == "0-30 b1@100, 30-40 a1@100"

    def test_all_that_waits_is_what_has_to_begin(self):
        """One request of a could begin by 30; its five take 30 ms and have to by 10, before b by 15."""
        made = asks(a=(40, [0.0] * 5, takes(5, 5, most=5)), b=(45, [0], takes(30)))
        assert log(run(made, cut(made, 1))) == "0-30 a5@100, 30-60 b1@100"

    def test_who_should_have_begun_already_goes_by_what_it_received(self):
        """At 10 a should have begun by 5, b by 8; a has received 1000 GPU%·ms, b nothing, and 500 at 15."""
        made = asks(a=(10, [0.0] * 4, takes(5)), b=(12, [1, 1], takes(5)))
        order = {
            fair: [row.split()[1][0] for row in log(run(made, cut(made, 1), fair=fair)).split(", ")] for fair in (True, False)
        }
        assert order == {True: [*"aabbaa"], False: [*"aaaabb"]}

    @pytest.mark.parametrize(("at", "order"), [(170, "azba"), (220, "azab")])
    def test_what_was_received_is_forgotten_after_ten_periods(self, at, order):
        """Periods are 20 ms. a received 500 GPU%·ms at 0; 40 ms after `at` both should have begun, and of equals a is first."""
        made = asks(a=(20, [0, at + 1], takes(5)), b=(20, [at + 1], takes(5)), z=(20, [at], takes(40)))
        trace = run(made, cut(made, 1))
        assert [*trace.launches["service"]] == [*order]

    def test_what_is_received_is_share_times_time(self):
        """At 15 both should have begun. a has received 25 % for 10 ms, b 100 % for 5."""
        made = asks(a=(12, [5, 6], takes(10)), b=(12, [0, 6], takes(5)))
        found = log(run(made, cut(made, 4, copies=1, gpu_pct=(25.0, 100.0))))
        assert found == "0-5 b1@100, 5-15 a1@25, 15-25 a1@25, 25-30 b1@100"

    def test_who_has_to_begin_now_is_not_late_yet(self):
        """At 10 x has to begin, and y should have by 5: y goes first, though x received nothing."""
        made = asks(x=(12, [3], takes(5)), y=(10, [0.0] * 3, takes(5)))
        assert log(run(made, cut(made, 1))) == "0-5 y1@100, 5-10 y1@100, 10-15 y1@100, 15-20 x1@100"

    @pytest.mark.parametrize(("greedy", "h_ms", "rows"), [(False, 30, CALM), (True, 30, CROWDED), (True, 12, CALM)])
    def test_in_a_crowd_who_cannot_wait_for_the_next_end_counts_as_late(self, greedy, h_ms, rows):
        """At 4 c has to begin by 13, b by 19; a slot is free, the next one at 20 or, after h, at 12.

        Beyond the bound neither can wait for 20, and b, which received nothing, goes first.
        """
        made = asks(g=(99, [0], takes(20)), b=(30, [1], takes(12)), c=(16, [0, 1], takes(4)), h=(99, [0], takes(h_ms)))
        trace = run(made, cut(made, 3, greedy=(greedy, False, False, False)))
        assert [row for row in log(trace).split(", ") if row.split()[1][0] in "bc"] == rows

    def test_a_batch_that_is_not_full_waits_for_company(self):
        """A tenth of 100 ms: the request at 0 begins at 10 with that of 3; four are full at 50; one alone at 110."""
        made = asks(full=4, a=(100, [0, 3, 47, 48, 49, 50, 100], takes(2, most=8)))
        assert log(run(made, cut(made, 2, wait_part=0.1))) == "10-12 a2@50, 50-52 a4@50, 110-112 a1@50"
        assert log(run(made, cut(made, 2))).startswith("0-2 a1@50, 3-5 a1@50")

    def test_an_empty_queue_is_an_idle_gpu(self):
        made = asks(a=(50, [5, 100], takes(10)))
        assert log(run(made, cut(made, 2))) == "5-15 a1@50, 100-110 a1@50"


class TestHowMany:
    """A batch of b takes 2 + b ms, so 8 are in time within 10 ms."""

    def test_most_of_what_waits_is_launched_and_the_rest_beside_it(self):
        made = asks(a=(10, [0.0] * 10, takes(2, 1, most=16)))
        for drop in (True, False):
            assert log(run(made, cut(made, 2), drop=drop)) == "0-10 a8@50, 0-4 a2@50"  # 8 of 10 are enough

    def test_if_that_is_little_all_are_launched_unless_some_may_be_given_up(self):
        """8 of 11 are less than four fifths. All came together: who gives up none, serves 8 in 10 ms."""
        made = asks(a=(10, [0.0] * 11, takes(2, 1, most=16)))
        assert log(run(made, cut(made, 2), drop=False)) == "0-13 a11@50"
        assert log(run(made, cut(made, 2), drop=True)) == "0-10 a8@50, 0-5 a3@50"
        assert log(run(made, cut(made, 1), drop=True)) == "0-10 a8@100; a gave up 3"

    @pytest.mark.parametrize(
        ("worth", "drop", "rows"),
        [
            (1.02, True, "12-18 a8@50; a gave up 12"),
            (1.21, True, "12-16.5 a5@50, 16.5-22.5 a8@50; a gave up 7"),  # 1.33 a ms are not worth 1.21 · 1.11
            (1.02, False, "12-24 a20@50"),
        ],
    )
    def test_the_oldest_are_given_up_until_the_rest_is_served_fastest(self, worth, drop, rows):
        """Both slots are taken until 12. Then 12 of a's requests have 4.5 ms left, and 8 have 14 ms.

        A batch takes 2 ms and 0.5 ms a request. As long as one of the 12 is in it, 5 fit: 5 in 4.5 ms are 1.11 a ms.
        Without them all 8 are in time: 8 in 6 ms are 1.33 a ms.
        """
        times = takes(2, 0.5, most=20)
        made = asks(a=(16, [0.0] * 20 + [0.5] * 12 + [10.0] * 8, times), b=(200, [0.0] * 20, times))
        trace = run(made, cut(made, 2, copies=1, worth=worth), drop=drop)
        assert log(trace) == f"0-12 a20@50, 0-12 b20@50, {rows}"
        given_up = trace.requests[trace.requests["outcome"] == "dropped"]
        assert (given_up["arrival_ms"] == 0.5).all()  # the oldest

    def test_whose_time_is_over_is_given_up_without_a_launch(self):
        """At 10 b has 5 ms left, and a's request of 5 has 7: the GPU idles until that of 21 comes."""
        made = asks(a=(12, [0, 5, 21], takes(10)), b=(15, [0], takes(10)))
        assert log(run(made, cut(made, 1), drop=True)) == "0-10 a1@100, 21-31 a1@100; a gave up 1; b gave up 1"
