"""Notes of launches: a kernel writes `PLANNED` or `OPPORTUNISTIC`, a trace codes them in the order of their first use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PLANNED, OPPORTUNISTIC = 1, 2
NOTES = ("", "planned", "opportunistic")


def coded(note: NDArray[np.int8]) -> list[str]:
    """Recode in place; return the notes by code."""
    used = [code for code in (PLANNED, OPPORTUNISTIC) if (note == code).any()]
    if note.size and note[0] == OPPORTUNISTIC:
        np.subtract(PLANNED + OPPORTUNISTIC, note, out=note)
        used.reverse()
    return ["", *(NOTES[code] for code in used)]
