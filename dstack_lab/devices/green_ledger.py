"""Who owns which SMs in this process: one split of the GPU, leases of disjoint groups."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from dstack_lab.checks import count, require
from dstack_lab.devices.green_driver import Driver

#: Flags that the driver wants: the context's null stream, and streams that do not wait for it.
DEFAULT_STREAM, NON_BLOCKING = 1, 1


def pick(groups: Sequence[int], free: Iterable[int], sms: int) -> tuple[int, ...]:
    """Choose free groups that hold at least `sms` SMs with as few beyond as can be.

    All groups are alike but the last, which may be the remainder: it is taken if that wastes less.

    Parameters
    ----------
    groups : sequence of int
        SMs of each group.
    free : iterable of int
        Positions that may be taken.
    sms : int

    Returns
    -------
    tuple of int
        Positions in rising order; empty if the free groups do not suffice.
    """
    order = sorted(free)
    odd = [i for i in order if groups[i] != groups[0]]
    even = [i for i in order if groups[i] == groups[0]]
    chosen: list[tuple[int, int, tuple[int, ...]]] = []
    for start in ([], odd) if odd else ([],):
        held = sum(groups[i] for i in start)
        more = max(0, -(-(sms - held) // groups[0]))
        if more <= len(even):
            chosen.append((held + more * groups[0], len(start), tuple(sorted([*even[:more], *start]))))
    return min(chosen)[2] if chosen else ()


@dataclass(frozen=True, slots=True)
class Context:
    """A green context of some groups and its stream; made once, never destroyed.

    Parameters
    ----------
    groups : tuple of int
        Positions in the split.
    sms : int
        SMs that the driver says it has: the granted number, never the asked one.
    green, raw : object
        The driver's handles of the context and of its stream.
    """

    groups: tuple[int, ...]
    sms: int
    green: Any
    raw: Any


class Lease:
    """SMs that nobody else has until it is returned, by `give` or the end of a ``with`` block."""

    def __init__(self, ledger: SmLedger, context: Context) -> None:
        self.ledger, self.context, self.held = ledger, context, True

    @property
    def groups(self) -> tuple[int, ...]:
        """Positions in the split."""
        return self.context.groups

    @property
    def sms(self) -> int:
        """SMs granted, as the driver tells them."""
        return self.context.sms

    @property
    def gpu_pct(self) -> float:
        """SMs granted, as a share [%] of the device."""
        return 100 * self.sms / self.ledger.sms

    @property
    def stream(self) -> Any:
        """Stream on these SMs, for ``torch.cuda.stream``."""
        return self.ledger.stream(self.groups)

    def give(self) -> None:
        """Return the SMs; twice is fine."""
        self.ledger.give(self)

    def __repr__(self) -> str:
        return f"<lease of {self.sms} SMs, groups {self.groups}{'' if self.held else ', returned'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.give()


class SmLedger:
    """Cut a GPU once into disjoint groups of SMs and lend them out.

    A split reserves nothing: two ledgers would hand out the same SMs twice. So there is one for a
    device and process, had from `SmLedger.of`; and kernels of two processes never run side by side
    without NVIDIA MPS, so that all tenants belong into one process anyway.

    Contexts and streams are pooled: they last as long as the process, for the driver loses memory
    with each that is destroyed, and CUDA graphs hold on to theirs.

    Parameters
    ----------
    device : int
    fine : bool
        Groups of 2 SMs where the GPU can (Hopper); large thread-block clusters no longer fit them.
    module : module, optional
        Instead of ``cuda.bindings.driver``.

    Raises
    ------
    GreenError
        If green contexts cannot be had here.
    """

    _shared: dict[int, SmLedger] = {}  # noqa: RUF012
    _lock_shared = threading.Lock()

    def __init__(self, device: int = 0, fine: bool = False, module: Any = None) -> None:
        self.device, self.fine = count("device", device, least=0), bool(fine)
        self._driver = Driver(module)
        self._handle = self._driver.open(device)
        self._driver.ask("cuDevicePrimaryCtxRetain", self._handle)  # green contexts need it; torch uses the same
        whole = self._driver.sm_resource(self._handle)
        self._resources = self._driver.split(whole, self.fine)
        #: SMs of the device and of each group.
        self.sms: int = whole.sm.smCount
        self.groups: tuple[int, ...] = tuple(resource.sm.smCount for resource in self._resources)
        self._free = set(range(len(self.groups)))
        self._contexts: dict[tuple[int, ...], Context] = {}
        self._streams: dict[tuple[tuple[int, ...], bool], Any] = {}
        self._lock = threading.RLock()

    @classmethod
    def of(cls, device: int = 0, fine: bool = False, module: Any = None) -> SmLedger:
        """Return this process's ledger of a device; made at the first call.

        Raises
        ------
        ValueError
            If it was made with another `fine`.
        GreenError
            If green contexts cannot be had here.
        """
        with cls._lock_shared:
            if device not in cls._shared:
                cls._shared[device] = cls(device, fine, module)
            found = cls._shared[device]
        require(found.fine == fine, "fine", fine, f"{found.fine}, as in this process's first split of device {device}")
        return found

    @property
    def free(self) -> tuple[int, ...]:
        """Positions of the groups that nobody holds."""
        return tuple(sorted(self._free))

    @property
    def free_sms(self) -> int:
        """SMs that nobody holds."""
        return sum(self.groups[i] for i in self.free)

    def lease(self, sms: int | None = None, groups: Iterable[int] | None = None) -> Lease:
        """Lend SMs out, rounded up to whole groups; or exactly these groups.

        Parameters
        ----------
        sms : int, optional
            Least number of SMs.
        groups : iterable of int, optional
            Positions in the split.

        Raises
        ------
        ValueError
            If one is asked for twice or too many are; nothing is taken then.
        GreenError
            If the driver refuses the context; nothing is taken then.
        """
        require((sms is None) != (groups is None), "sms, groups", (sms, groups), "one of the two")
        with self._lock:
            if groups is None:
                sms = count("sms", sms)
                require(sms <= self.sms, "sms", sms, f"{self.sms} or less, the SMs of device {self.device}")
                wanted = pick(self.groups, self._free, sms)
                require(bool(wanted), "sms", sms, f"{self.free_sms} or less, the SMs that are free now: return a lease first")
            else:
                wanted = self._known(groups)
                require(set(wanted) <= self._free, "groups", wanted, f"among the free ones {self.free}: return a lease first")
            context = self.context(wanted)
            self._free -= set(wanted)
            return Lease(self, context)

    def give(self, lease: Lease) -> None:
        """Take a lease back; twice is fine.

        Raises
        ------
        ValueError
            If it is another ledger's.
        """
        require(lease.ledger is self, "lease", lease, "one of this ledger")
        with self._lock:
            if lease.held:
                lease.held = False
                self._free |= set(lease.groups)

    def context(self, groups: Iterable[int]) -> Context:
        """Return the pooled context of some groups, which need not be free: for preparing graphs.

        Raises
        ------
        ValueError
            If there are no such groups.
        GreenError
            If the driver refuses it.
        """
        wanted = self._known(groups)
        with self._lock:
            if wanted not in self._contexts:
                ask, resources = self._driver.ask, [self._resources[i] for i in wanted]
                description = ask("cuDevResourceGenerateDesc", resources, len(resources))
                green = ask("cuGreenCtxCreate", description, self._handle, DEFAULT_STREAM)
                raw = ask("cuGreenCtxStreamCreate", green, NON_BLOCKING, 0)
                kind = self._driver.module.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
                granted = ask("cuGreenCtxGetDevResource", green, kind).sm.smCount
                self._contexts[wanted] = Context(wanted, granted, green, raw)
            return self._contexts[wanted]

    def stream(self, groups: Iterable[int], capture: bool = False) -> Any:
        """Return the pooled stream on some groups, as torch knows streams.

        With `capture` a second one of the same context, on which nobody serves: whatever another thread puts on a stream
        that is being captured would become part of the graph, and to wait for that stream would break it.
        """
        context = self.context(groups)
        key = context.groups, capture
        with self._lock:
            if key not in self._streams:
                import torch

                raw = self._driver.ask("cuGreenCtxStreamCreate", context.green, NON_BLOCKING, 0) if capture else context.raw
                wrap: Any = torch.cuda.ExternalStream  # torch has no types for it
                self._streams[key] = wrap(int(raw), device=f"cuda:{self.device}")
            return self._streams[key]

    def _known(self, groups: Iterable[int]) -> tuple[int, ...]:
        wanted = tuple(sorted(groups))
        allowed = f"1 or more different ones of 0 to {len(self.groups) - 1}"
        require(bool(wanted) and len(set(wanted)) == len(wanted), "groups", wanted, allowed)
        require(set(wanted) <= set(range(len(self.groups))), "groups", wanted, allowed)
        return wanted
