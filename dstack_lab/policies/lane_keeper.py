"""Shared lanes at run time: in each idle lane the service that has to begin first begins, or had least of the lane."""

from __future__ import annotations

from collections.abc import Mapping

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Wake
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.shared_lanes import SLACK, SharedLanes
from dstack_lab.services import Allocation


class LaneKeeper:
    """Keeps every lane busy with the service that has to begin first.

    Parameters
    ----------
    shared : SharedLanes
    drop : bool
        Give up requests that are lost, as each lane says.
    factors : mapping of str to float, optional
        Time alone over the predicted one, by service, that the lanes were made for; 1 by default.
    """

    def __init__(self, shared: SharedLanes, drop: bool, factors: Mapping[str, float] | None = None) -> None:
        self.shared, self.drop = shared, drop
        self.needs_pct = min(lane.gpu_pct for lane in shared.lanes) - SLACK
        known = factors or {}
        pairs = [(p.service, s) for lane in shared.lanes for p, s in zip(lane.points, lane.slowdown, strict=True)]
        self._slow = {name: slow * known.get(name, 1.0) for name, slow in pairs}

        self._served = [Scoreboard([p.service for p in ln.points], ln.fair_ms) if ln.fair_ms else None for ln in shared.lanes]

    @property
    def points(self) -> dict[str, Allocation]:
        """Largest batch of each service, its share and how long it takes beside the others."""
        return {point.service: point for lane in self.shared.lanes for point in lane.points}

    def decide(self, state: GpuState) -> list[Decision]:
        """Give up what is lost, else begin in every lane that is idle."""
        if self.drop and (lost := self._lost(state)):
            return [*lost, Wake(state.now_ms)]
        launches: list[Decision] = []
        free = state.free_pct + SLACK
        for lane, served in zip(self.shared.lanes, self._served, strict=True):
            if lane.gpu_pct > free or any(state[p.service].in_flight for p in lane.points):
                continue
            waiting = []
            for point in lane.points:
                view = state[point.service]
                if view.ready and (batch := view.queued(point.batch)):
                    takes = self._slow[view.name] * view.service_ms(batch, lane.gpu_pct)
                    first = view.due_ms - takes if served is None else served.received[view.name]
                    waiting.append((first, view.index, Launch(view.name, lane.gpu_pct, batch, "planned"), takes))
            if waiting:
                _, _, launch, takes = min(waiting)
                if served is not None:
                    served.add(state.now_ms, launch.service, takes)
                launches.append(launch)
                free -= lane.gpu_pct
        return launches

    def _lost(self, state: GpuState) -> list[Decision]:
        found: list[Decision] = []
        for lane in self.shared.lanes:
            for point in lane.points:
                view = state[point.service]
                takes = self._slow[view.name] * view.service_ms(max(1, int(lane.hopeless * point.batch)), lane.gpu_pct)
                if view.oldest_deadline_ms < state.now_ms + takes and (lost := view.late(takes)):
                    found.append(Drop(view.name, lost))
        return found
