"""Who has which place on the palette: a network or a policy looks the same in every figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dstack_lab.workloads import WORKLOADS

#: Okabe-Ito without the two that vanish on one background: blue, orange, green, vermillion, sky blue, purple; and wine,
#: which stays further from these than they from each other, with all kinds of colour vision.
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

    Known names sit first, each on its own place if nobody in the figure has that colour; the others take the first free
    place of a colour that is used least. So no two share a colour while one is free.

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
    free, used = list(range(len(asked) + len(_OWN))), Counter[int]()
    found: dict[str, int] = {}
    for name in sorted(asked, key=lambda name: _OWN.get(name, len(_OWN))):
        found[name] = min(free, key=lambda place: (used[place % len(COLORS)], place != _OWN.get(name), place))
        free.remove(found[name])
        used[found[name] % len(COLORS)] += 1
    return {name: found[name] for name in asked}
