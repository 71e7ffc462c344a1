"""The CPU as a device: a share is a set of cores that no other worker uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dstack_lab.checks import count, percent, require
from dstack_lab.devices import host
from dstack_lab.devices.leases import CoreLeases
from dstack_lab.devices.process import WorkerProcess

#: Above these the machine counts as oversubscribed.
PRESSURE_LIMIT_PCT = 10.0
LOAD_LIMIT = 1.5
STEAL_LIMIT_PCT = 2.0

#: A share this close to a grantable one is that one: 33.3 is a third.
ROUNDING_PCT = 0.05


@dataclass(frozen=True, slots=True)
class Cpu:
    """Cores of this machine, shared out in disjoint sets: GPU% = 100 x cores / all cores.

    Memory bandwidth and the last cache level stay shared, as they do on a GPU.

    Parameters
    ----------
    cores : tuple of int, optional
        Logical CPUs to share out; by default all that this process may run on, at the time of
        each call.
    oversubscribe : bool
        Let shares held at the same time sum to more than 100, as `policies.Uncontrolled` and `policies.Triton`
        do: their core sets meet then.

    Notes
    -----
    Whole physical cores are handed out. Of two hyperthreads of one core, one computes and the
    other is left idle, so that no two shares meet inside a core.
    """

    cores: tuple[int, ...] | None = None
    oversubscribe: bool = False

    name: ClassVar[str] = "cpu"
    mechanism: ClassVar[str] = "core sets"

    def __post_init__(self) -> None:
        if self.cores is not None:
            cores = tuple(count("core", core, least=0) for core in self.cores)
            require(len(cores) > 0 and len(set(cores)) == len(cores), "cores", self.cores, "1 or more different CPU numbers")
            object.__setattr__(self, "cores", tuple(sorted(cores)))
        require(isinstance(self.oversubscribe, bool), "oversubscribe", self.oversubscribe, "True or False")

    def slots(self, root: Path = Path("/")) -> tuple[int, ...]:
        """One logical CPU of each physical core that can be handed out.

        Raises
        ------
        ValueError
            If this process may not run on one of `cores`.
        """
        return tuple(group[0] for group in self._groups(root))

    def _groups(self, root: Path) -> tuple[tuple[int, ...], ...]:
        usable = host.usable_cores()
        if self.cores is not None:
            require(set(self.cores) <= set(usable), "cores", self.cores, f"among the cores this process may use, {usable}")
        return host.core_groups(self.cores or usable, root)

    def shares(self) -> tuple[float, ...]:
        """GPU% that can be granted, in rising order, rounded to 2 decimals."""
        n = len(self.slots())
        return tuple(round(100 * k / n, 2) for k in range(1, n + 1))

    def cores_for(self, gpu_pct: float) -> int:
        """Return the number of cores that `gpu_pct` is.

        Raises
        ------
        ValueError
            If it is not a whole number of cores; the message names the nearest shares that are.
        """
        gpu_pct, shares = percent("gpu_pct", gpu_pct), self.shares()
        for k, share in enumerate(shares, 1):
            if abs(share - gpu_pct) <= ROUNDING_PCT:
                return k
        below = [s for s in shares if s < gpu_pct][-1:]
        above = [s for s in shares if s > gpu_pct][:1]
        nearest = " or ".join(f"{s:g}" for s in below + above)
        require(False, "gpu_pct", gpu_pct, f"a share {len(shares)} cores can grant: nearest {nearest}")
        raise AssertionError

    def split(self, *gpu_pcts: float) -> tuple[tuple[int, ...], ...]:
        """Disjoint sets of cores for shares that are held at the same time.

        Raises
        ------
        ValueError
            If a share cannot be granted, or together they are more than all cores.
        """
        free, numbers = self.slots(), [self.cores_for(share) for share in gpu_pcts]
        require(sum(numbers) <= len(free), "sum of gpu_pct", sum(gpu_pcts), "100 or less for shares held at the same time")
        ends = [sum(numbers[: i + 1]) for i in range(len(numbers))]
        return tuple(free[end - k : end] for end, k in zip(ends, numbers, strict=True))

    def start(
        self,
        model: str,
        gpu_pct: float,
        cores: Sequence[int] | None = None,
        *,
        batches: Sequence[int] = (),
        weights: str | None = None,
        seed: int = 0,
        memory_mib: float | None = None,
    ) -> WorkerProcess:
        """Start a worker on its cores and return at once; `WorkerProcess.wait_ready` waits for it.

        Parameters
        ----------
        model : str
            A name of `dstack_lab.zoo`, or one's own network.
        gpu_pct : float
            Share [%] of all cores.
        cores : sequence of int, optional
            Which cores, as many as the share is (see `split`); by default the first ones.
        batches : sequence of int
            Batches to warm up before it says ready.
        weights : str, optional
            ``"DEFAULT"`` for trained weights.
        seed : int
            Of weights and inputs.
        memory_mib : float, optional
            MiB that serving may allocate beyond the loaded network.

        Raises
        ------
        ValueError
            If the share cannot be granted or `cores` do not fit it.
        """
        k = self.cores_for(gpu_pct)
        slots = self.slots()
        cores = slots[:k] if cores is None else tuple(cores)
        require(set(cores) <= set(slots) and len(set(cores)) == len(cores) == k, "cores", cores, f"{k} different ones of {slots}")
        return WorkerProcess(
            model, gpu_pct, threads=k, cores=cores, batches=batches, weights=weights, seed=seed, memory_mib=memory_mib
        )

    def leases(self) -> CoreLeases:
        """Who computes on which cores, for one run."""
        return CoreLeases(self.slots(), self.oversubscribe)

    def describe(self) -> str:
        """Name of the processor and number of cores: ``"AMD EPYC, 2 cores"``."""
        n = len(self.slots())
        return f"{host.cpu_name()}, {n} core{'s' if n > 1 else ''}"

    def marks(self, root: Path = Path("/")) -> tuple[str, ...]:
        """Reservations about numbers recorded here and now, each as ``"kind: sentence"``."""
        groups = self._groups(root)
        n, logical = len(groups), sum(map(len, groups))
        quota, pressure = host.quota_cores(root), host.pressure_pct(root)
        load, steal = host.load_per_core(root), host.steal_pct(root)
        found = []
        if n < 2:
            found.append("one core: only the share 100 exists; nothing can be shared in space")
        if quota is not None and quota < n:
            found.append(f"core quota: {quota:g} cores' worth of time on {n} cores; shares are throttled in time, not space")
        if logical > n:
            found.append(f"hyperthreads: {logical} logical CPUs are {n} cores; one thread of each core is used")
        if pressure is not None and pressure > PRESSURE_LIMIT_PCT:
            found.append(
                f"oversubscribed: processes waited for a core {pressure:g} % of the time (limit {PRESSURE_LIMIT_PCT:g} %)"
            )
        elif load is not None and load > LOAD_LIMIT:
            found.append(f"oversubscribed: {load:.1f} processes per core (limit {LOAD_LIMIT:g})")
        if steal is not None and steal > STEAL_LIMIT_PCT:
            found.append(f"stolen time: the hypervisor took {steal:.1f} % of busy time (limit {STEAL_LIMIT_PCT:g} %)")
        if self.oversubscribe:
            found.append("oversubscribed shares: core sets held at the same time may meet")
        return tuple(found)
