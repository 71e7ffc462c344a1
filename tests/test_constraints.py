"""What binds at a point: by hand for each word, and against the definition in plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import table
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_lab.constraints import BINDINGS, EDGES, binding, broken_most, feasible, points, scores, verdicts
from dstack_lab.services import ServiceTable


def by_root(batch_max: int = 4) -> ServiceTable:
    """L = 10 b √(100/g): a request costs the same GPU time at any batch, and less at a smaller share."""
    batch, share = np.arange(1, batch_max + 1)[:, None], np.arange(1, 101)[None, :]
    return ServiceTable(10 * batch * np.sqrt(100 / share))


def in_proportion(batch_max: int = 4) -> ServiceTable:
    """L = 10 b · 100/g: it scales to the whole GPU."""
    batch, share = np.arange(1, batch_max + 1)[:, None], np.arange(1, 101)[None, :]
    return ServiceTable(10 * batch * 100 / share)


def best_point(times, shares, slo_ms, rate_rps, objective):
    """(score, batch, share) of the best feasible point."""
    value = np.where(feasible(times, shares, slo_ms, rate_rps), scores(times, shares, objective), 0)
    row, column = np.unravel_index(np.argmax(value), value.shape)
    return float(value[row, column]), int(row) + 1, shares[column]


@pytest.mark.parametrize(
    ("word", "times", "shares", "slo", "rate", "objective", "point"),
    [
        # L(b, 40) = 1 + b/2: 9 requests take 5.5 ms, twice that is 11; filling takes 5.3 ms, less than L
        ("SLO: wait", table(), (40.0,), 10, 1500, "capacity", (8, 40)),
        # a request every 5 ms: the third comes after 10 ms and then takes 2.5
        ("SLO: fill", table(), (40.0,), 10, 200, "capacity", (2, 40)),
        # L(1, 20) = 22.4 ms, more than the 20 ms between two requests
        ("rate", by_root(), (10.0, 20.0, 25.0, 50.0), 1000, 50, "capacity", (1, 25)),
        ("largest batch", table(batch_max=4), (40.0,), 100, 1000, "capacity", (4, 40)),
        ("smallest share", by_root(), (25.0, 50.0), 1000, 10, "capacity", (1, 25)),
        ("smallest share", by_root(), (1.0, 50.0), 1000, 1, "capacity", (1, 1)),
        ("largest share", in_proportion(), (25.0, 50.0), 1000, 10, "efficacy", (1, 50)),
        ("largest share", in_proportion(), (25.0, 100.0), 1000, 10, "efficacy", (1, 100)),
        # b / (1 + b/2)² is largest at 2, and more than 40 GPU% do not help
        ("none", table(), (20.0, 40.0, 60.0), 100, 1000, "efficacy", (2, 40)),
    ],
)
def test_each_word_by_hand(word, times, shares, slo, rate, objective, point):
    _, *found = best_point(times, shares, slo, rate, objective)
    assert tuple(found) == point
    assert binding(times, shares, slo, rate, *point, objective) == word


@pytest.mark.parametrize("share", [1.0, 40.0, 100.0])
def test_where_gpu_time_is_the_same_at_any_share_and_batch_nothing_binds(share):
    """Beyond 1 and 100 GPU% too, where the time goes on as it went."""
    assert binding(in_proportion(), (share,), 1e6, 1e-3, 1, share, "capacity") == "none"


def test_a_better_point_that_is_free_is_kept_away_by_the_others():
    assert binding(table(), (20.0, 40.0, 60.0), 100, 1000, 3, 40.0, "efficacy") == "GPU total"


def test_an_edge_does_not_bind_where_the_slo_would_stop_the_next_step_too():
    """Only 8 requests were profiled, but 9 would not make the SLO either."""
    assert binding(table(batch_max=8), (40.0,), 10, 1500, 8, 40.0, "capacity") == "SLO: wait"
    assert binding(table(batch_max=8), (40.0,), 100, 1500, 8, 40.0, "capacity") == "largest batch"


def test_of_two_broken_constraints_the_one_broken_most():
    """The second request fills the batch after 10 ms: with L = 2 that is 12 of 11; twice L is only 4."""
    assert binding(table(batch_max=2), (40.0,), 11, 100, 1, 40.0, "capacity") == "SLO: fill"
    # filling and waiting alike are too long, the wait more: 2 · 2 of 3.5, and 1.9 + 2 of 3.5
    assert binding(table(batch_max=2), (40.0,), 3.5, 1000 / 1.9, 1, 40.0, "capacity") == "SLO: wait"


@pytest.mark.parametrize("ms", [30.0, np.nextafter(30, 31), np.nextafter(30, 29), 30.3, 0.3 + 30])
def test_of_two_broken_alike_the_first_whatever_the_rounding(ms):
    """10 requests at 400/s come in 25 ms, half of the SLO: waiting and keeping up are always broken by the same part."""
    assert broken_most(ms, 10, 50, 400) == "SLO: wait"
    assert verdicts(np.full((10, 3), ms), np.arange(1.0, 11)[:, None], 50, 400)[-1].tolist() == [0, 0, 0]


def by_definition(times, shares, slo, rate, batch, share, objective):
    """The words that the definition allows: one, or several where equally near points are equally good."""

    def service_ms(b, g):
        if b > times.batch_max:
            last = service_ms(b - 1, g)
            return last + (max(0, last - service_ms(b - 2, g)) if b > 2 else 0)
        if g < 1:
            return times.at(b, 1) ** 2 / times.at(b, 2)
        return times.at(b, 100) ** 2 / times.at(b, 99) if g > 100 else times.at(b, g)

    def score(b, g):
        ms = service_ms(b, g)
        return b / (ms * g * (ms if objective == "efficacy" else 1))

    below = max(1, shares[0] - 1) if shares[0] > 1 else 0.5
    above = min(100, shares[-1] + 1) if shares[-1] < 100 else 10_000 / 99
    grid = [below, *shares, above]
    found = []
    for b, (k, g) in itertools.product(range(1, times.batch_max + 2), enumerate(grid)):
        if score(b, g) > score(batch, share) * (1 + 1e-9):
            ms, fill = service_ms(b, g), (b - 1) * 1000 / rate
            strain = {"SLO: wait": 2 * ms / slo, "SLO: fill": (fill + ms) / slo, "rate": rate * ms / 1000 / b}
            word = max(strain, key=strain.get)
            if strain[word] <= 1:
                outside = (b > times.batch_max, k == 0, k == len(grid) - 1)
                word = EDGES[outside.index(True)] if any(outside) else "GPU total"
            steps = abs(b - batch) + abs(k - 1 - shares.index(share))
            found.append((word != "GPU total", steps, -score(b, g), word))
    if not found:
        return {"none"}
    first = min(found)
    return {word for *key, word in found if key[:2] == list(first[:2]) and key[2] == pytest.approx(first[2])}


monotone_tables = st.builds(
    lambda fixed, item, knee, power, batch_max: ServiceTable(
        (fixed + item * np.arange(1, batch_max + 1)[:, None]) * np.maximum(1, knee / np.arange(1, 101)[None, :]) ** power
    ),
    *(st.floats(0.1, 10), st.floats(0.01, 5), st.floats(1, 150), st.floats(0.3, 1.5), st.integers(1, 12)),
)


@settings(max_examples=150, deadline=None)
@given(
    times=monotone_tables,
    shares=st.lists(st.floats(1, 100), min_size=1, max_size=5, unique=True).map(lambda s: tuple(sorted(s))),
    slo=st.floats(1, 500),
    rate=st.floats(0.1, 3000),
    objective=st.sampled_from(["efficacy", "capacity"]),
    data=st.data(),
)
def test_binding_follows_its_definition(times, shares, slo, rate, objective, data):
    """At the best point, and at any other, where the rest of the plan must have pushed the service."""
    value, batch, share = best_point(times, shares, slo, rate, objective)
    if value == 0 or data.draw(st.booleans()):
        batch, share = data.draw(st.integers(1, times.batch_max)), data.draw(st.sampled_from(shares))
    found = binding(times, shares, slo, rate, batch, share, objective)
    assert found in BINDINGS
    assert found in by_definition(times, shares, slo, rate, batch, share, objective)


@settings(max_examples=60, deadline=None)
@given(
    times=monotone_tables, slo=st.floats(1, 500), rate=st.floats(0.1, 3000), objective=st.sampled_from(["efficacy", "capacity"])
)
def test_nothing_binds_only_where_nothing_is_better(times, slo, rate, objective):
    shares = (10.0, 30.0, 60.0, 100.0)
    value, batch, share = best_point(times, shares, slo, rate, objective)
    if value > 0:
        found = binding(times, shares, slo, rate, batch, share, objective)
        free = float(scores(times, shares, objective).max())  # with neither SLO nor rate
        assert found != "GPU total"
        assert found != "none" or free == pytest.approx(value)


@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_points_are_those_of_the_table(shares):
    times = table(batch_max=3)
    ms, batch, share = points(times, shares)
    assert ms.tolist() == [[times.at(b, g) for g in shares] for b in (1, 2, 3)]
    assert batch.tolist() == [[1], [2], [3]]
    assert share.tolist() == [shares]


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="objective = 'best': must be one of"):
        binding(table(), (50.0,), 10, 1, 1, 50.0, "best")
