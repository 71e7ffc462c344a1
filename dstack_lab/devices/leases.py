"""Who may compute where: hands cores to the workers that are running a batch."""

from __future__ import annotations

from collections.abc import Sequence

from dstack_lab.devices.process import WorkerProcess


class CoreLeases:
    """Disjoint core sets for the launches of one run.

    A worker keeps the cores it had last if they are free: moving threads costs time and warm caches.

    Parameters
    ----------
    slots : sequence of int
        Cores to hand out.
    oversubscribe : bool
        Hand out a core again while it is held, those first that the fewest hold.
    """

    def __init__(self, slots: Sequence[int], oversubscribe: bool = False) -> None:
        self._users = dict.fromkeys(slots, 0)
        self._order = {core: i for i, core in enumerate(slots)}
        self._oversubscribe = oversubscribe
        self._held: dict[int, tuple[int, ...]] = {}  # by process

    def take(self, worker: WorkerProcess) -> None:
        """Give `worker` as many cores as it has threads, for itself alone unless they are oversubscribed.

        Raises
        ------
        RuntimeError
            If it holds some already, or too few are free.
        """
        if worker.pid in self._held:
            raise RuntimeError(f"{worker!r} holds cores already")
        last = set(worker.cores or ())
        free = [core for core, users in self._users.items() if not users or self._oversubscribe]
        order = sorted(free, key=lambda core: (self._users[core], core not in last, self._order[core]))
        cores = tuple(sorted(order[: worker.threads]))
        if len(cores) < worker.threads:
            raise RuntimeError(f"{worker!r} needs {worker.threads} cores, {len(free)} are free")
        if set(cores) != last:
            worker.pin(cores)
        for core in cores:
            self._users[core] += 1
        self._held[worker.pid] = cores

    def give(self, worker: WorkerProcess) -> None:
        """Take the cores back; a worker without any is fine."""
        for core in self._held.pop(worker.pid, ()):
            self._users[core] -= 1
