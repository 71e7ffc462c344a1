"""Green contexts as a device: a share is a set of SMs that no other share has.

Kernels of two processes run one after the other on a GPU, unless NVIDIA MPS serves both, and under
MPS a green context may spread over all the SMs of its client. So all networks of all services live
in ONE process here, the host (`green_host`), each with a thread. To the profiler, the runner and the
fleet each (service, share) is still a worker of its own (`green_process.GreenWorker`): a channel to
its thread. That process alone opens the GPU and cuts it, once (`green_ledger`); the parent knows how
it is cut (`layout_of`) and says with each request which groups it may use (`GroupLeases`). Changing a
share is choosing another channel, changing a place another CUDA graph (`green_graphs`): no process
starts, no parameter is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dstack_lab.checks import count, percent, require
from dstack_lab.devices import nvml
from dstack_lab.devices.green_driver import GreenError, Layout, layout_of
from dstack_lab.devices.green_ledger import Lease, SmLedger, pick
from dstack_lab.devices.green_process import GreenWorker
from dstack_lab.devices.green_smid import Proof, verify_disjoint
from dstack_lab.devices.nvml_sampler import Sampler

__all__ = ["Green", "GreenError", "GroupLeases", "Layout", "Lease", "Proof", "SmLedger", "pick", "verify_disjoint"]

PRECISIONS = ("fp16", "bf16", "fp32")

#: A share this close to a grantable one is that one.
ROUNDING_PCT = 0.05


class GroupLeases:
    """Disjoint groups for the launches of one run, kept by the parent.

    Parameters
    ----------
    groups : sequence of int
        SMs of each group.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self._all = set(range(len(groups)))
        #: A remainder smaller than a group makes no share, it only comes with all the others.
        self._small = {i for i in self._all if groups[i] < groups[0]}
        self._free = set(self._all)
        self._held: dict[int, tuple[int, ...]] = {}  # by worker: one process holds them all

    def take(self, worker: Any) -> None:
        """Give `worker` as many groups as its share is, those it has graphs for if they are free.

        Raises
        ------
        RuntimeError
            If it holds some already, or too few are free.
        """
        if id(worker) in self._held:
            raise RuntimeError(f"{worker!r} holds groups already")
        free = self._free if worker.units == len(self._all) else self._free - self._small
        if len(free) < worker.units:
            raise RuntimeError(f"{worker!r} needs {worker.units} groups of SMs, {len(free)} are free")
        prepared = [home for home in worker.homes if free.issuperset(home)]
        last = [worker.groups] if worker.groups in prepared else []
        groups = (last or prepared or [tuple(sorted(free)[: worker.units])])[0]
        worker.use(groups)
        self._free -= set(groups)
        self._held[id(worker)] = groups

    def give(self, worker: Any) -> None:
        """Take the groups back; a worker without any is fine."""
        self._free |= set(self._held.pop(id(worker), ()))


