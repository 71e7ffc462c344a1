"""What a policy is: a plain object that reads a `GpuState` and returns decisions."""

from __future__ import annotations

from collections.abc import Sequence

from dstack_lab.services import Allocation, Plan
from dstack_lab.state import Drop, GpuState, Launch, Running, ServiceView, Wake

__all__ = ["Decision", "Drop", "GpuState", "Launch", "Policy", "Running", "ServiceView", "Wake"]

Decision = Launch | Drop | Wake


class Policy:
    """Base of all policies; override `decide`, the rest has defaults.

    `decide` is called only when something can change: a batch ended, a batch became ready (full, or
    its oldest request waited as long as `wait_ms` says), a requested `Wake`, and, with
    ``every_arrival = True``, an arrival. A policy may keep what it learns in itself; `reset` is
    called at the start of every run. In a real run nothing is launched while `decide` thinks: what takes
    long goes through `GpuState.apart`.

    Examples
    --------
    First come, first served, one request at a time on the whole GPU:

    >>> class Fifo(Policy):
    ...     def decide(self, state):
    ...         waiting = [s for s in state.services if s.ready]
    ...         if waiting and state.free_pct == 100:
    ...             oldest = min(waiting, key=lambda s: s.oldest_arrival_ms)
    ...             return [Launch(oldest.name, 100, 1)]
    ...         return []
    """

    every_arrival = False  #: also call `decide` at each arrival: slower, rarely needed
    needs_pct = 0.0  #: do not call `decide` for a batch that became ready while less than this is free
    oversubscribes = False  #: launches may hold more than 100 GPU% together
    works_apart = False  #: a real run starts a process for what is given to `GpuState.apart`; else that holds up launches

    @property
    def name(self) -> str:
        """Name in tables and figures."""
        return type(self).__name__

    def reset(self, plan: Plan) -> None:
        """Prepare for a run of `plan`; called once at its start."""

    def wait_ms(self, allocation: Allocation, slo_ms: float) -> float:
        """How long the oldest request may wait for its batch to fill before it counts as ready [ms]."""
        return 0.0

    def decide(self, state: GpuState) -> Sequence[Decision]:
        """Return what to do now; an empty list waits for the next change.

        An answer that breaks a rule (more GPU% than is free, a batch above the queue, turns at one instant
        without end) or an exception stops the run with a `PolicyError`, which holds the trace so far.
        """
        raise NotImplementedError(f"{self.name}.decide")

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """GPU% that `decide` may use for each service: a real device prepares workers for these."""
        return {a.service: tuple(sorted({a.gpu_pct, plan.shares[-1]})) for a in plan.allocations}

    def first_shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Those of `shares` to prepare before a run; a worker for another one starts when it is first asked for."""
        return self.shares(plan)

    def copies(self, plan: Plan) -> int:
        """Launches of one service at one share that may run at once: a real device prepares as many workers.

        Those that do not fit on the GPU beside each other are not prepared. One launch more stops a run on a device.
        """
        return 1
