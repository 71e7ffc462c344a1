"""Planners that another process can import: slow, failing and dying ones. They stand in for `cut_slots`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from dstack_lab.policies.slot_plan import cut_slots

#: Environment variable that names a file: "dies_once" has died if it is there.
MARK = "DSTACK_LAB_TEST_MARK"


def sleeps(*asked):
    time.sleep(0.5)
    return cut_slots(*asked)


def fails(*_):
    raise KeyError("oops")


def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_once(*asked):
    mark = Path(os.environ[MARK])
    if not mark.exists():
        mark.touch()
        dies()
    return cut_slots(*asked)


class Untold(Exception):
    """Cannot be built from what it pickles as."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def raises_untold():
    raise Untold("one", "other")


def unpicklable():
    return lambda: 1