@dataclass(frozen=True, slots=True)
class Green:
    """SMs of one GPU, shared out in disjoint groups: a true partition, changed in microseconds.

    Memory bandwidth, the L2 cache and power stay shared, and so does fate: all networks live in one
    process, and a fault in one kernel ends them all.

    Parameters
    ----------
    device : int
        Number of the GPU.
    fine : bool
        Groups of 2 SMs where the GPU can (Hopper: 8 otherwise). Kernels with large thread-block
        clusters may refuse such groups or run slower: compare both.
    places : int
        Places on the GPU for which each share's CUDA graphs are prepared, spread evenly. In any
        other place a batch runs eagerly; its answer says so (``path``), and a run's trace too. A policy that cuts the
        GPU into n equal parts, or runs n launches of a service at a share at once, needs n.
    precision : {"fp16", "bf16", "fp32"}
        Of weights and of inputs that are not whole numbers.
    channels_last : bool
        Memory format of images and convolutions.
    graphs : bool
        CUDA graphs for each batch and place; eager otherwise.

    Notes
    -----
    A share is k whole groups, as a percentage of all SMs. The driver's remainder, the SMs that make no
    whole group, counts as a group: whoever gets it has some SMs more than asked.
    `granted_sms` in each answer is what the driver granted.
    """

    device: int = 0
    fine: bool = False
    places: int = 2
    precision: str = "fp16"
    channels_last: bool = True
    graphs: bool = True

    name: ClassVar[str] = "green"
    mechanism: ClassVar[str] = "green contexts"
    prepares_all: ClassVar[bool] = True  #: another share is another lease and graph, captured before a run: no process

    def __post_init__(self) -> None:
        count("device", self.device, least=0)
        count("places", self.places)
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(isinstance(self.channels_last, bool), "channels_last", self.channels_last, "True or False")
        require(isinstance(self.graphs, bool), "graphs", self.graphs, "True or False")
        require(isinstance(self.fine, bool), "fine", self.fine, "True or False")

    def layout(self) -> Layout:
        """How the driver cuts this GPU; asked once, in a process of its own.

        Raises
        ------
        GreenError
            If green contexts cannot be had here; says what helps.
        """
        return layout_of(self.device, self.fine)

    def _units(self) -> int:
        """Groups that a share can be made of. A remainder too small for a group only comes with all."""
        layout = self.layout()
        return len(layout.groups) - (0 < layout.rest < layout.step)

    def shares(self) -> tuple[float, ...]:
        """GPU% that can be granted, in rising order, rounded to 2 decimals; 100 is all groups."""
        layout = self.layout()
        return (*(round(100 * k * layout.step / layout.sms, 2) for k in range(1, self._units())), 100.0)

    def units_for(self, gpu_pct: float) -> int:
        """Return the number of groups that `gpu_pct` is.

        Raises
        ------
        ValueError
            If it is not a whole number of groups; the message names the nearest shares that are.
        """
        gpu_pct, shares = percent("gpu_pct", gpu_pct), self.shares()
        for k, share in enumerate(shares, 1):
            if abs(share - gpu_pct) <= ROUNDING_PCT:
                return k if k < len(shares) else len(self.layout().groups)
        nearest = [*[s for s in shares if s < gpu_pct][-1:], *[s for s in shares if s > gpu_pct][:1]]
        least = f"{self.layout().step} of {self.layout().sms} SMs is the step"
        require(
            False, "gpu_pct", gpu_pct, f"a share that green contexts grant ({least}): {' or '.join(f'{s:g}' for s in nearest)}"
        )
        raise AssertionError

    def homes(self, units: int) -> tuple[tuple[int, ...], ...]:
        """Places to prepare for a share of `units` groups, from the first group to the last."""
        slack, places = max(0, self._units() - units), max(self.places - 1, 1)
        starts = dict.fromkeys(round(i * slack / places) for i in range(self.places))
        return tuple(tuple(range(start, start + units)) for start in starts)

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
    ) -> GreenWorker:
        """Start a worker and return at once; `GreenWorker.wait_ready` waits for it.

        Parameters
        ----------
        model : str
            A name of `dstack_lab.zoo`, or one's own network. Workers of one network share its parameters.
        gpu_pct : float
            One of `shares`.
        cores : None
            The process of all workers runs on the cores of this one.
        batches : sequence of int
            Batches to capture CUDA graphs for before it says ready.
        weights : str, optional
            ``"DEFAULT"`` for trained weights.
        seed : int
            Of weights and inputs.
        memory_mib : None
            One process has one memory: there is no cap for a share.

        Raises
        ------
        ValueError
            If the share cannot be granted, or `cores` or `memory_mib` are given.
        GreenError
            If green contexts cannot be had here.
        """
        require(cores is None, "cores", cores, "None: a share of green contexts is SMs, and one process holds all workers")
        require(
            memory_mib is None, "memory_mib", memory_mib, "None: workers of green contexts share memory; devices.Mps() has caps"
        )
        units = self.units_for(gpu_pct)
        return GreenWorker(
            self.device,
            self.fine,
            model,
            gpu_pct,
            units=units,
            homes=self.homes(units),
            groups=self.layout().groups,
            batches=batches,
            weights=weights,
            seed=seed,
            precision=self.precision,
            channels_last=self.channels_last,
            graphs=self.graphs,
        )

    def leases(self) -> GroupLeases:
        """Who computes on which groups, for one run."""
        return GroupLeases(self.layout().groups)

    def describe(self) -> str:
        """Name of the GPU and its SMs: ``"NVIDIA H200, 132 SMs"``."""
        layout = self.layout()
        return f"{layout.name}, {layout.sms} SMs"

    def sampler(self) -> Sampler:
        """Read power, energy and SM activity during a run."""
        return Sampler(self.device)

    def conditions(self) -> dict[str, Any]:
        """Clock, power and throttling of the GPU now (see `nvml.conditions`)."""
        return nvml.conditions(self.device)

    def marks(self) -> tuple[str, ...]:
        """Reservations about numbers recorded here and now, each as ``"kind: sentence"``."""
        layout, found = self.layout(), []
        if len(layout.groups) < 2:
            found.append("one group: only the share 100 exists; nothing can be shared in space")
        if layout.rest:
            found.append(
                f"remainder: {layout.rest} of {layout.sms} SMs make no whole group; who gets them has more than its share"
            )
        if layout.rest >= 2 * layout.step:
            most = 100 * self._units() * layout.step / layout.sms
            found.append(f"large remainder: shares of more than {most:.1f} % in all cannot be held at the same time")
        if sum(layout.groups) < layout.sms:
            found.append(f"lost SMs: the driver hands out {sum(layout.groups)} of {layout.sms}")
        if self.fine:
            found.append("fine groups: SMs of one cluster are not kept together; kernels with large clusters may differ")
        return tuple(found)
