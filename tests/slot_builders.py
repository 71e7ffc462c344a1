"""Slots as a test wants them, a policy that follows them, and what holds for every run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from builders import plan

import dstack_lab as lab
from dstack_lab.policies.slots import SlotKeeper, Slots
from dstack_lab.services import ServiceTable


class Keeps(lab.Policy):
    """Follows slots as they are given."""

    def __init__(self, slots: Slots, drop: bool = False, fair: bool = True, copies: int | None = None) -> None:
        self.slots, self.drop, self.fair, self.most = slots, drop, fair, copies

    def reset(self, plan):
        self.keeper = SlotKeeper(plan, self.slots, self.drop, self.fair, self.most)
        self.needs_pct = self.keeper.needs_pct

    def wait_ms(self, allocation, slo_ms):
        return self.slots.wait_part * slo_ms

    def decide(self, state):
        return self.keeper.decide(state)


def cut(plan: lab.Plan, count: int, copies: int | tuple[int, ...] = 9, **changes) -> Slots:
    """Equal slots; any field may be given."""
    n = len(plan.services)
    fields = {
        "services": tuple(s.name for s in plan.services),
        "count": count,
        "gpu_pct": (100 / count,) * n,
        "copies": copies if isinstance(copies, tuple) else (copies,) * n,
        "greedy": (False,) * n,
        "greedy_pct": 100.0,
        "wait_part": 0.0,
        "worth": 1.02,
        "slowdown": (1.0,) * n,
    }
    return Slots(**{**fields, **changes})


def takes(fixed: float, per_item: float = 0.0, most: int = 1) -> ServiceTable:
    """Takes fixed + batch · per_item [ms], whatever the share; batches of 1 to `most`."""
    return ServiceTable(np.repeat((fixed + per_item * np.arange(1, most + 1))[:, None], 100, axis=1))


def asks(full: int = 1, **services: tuple[float, list[float], ServiceTable]) -> lab.Plan:
    """Plan from name=(SLO, arrivals, service times); a batch is full with `full` requests."""
    return plan(*[(name, slo, lab.Replay(came), 25.0, full, times) for name, (slo, came, times) in services.items()])


def check_never_idle(trace: lab.Trace, count: int, copies: Sequence[int], wait_ms: float = 0.0) -> int:
    """No slot is idle while somebody waits who may use it; return how many were taken at once, at most."""
    requests, launches = trace.requests[trace.requests["outcome"] == "served"], trace.launches
    starts, ends, who = (launches[c].to_numpy() for c in ("start_ms", "end_ms", "service"))
    most = 0
    for now in np.unique([*starts, *ends]):
        running = (starts <= now) & (now < ends)
        most = max(most, running.sum())
        waits = requests[(requests["arrival_ms"] + wait_ms < now + 1e-6) & (requests["start_ms"] > now)]
        for name, limit in zip(trace.services["service"], copies, strict=True):
            mine = running[who == name].sum()
            assert mine <= limit
            if running.sum() < count and (waits["service"] == name).any():
                assert mine == limit
    assert most <= count
    return most
