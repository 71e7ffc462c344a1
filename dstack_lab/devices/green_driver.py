"""The CUDA driver, as far as green contexts need it: each failure becomes one sentence with its cure.

``python -m dstack_lab.devices.green_driver`` prints the groups of a GPU as JSON: the parent of a run
asks that way, so that its own process never opens the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dstack_lab.checks import count
from dstack_lab.devices.spawn import worker_env

#: First driver with green contexts, as ``cuDriverGetVersion`` says it.
OLDEST_DRIVER = 12040

#: ``useFlags`` of the split: 1 ignores the co-scheduling of SMs, for groups of 2 instead of 8 on Hopper.
#: Plain numbers, for the name of the enumeration changed between versions of cuda-bindings.
COARSE_FLAG, FINE_FLAG = 0, 1
FINE_SMS = 2

#: The driver's word -> what it means here and what helps.
CURES = {
    "CUDA_ERROR_NO_DEVICE": "the driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of this number: count them with nvidia-smi -L, the first is 0",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds this GPU in exclusive mode: end it, or use another GPU",
    "CUDA_ERROR_NOT_SUPPORTED": "this GPU or its mode (MIG, vGPU) has no green contexts: use devices.Mps() or a whole GPU",
    "CUDA_ERROR_NOT_PERMITTED": "the GPU's administrator forbids this: ask for access to the device files",
    "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION": "the driver cannot grant such groups of SMs: take the other value of `fine`",
    "CUDA_ERROR_INVALID_RESOURCE_TYPE": "the driver cannot divide SMs on this GPU: use devices.Mps()",
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is full: end other processes (nvidia-smi lists them)",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "driver and kernel module differ: restart the machine",
    "CUDA_ERROR_SYSTEM_NOT_READY": "a service that the GPU needs does not run: as root, systemctl start nvidia-fabricmanager",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "a newer libcuda of a container hides the driver's: unset LD_LIBRARY_PATH",
    "CUDA_ERROR_UNKNOWN": "the driver is in trouble: see whether nvidia-smi answers and what dmesg says, or restart the machine",
    "CUDA_ERROR_STUB_LIBRARY": "this libcuda is the stub of a toolkit: remove its folder from LD_LIBRARY_PATH",
    "CUDA_ERROR_MPS_CONNECTION_FAILED": "another user's NVIDIA MPS answers: set CUDA_MPS_PIPE_DIRECTORY to an empty folder",
}


class GreenError(RuntimeError):
    """Green contexts cannot be had here, or a call for them failed; the message says what helps."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the driver cuts a GPU.

    Parameters
    ----------
    device : int
    name : str
        Of the GPU.
    driver : int
        Version of CUDA that the driver speaks: 13000 is 13.0.
    sms : int
        SMs of the whole device.
    groups : tuple of int
        SMs of each group of the split, all alike, and then of the remainder if there is one.
    step : int
        SMs of a group.
    fine : bool
    """

    device: int
    name: str
    driver: int
    sms: int
    groups: tuple[int, ...]
    step: int
    fine: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def rest(self) -> int:
        """SMs of the remainder, 0 if there is none."""
        return self.groups[-1] if self.groups[-1] != self.step else 0


def torch_with_cuda() -> Any:
    """Import torch and return it.

    Raises
    ------
    GreenError
        If it finds no GPU.
    """
    import torch

    if torch.version.cuda is None:
        raise GreenError(f"torch {torch.__version__} was built without CUDA: install a CUDA build, see pytorch.org")
    if not torch.cuda.is_available():
        raise GreenError(f"torch {torch.__version__} finds no GPU: its CUDA {torch.version.cuda} may be newer than the driver")
    return torch


class Driver:
    """Calls of ``cuda.bindings.driver`` that raise `GreenError` instead of returning a status.

    Parameters
    ----------
    module : module, optional
        Something with the same functions; ``cuda.bindings.driver`` itself by default.
    """

    def __init__(self, module: Any = None) -> None:
        if module is None:
            try:
                module = importlib.import_module("cuda.bindings.driver")
            except ImportError as error:
                cure = "install it with: pip install 'dstack-lab[gpu]'"
                raise GreenError(f"green contexts need the package cuda-bindings, which is not here: {cure}") from error
        self.module = module

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver and return what it gives beside its status.

        Raises
        ------
        GreenError
            If there is no such function or driver, or its status is not success.
        """
        function = getattr(self.module, name, None)
        if function is None:
            raise GreenError(f"cuda-bindings has no {name}: update it with pip install 'cuda-bindings>=13.0.3,<14'")
        try:
            status, *values = function(*arguments)
        except RuntimeError as error:  # cuda-bindings' own: no library, or none with this function
            if any(word in str(error) for word in ("dlopen", "libcuda", "NVIDIA driver library")):  # by version
                cure = "install one, or start the container with --gpus all"
                raise GreenError(f"no NVIDIA driver (libcuda.so.1 not found): {cure}") from error
            raise GreenError(f"the driver has no {name} ({error}): update the NVIDIA driver to 550 or later") from error
        if int(status):
            word = getattr(status, "name", str(status))
            cure = CURES.get(word, "see whether nvidia-smi answers, and look the word up among the CUDA driver's errors")
            raise GreenError(f"{name} answered {word}: {cure}")
        return values[0] if len(values) == 1 else tuple(values)

    def open(self, device: int) -> Any:
        """Start the driver and return the handle of a GPU.

        Raises
        ------
        GreenError
            If there is no driver, it is too old, or there is no such GPU.
        """
        self.ask("cuInit", 0)
        version = self.version()
        if version < OLDEST_DRIVER:
            spoken = f"{version // 1000}.{version % 1000 // 10}"
            raise GreenError(
                f"the NVIDIA driver speaks CUDA {spoken}, green contexts need 12.4: update the driver to 550 or later"
            )
        return self.ask("cuDeviceGet", count("device", device, least=0))

    def version(self) -> int:
        """CUDA version of the driver: 13000 is 13.0."""
        return int(self.ask("cuDriverGetVersion"))

    def sm_resource(self, handle: Any) -> Any:
        """Return all SMs of a device as a resource that can be split."""
        return self.ask("cuDeviceGetDevResource", handle, self.module.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)

    def split(self, whole: Any, fine: bool) -> list[Any]:
        """Cut `whole` into as many groups as it gives, in one call: only those of one call are disjoint.

        Returns
        -------
        list
            Resources, the remainder last if there is one.

        Raises
        ------
        GreenError
            If it cannot be cut, or groups and remainder are not the whole.
        """
        least = FINE_SMS if fine else max(whole.sm.minSmPartitionSize, whole.sm.smCoscheduledAlignment, 1)
        flag = FINE_FLAG if fine else COARSE_FLAG
        number = self.ask("cuDevSmResourceSplitByCount", 0, whole, flag, least)[1]  # 0: ask how many
        if not number:  # too small to be cut
            if not whole.sm.smCount:
                raise GreenError("the driver grants 0 SMs: another process may hold them; check nvidia-smi")
            return [whole]
        groups, number, rest = self.ask("cuDevSmResourceSplitByCount", number, whole, flag, least)
        found = [group for group in groups[:number] if group.sm.smCount]  # the list is as long as was asked for
        found += [rest] if rest.sm.smCount else []
        if not found or sum(group.sm.smCount for group in found) > whole.sm.smCount:
            counts = [group.sm.smCount for group in found]
            raise GreenError(f"the driver cut {whole.sm.smCount} SMs into {counts}: no partition; use devices.Mps()")
        return found


