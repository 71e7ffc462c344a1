"""What the probe asks of the GPU itself, each in a process of its own: ``python -m dstack_lab.agenda.silicon WHAT JSON``.

The last line it prints is the answer as JSON. The parent decides by the environment what serves the
process: NVIDIA MPS with a cap, or nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from dstack_lab.agenda.kernels import trace
from dstack_lab.devices.green_driver import Driver, torch_with_cuda
from dstack_lab.devices.green_ledger import SmLedger
from dstack_lab.devices.green_smid import BLOCKS_PER_SM, CYCLES, MOST_SMS, SOURCE, THREADS

#: Longest wait for the child of a child [s].
IPC_S = 60


def start() -> dict[str, Any]:
    """How long torch and CUDA take to start, the first time from a cold disk [s], and what they are."""
    begin = time.perf_counter()
    torch = torch_with_cuda()
    imported = time.perf_counter()
    torch.zeros(1, device="cuda").add_(1).cpu()
    opened, gpu = time.perf_counter(), torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    found |= {"cudnn": torch.backends.cudnn.version(), "architectures": torch.cuda.get_arch_list()}
    found |= {"gpu": gpu.name, "capability": [gpu.major, gpu.minor], "sms": gpu.multi_processor_count}
    found |= {"memory_mib": gpu.total_memory / 2**20, "import_s": imported - begin, "cuda_s": opened - imported}
    try:
        torch.cuda._compile_kernel(SOURCE, "where")
        found["compile_s"] = time.perf_counter() - opened
    except Exception as error:  # then the other questions that need %smid have no answer
        found["no_smid"] = f"{type(error).__name__}: {error}"
    return found


def sms(seconds: float = 0.5, at: float = 0.0) -> dict[str, Any]:
    """Which SMs this process's kernels run on, from the moment `at` of the machine's clock on."""
    torch = torch_with_cuda()
    from dstack_lab.cuda_backend import under_mps

    seen = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda")
    granted = torch.cuda.get_device_properties(0).multi_processor_count
    try:
        kernel = torch.cuda._compile_kernel(SOURCE, "where")
    except Exception as error:  # the number of SMs is worth knowing without their names
        return {"mps": under_mps(), "sms": granted, "seen": [], "no_smid": f"{type(error).__name__}: {error}"}
    _spin(torch, kernel, seen, granted, 0.0)
    seen.zero_()
    torch.cuda.synchronize()
    late_s = time.monotonic() - at if at else 0.0
    time.sleep(max(0.0, -late_s))
    begin = time.monotonic()
    _spin(torch, kernel, seen, granted, seconds)
    found = torch.nonzero(seen.cpu()).flatten().tolist()
    return {
        "mps": under_mps(),
        "sms": granted,
        "seen": found,
        "begin": begin,
        "end": time.monotonic(),
        "late_s": max(0.0, late_s),
    }


def _spin(torch: Any, kernel: Any, seen: Any, granted: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        kernel(grid=(BLOCKS_PER_SM * granted, 1, 1), block=(THREADS, 1, 1), args=[seen, CYCLES])
        torch.cuda.current_stream().synchronize()
        if time.monotonic() >= end:
            return


def spin(lease_sms: int = 0, seconds: float = 2.0) -> dict[str, Any]:
    """Keep some SMs of a green context busy, or all; say when."""
    torch = torch_with_cuda()
    kernel = torch.cuda._compile_kernel(SOURCE, "where")
    seen, granted = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda"), 0
    stream = torch.cuda.current_stream()
    if lease_sms:
        lease = SmLedger.of(0).lease(lease_sms)
        stream, granted = lease.stream, lease.sms
    torch.cuda.synchronize()
    whole = torch.cuda.get_device_properties(0).multi_processor_count
    with torch.cuda.stream(stream):
        _spin(torch, kernel, seen, whole, 0.0)
        begin = time.monotonic()
        print(json.dumps({"begin": begin}), flush=True)  # whoever waits for it samples from now on
        _spin(torch, kernel, seen, whole, seconds)
    return {"sms": granted or whole, "seen": int((seen.cpu() > 0).sum()), "begin": begin, "end": time.monotonic()}


def green_cost(times: int = 20) -> dict[str, Any]:
    """How long a green context and its stream take to make [ms]."""
    driver = Driver()
    handle = driver.open(0)
    driver.ask("cuDevicePrimaryCtxRetain", handle)
    whole = driver.sm_resource(handle)
    group = driver.split(whole, False)[0]
    context_ms, stream_ms = [], []
    for _ in range(times):
        begin = time.perf_counter()
        description = driver.ask("cuDevResourceGenerateDesc", [group], 1)
        green = driver.ask("cuGreenCtxCreate", description, handle, 1)
        middle = time.perf_counter()
        driver.ask("cuGreenCtxStreamCreate", green, 1, 0)
        context_ms.append(1e3 * (middle - begin))
        stream_ms.append(1e3 * (time.perf_counter() - middle))
    medians = {"context_median_ms": statistics.median(context_ms), "stream_median_ms": statistics.median(stream_ms)}
    return {"context_ms": context_ms, "stream_ms": stream_ms, **medians}


def layout() -> dict[str, Any]:
    """How the driver cuts the GPU: least size and alignment, groups of 8 and of 2 SMs."""
    driver = Driver()
    handle = driver.open(0)
    whole = driver.sm_resource(handle)
    found: dict[str, Any] = {"cuda": driver.version(), "sms": whole.sm.smCount}
    found |= {"least": whole.sm.minSmPartitionSize, "alignment": whole.sm.smCoscheduledAlignment}
    for name, fine in (("coarse", False), ("fine", True)):
        try:
            found[name] = [group.sm.smCount for group in driver.split(whole, fine)]
        except RuntimeError as error:
            found[name] = str(error)
    return found


def graph() -> dict[str, Any]:
    """SMs of a CUDA graph captured with and without ``stream=``, and replayed on another stream."""
    torch = torch_with_cuda()
    ledger = SmLedger.of(0)
    lease, other = ledger.lease(ledger.sms // 2), ledger.lease(groups=ledger.free)
    kernel = torch.cuda._compile_kernel(SOURCE, "where")
    seen = torch.zeros(MOST_SMS, dtype=torch.int32, device="cuda")

    def launch() -> None:
        kernel(grid=(BLOCKS_PER_SM * ledger.sms, 1, 1), block=(THREADS, 1, 1), args=[seen, CYCLES])

    def where(stream: Any, work: Callable[[], None]) -> list[int]:
        seen.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            work()
        torch.cuda.synchronize()
        return list(torch.nonzero(seen.cpu()).flatten().tolist())

    own = set(where(lease.stream, launch))
    found: dict[str, Any] = {"granted": lease.sms, "seen_eager": len(own)}
    for name, options in (("with_stream", {"stream": lease.stream}), ("without_stream", {})):
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(lease.stream), torch.cuda.graph(captured, capture_error_mode="thread_local", **options):
                launch()
        except Exception as error:  # the other way may work
            found[name] = f"{type(error).__name__}: {error}"
            continue
        for place, stream in (("own", lease.stream), ("other", other.stream), ("default", torch.cuda.default_stream())):
            there = set(where(stream, captured.replay))
            found[f"{name}_replayed_on_{place}"] = {"sms": len(there), "inside_lease": there <= own}
    return found


def ipc(device: str = "cuda") -> dict[str, Any]:
    """Whether a child of this process reads a tensor of its, without a copy."""
    torch = torch_with_cuda()
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    there, back = context.Queue(), context.Queue()
    tensor = torch.arange(1000, device=device, dtype=torch.float32)
    child = context.Process(target=_ipc_child, args=(there, back), daemon=True)  # else a failure here waits for its end
    begin = time.perf_counter()
    child.start()
    there.put(tensor)
    total = back.get(timeout=IPC_S)
    if device == "cuda":
        torch.cuda.synchronize()
    written = float(tensor[0].item())  # the child wrote -1 there: the memory is one
    there.put("done")
    child.join(10)
    return {"sum": total, "right": total == 499500.0, "shared": written == -1.0, "seconds": time.perf_counter() - begin}


def _ipc_child(there: Any, back: Any) -> None:
    tensor = there.get(timeout=IPC_S)
    total = float(tensor.sum().item())
    tensor[0] = -1
    back.put(float(tensor[0].item()) + total + 1)  # waits for the write
    there.get(timeout=IPC_S)


def kineto() -> dict[str, Any]:
    """The keys of one kernel event of torch.profiler, and the event."""
    torch = torch_with_cuda()
    from torch.profiler import ProfilerActivity, profile

    one = torch.randn(512, 512, device="cuda")
    _ = one @ one
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        _ = one @ one
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        recorded.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    kernels = [event for event in content["traceEvents"] if event.get("cat") == "kernel"]
    if not kernels:
        raise RuntimeError("no kernel records: CUPTI is not available here")
    return {"keys": sorted(kernels[0]["args"]), "event": kernels[0], "device": content.get("deviceProperties")}


ALL: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one for one in (start, sms, spin, green_cost, layout, graph, ipc, kineto, trace)
}


def main(arguments: list[str]) -> int:
    """Do one of them and print the answer, or the error, as JSON."""
    try:
        answer = ALL[arguments[0]](**json.loads(arguments[1] if arguments[1:] else "{}"))
    except Exception as error:  # the parent shall hear of all of them
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
