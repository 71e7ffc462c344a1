"""Proof that shares do not meet: which SMs the blocks of a kernel really ran on."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dstack_lab.checks import count, require
from dstack_lab.devices.green_driver import GreenError, torch_with_cuda, without_mps
from dstack_lab.devices.green_ledger import SmLedger

#: 1024 threads a block: an SM takes 2 at most, so that enough blocks reach every SM of a share.
SOURCE = r"""
extern "C" __global__ void where(int* seen, int cycles) {
  unsigned sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (threadIdx.x == 0) atomicAdd(seen + sm, 1);
  for (long long start = clock64(); clock64() - start < cycles; ) {}
}
"""
THREADS, BLOCKS_PER_SM, CYCLES, MOST_SMS = 1024, 16, 200_000, 4096


@dataclass(frozen=True, slots=True)
class Proof:
    """What `verify_disjoint` saw.

    Parameters
    ----------
    seen : tuple of tuple of int
        Numbers of the SMs that each share's blocks ran on, while all ran.
    granted : tuple of int
        SMs that the driver says each share has.
    """

    seen: tuple[tuple[int, ...], ...]
    granted: tuple[int, ...]

    @property
    def shared(self) -> tuple[int, ...]:
        """SMs that more than one share used."""
        meet: set[int] = set()
        for one, other in combinations(map(set, self.seen), 2):
            meet |= one & other
        return tuple(sorted(meet))

    @property
    def disjoint(self) -> bool:
        """Whether no two shares met."""
        return not self.shared

    @property
    def exact(self) -> bool:
        """Whether each share used as many SMs as it was granted."""
        return tuple(map(len, self.seen)) == self.granted

    def __bool__(self) -> bool:
        return self.disjoint and self.exact

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(seen)} of {granted}" for seen, granted in zip(self.seen, self.granted, strict=True))
        verdict = "no SM is shared" if self.disjoint else f"they meet on {len(self.shared)} SMs: {list(self.shared)}"
        return f"SMs seen of those granted: {sizes}; {verdict}"


def sms_seen(streams: Sequence[Any], sms: int, device: int = 0) -> tuple[tuple[int, ...], ...]:
    """Run a kernel on all `streams` at once and return the numbers of the SMs each used.

    Opens the GPU in this process. Works in a client of NVIDIA MPS as well, with its current stream.

    Parameters
    ----------
    streams : sequence of torch.cuda.Stream
    sms : int
        SMs of the whole device: decides how many blocks to start.
    device : int

    Raises
    ------
    GreenError
        If torch has no CUDA or cannot compile a kernel.
    """
    torch = torch_with_cuda()
    compiler = getattr(torch.cuda, "_compile_kernel", None)
    if compiler is None:
        raise GreenError("torch cannot compile a kernel: the proof needs torch 2.11 or later")
    with torch.cuda.device(device):
        kernel = compiler(SOURCE, "where")
        counts = [torch.zeros(MOST_SMS, dtype=torch.int32, device=f"cuda:{device}") for _ in streams]
        torch.cuda.synchronize(device)
        for cycles in (0, CYCLES):  # the first launch loads the kernel, which may hold up other streams
            for stream, seen in zip(streams, counts, strict=True):
                with torch.cuda.stream(stream):
                    kernel(grid=(BLOCKS_PER_SM * sms, 1, 1), block=(THREADS, 1, 1), args=[seen, cycles])
        for stream in streams:
            stream.synchronize()
        return tuple(tuple(torch.nonzero(seen.cpu()).flatten().tolist()) for seen in counts)


def prove(sms: Sequence[int], device: int = 0, fine: bool = False) -> Proof:
    """Do what `verify_disjoint` says in this process, which opens the GPU for good.

    Raises
    ------
    ValueError, GreenError
        As `verify_disjoint`.
    """
    torch_with_cuda()
    ledger = SmLedger.of(device, fine)
    n = len(ledger.groups)
    if sms:
        require(sum(sms) <= ledger.sms, "sum of sms", sum(sms), f"{ledger.sms} or less, the SMs of device {device}")
    else:
        require(n > 1, "groups", n, "2 or more to have two shares: use fine=True")
    with contextlib.ExitStack() as held:
        if sms:
            leases = [held.enter_context(ledger.lease(number)) for number in sms]
        else:
            leases = [held.enter_context(ledger.lease(groups=part)) for part in (range(n // 2), range(n // 2, n))]
        return Proof(sms_seen([lease.stream for lease in leases], ledger.sms, device), tuple(lease.sms for lease in leases))


def verify_disjoint(*sms: int, device: int = 0, fine: bool = False, timeout_s: float = 120.0) -> Proof:
    """Prove on the GPU that shares of green contexts do not meet.

    Kernels that note the number of their SM run on all shares at the same time, in a process of
    their own. NVIDIA's ``%smid`` is the physical number.

    Parameters
    ----------
    *sms : int
        SMs of each share, rounded up to whole groups; by default two halves.
    device : int
    fine : bool
        Groups of 2 SMs instead of the GPU's own size.
    timeout_s : float
        How long it may take [s].

    Returns
    -------
    Proof
        True if no SM is shared and each share used all it was granted; printing it says why.

    Raises
    ------
    ValueError
        If they are more than the SMs of the device.
    GreenError
        If green contexts cannot be had here, or there is no answer in time.
    """
    asked = ",".join(str(count("sms", number)) for number in sms)
    command = [sys.executable, "-m", __name__, f"--device={count('device', device, least=0)}", f"--sms={asked}"]
    try:
        with without_mps() as env:
            done = subprocess.run(
                [*command, *(["--fine"] if fine else [])],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                stdin=subprocess.DEVNULL,
                env=env,
            )
    except subprocess.TimeoutExpired:
        raise GreenError(f"the proof took longer than {timeout_s:g} s: is the GPU busy or hung (nvidia-smi)?") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = done.stderr.strip()[-600:]
        raise GreenError(f"the proof's process ended with status {done.returncode}: {words}") from None
    if "error" in answer:
        raise (ValueError if answer["kind"] == "ValueError" else GreenError)(answer["error"])
    return Proof(tuple(tuple(seen) for seen in answer["seen"]), tuple(answer["granted"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the proof, or the error, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m dstack_lab.devices.green_smid", description="Which SMs shares really use.")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--sms", default="")
    parser.add_argument("--fine", action="store_true")
    options = parser.parse_args(arguments)
    try:
        proof = prove([int(n) for n in options.sms.split(",") if n], options.device, options.fine)
    except Exception as error:  # the parent shall hear of all of them
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        return 1
    print(json.dumps({"seen": proof.seen, "granted": proof.granted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
