"""Who may turn requests away: each policy as its system does, or all under one rule."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from dstack_lab.checks import require
from dstack_lab.policies.base import Decision, Drop, GpuState, Policy, Wake
from dstack_lab.services import Plan

STYLES = ("own", "one rule")
#: Parameters by which a policy itself gives up late requests.
SWITCHES = ("drop_late", "reject")


class _DropsLate(Policy):
    """Mixed into a policy that has no such switch: drops what could not be in time even alone on the whole GPU."""

    def reset(self, plan: Plan) -> None:
        self._whole_pct = plan.shares[-1]
        super().reset(plan)

    def decide(self, state: GpuState) -> Sequence[Decision]:
        late = [Drop(s.name, n) for s in state.services if (n := s.late(s.service_ms(1, self._whole_pct)))]
        return [*late, Wake(state.now_ms)] if late else super().decide(state)


def admitted(policy: Policy, style: str) -> Policy:
    """Return a copy of `policy` that turns requests away as `style` says.

    Parameters
    ----------
    policy : Policy
        Stays as it is.
    style : {"own", "one rule"}
        ``own``: as its system does: some never drop, some do. ``one rule``: every policy drops the requests
        that can no longer be in time, by its own switch (``drop_late``, ``reject``); a policy without one
        drops those that could not be even alone on the whole GPU.

    Raises
    ------
    ValueError
        If there is no such style.
    """
    require(style in STYLES, "admission", style, f"one of {STYLES}")
    other = copy.deepcopy(policy)
    if style == "own":
        return other
    switches = [name for name in SWITCHES if isinstance(getattr(other, name, ...), (bool, type(None)))]
    for name in switches:
        setattr(other, name, True)
    if not switches:
        kind = type(policy)
        # a subclass, not a wrapper: whatever an engine asks of the policy stays answered by it
        other.__class__ = type(kind.__name__, (_DropsLate, kind), {"__module__": kind.__module__})
    return other
