"""Who has which place on the palette: a network or a policy looks the same in every figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dstack_lab.workloads import WORKLOADS

#: Okabe-Ito without the two that vanish on one background: blue, orange, green, vermillion, sky blue, purple; and wine,
#: which stays further from these than they from each other, with all cones or without one kind.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#993366")

#: In the order of their places. The first seven keep theirs in every figure; one further on borrows a colour.
NETWORKS = tuple(WORKLOADS["C-7"])
POLICIES = (
    *("DStack", "Temporal", "Triton", "Gslice", "Gpulet", "Clipper", "MaxThroughput"),
    *("Ideal", "Uncontrolled", "Nexus", "MaxMin", "AdaptiveDStack"),
)
_OWN = {name: place for group in (NETWORKS, POLICIES) for place, name in enumerate(group)}


def places(names: Iterable[str]) -> dict[str, int]:
    """Give each name of a figure a place; its colour is that of the place, counted round.

    Known names take their own places while nobody else has the colour. The others then take their own, or else the first
    free place, of a colour that is used least: no two share a colour while one is free.

    Parameters
    ----------
    names : iterable of str
        Names in the figure; a name given twice counts once.

    Returns
    -------
    dict of str to int
        In the order given.
    """
    asked = dict.fromkeys(names)
    found: dict[str, int] = {}
    used = Counter[int]()
    free = list(range(len(asked) + len(_OWN)))

    def take(name: str, place: int) -> None:
        found[name] = place
        used[place % len(COLORS)] += 1
        free.remove(place)

    known = sorted(asked.keys() & _OWN.keys(), key=_OWN.__getitem__)
    for name in known:
        if not used[_OWN[name] % len(COLORS)]:
            take(name, _OWN[name])
    for name in [*known, *asked]:
        if name not in found:
            take(name, min(free, key=lambda place: (used[place % len(COLORS)], place != _OWN.get(name), place)))
    return {name: found[name] for name in asked}