def read_layout(device: int = 0, fine: bool = False, module: Any = None) -> Layout:
    """Open the GPU in this process and return how it is cut.

    Raises
    ------
    GreenError
        If green contexts cannot be had here.
    """
    driver = Driver(module)
    handle = driver.open(device)
    name = driver.ask("cuDeviceGetName", 256, handle).split(b"\0")[0].decode(errors="replace").strip()
    whole = driver.sm_resource(handle)
    groups = tuple(group.sm.smCount for group in driver.split(whole, fine))
    return Layout(device, name, driver.version(), whole.sm.smCount, groups, groups[0], fine)


@contextlib.contextmanager
def without_mps() -> Iterator[dict[str, str]]:
    """Environment of a process that no NVIDIA MPS daemon serves, for as long as the block lasts.

    Under MPS a green context may spread over all the SMs of its client.
    """
    with tempfile.TemporaryDirectory(prefix="no-mps-", dir="/tmp") as folder:
        yield worker_env(1, {"CUDA_MPS_PIPE_DIRECTORY": folder})


@functools.lru_cache(maxsize=16)
def layout_of(device: int = 0, fine: bool = False) -> Layout:
    """Return how a GPU is cut, asked in a process of its own.

    Raises
    ------
    GreenError
        If green contexts cannot be had here, or the driver does not answer for a minute.
    """
    command = [sys.executable, "-m", __name__, f"--device={device}", *(["--fine"] if fine else [])]
    try:
        with without_mps() as env:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, env=env
            )
    except subprocess.TimeoutExpired:
        raise GreenError("the NVIDIA driver gave no answer for 60 s: check that nvidia-smi still does") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.strip()[-600:]
        raise GreenError(f"the process that asked the NVIDIA driver ended with status {done.returncode}: {words}") from None
    if "error" in answer:
        raise GreenError(answer["error"])
    return Layout(**answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the layout, or the error, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m dstack_lab.devices.green_driver", description="How a GPU is cut into groups of SMs."
    )
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--fine", action="store_true")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(asdict(read_layout(options.device, options.fine))))
    except GreenError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
