"""How does a policy schedule? Who held the GPU and when, launch by launch, with what came too late."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from dstack_lab import figures
from dstack_lab.figures.space import visible, window
from dstack_lab.metrics import summary
from dstack_lab.panels.base import Look
from dstack_lab.panels.racing import Policies, Racing, ran
from dstack_lab.profiles import DEFAULT_PROFILE, Profile
from dstack_lab.services import Service
from dstack_lab.traces import Trace


class ScheduleExplorer(Racing):
    """Timeline of a simulated run; zoom with the mouse or with the controls.

    Parameters
    ----------
    workload : str
        One of `lab.workload`'s.
    profile : Profile, str or path
        Or its name, as for `lab.load_profile`.
    policies : policies or mapping of str to Policy, optional
        To choose from, one's own classes too.
    duration_ms : float
        Of the run [ms].
    services : iterable of Service, optional
        One's own instead of the workload: their rates are scaled to the load.

    Attributes
    ----------
    policy, load, start_ms, span_ms, seed
        Controls. `load` is a part of the bound; `start_ms` and `span_ms` are the window that is drawn.
    trace : Trace or None
        The run that is shown.
    """

    def __init__(
        self,
        workload: str = "C-2",
        profile: Profile | str | os.PathLike[str] = DEFAULT_PROFILE,
        policies: Policies | None = None,
        duration_ms: float = 2000.0,
        services: Iterable[Service] | None = None,
    ) -> None:
        super().__init__(profile, policies, duration_ms, services)
        self.workload = workload
        self.trace: Trace | None = None
        self._key: Any = None
        end = self.duration_ms
        self.policy = self._choice("policy", "Policy", list(self.policies), "Who decides what runs when")
        self._add_load()
        self.start_ms = self._slider("start_ms", "From [ms]", 0.0, end, 0.0, "Where the picture begins", live=False)
        self.span_ms = self._slider(
            "span_ms", "Length [ms]", min(1.0, end), end, min(200.0, end), "How much is drawn", live=False
        )
        self._add_seed()
        self._begin()

    def _run(self) -> tuple[Trace | None, str]:
        """Simulate where anything but the window changed."""
        key = (self.policy.value, self.load.value, self.seed.value)
        if key != self._key:
            self.trace, self._trouble = ran(self._plan(self.workload), self.policies[key[0]], key[0], self.duration_ms, key[2])
            if self.trace is not None:
                self._sums = summary(self.trace).iloc[-1]
            self._key = key
        return self.trace, self._trouble

    def _look(self) -> Look:
        trace, trouble = self._run()
        if trace is None:
            raise ValueError(trouble)
        name, load = self.policy.value, self.load.value
        start = min(self.start_ms.value, self.duration_ms - 1e-3)
        view = window(trace, start, min(start + self.span_ms.value, max(self.duration_ms, start + 1e-3)))
        seen = visible(trace, view)
        late, attained, busy = (
            int((seen["late"] > 0).sum()),
            float(self._sums["slo_attainment"]),
            float(self._sums["utilization"]),
        )
        dense = len(seen) > figures.EXACT
        facts = {
            "policy": name,
            "load": round(load, 3),
            "seed": self.seed.value,
            "start_ms": round(view.start_ms, 3),
            "end_ms": round(view.end_ms, 3),
            "launches": len(trace.launches),
            "attainment": round(attained, 4),
            "utilization": round(busy, 3),
            "visible": len(seen),
            "late": late,
            "raster": dense,
        }
        words = (
            f"{name} at {load:g} of the bound: {len(trace.launches):,} launches in the run, {attained:.2%} of requests in time, "
            f"utilization {busy:.0%}. From {view.start_ms:,.4g} to {view.end_ms:,.4g} ms, {len(seen):,} launches, {late:,} of "
            f"them with late requests{', drawn as means' if dense else ''}."
        )
        at = (view.start_ms, view.end_ms)
        return Look(facts, words, figures.timeline(trace, *at), trouble)

    def _watch_figure(self, figure: go.FigureWidget) -> None:
        figure.layout.xaxis.on_change(self._zoomed, "range")

    def _zoomed(self, axis: Any, range_ms: tuple[float, float] | None) -> None:
        """Follow a reader who zoomed in the figure itself: the controls, then the picture."""
        if self._busy or range_ms is None:
            return
        low, high = sorted(float(t) for t in range_ms)
        low = min(max(low, 0.0), self.duration_ms - 1.0)
        self._busy = True
        try:
            self.start_ms.value, self.span_ms.value = low, min(max(high - low, 1.0), self.duration_ms - low)
        finally:
            self._busy = False
        self._redraw()
