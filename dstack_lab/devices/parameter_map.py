"""Parameters of a network in one block of memory, which other processes map instead of loading their own.

On a GPU the block travels as a CUDA IPC handle, on the CPU as a file of shared memory: torch's own calls, each with
its other half. `parameter_host` holds the blocks; a worker asks it with `mapped`.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

from dstack_lab.protocol import Message, encode

#: Every tensor begins at a multiple of this [bytes], as one of torch's own allocator does.
ALIGNMENT = 512
#: How long the host may take to load a network, and the driver to map a block [s].
LOAD_S, MAP_S = 240.0, 30
#: What a worker says of a batch whose parameters may have been another program's memory.
PARAMETERS_GONE = "the process that holds the parameters of all workers ended"


class Block(NamedTuple):
    """All parameters and buffers of a network.

    Parameters
    ----------
    memory : torch.Tensor
        Bytes.
    places : dict
        Name -> dtype, shape, stride and where in `memory` [bytes]; tensors that are one in the network are one here.
    """

    memory: Any
    places: dict[str, tuple[str, list[int], list[int], int]]


class NotShared(RuntimeError):
    """Parameters cannot be shared; the sentence says why."""


def tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """Name and tensor of every parameter and buffer, those included that a state_dict leaves out."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def pack(module: Any, device: Any) -> Block:
    """Copy the parameters and buffers of a module into one block on `device`, in their memory formats."""
    import torch

    places: dict[str, tuple[str, list[int], list[int], int]] = {}
    known: dict[tuple[Any, ...], int] = {}
    parts: list[tuple[Any, int]] = []
    size = 0
    for name, tensor in tensors(module):
        whole = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.contiguous()
        form = str(whole.dtype).removeprefix("torch."), list(whole.shape), list(whole.stride())
        key = (tensor.data_ptr(), *map(str, form)) if tensor.nbytes else (name,)
        if key not in known:
            known[key] = size
            parts.append((whole, size))
            size += -(-whole.nbytes // ALIGNMENT) * ALIGNMENT
        places[name] = (*form, known[key])
    memory = torch.zeros(max(size, ALIGNMENT), dtype=torch.uint8, device=device)
    for whole, at in parts:
        _view(torch, memory, str(whole.dtype).removeprefix("torch."), whole.shape, whole.stride(), at).copy_(whole)
    return Block(memory, places)


def exported(block: Block) -> Message:
    """How another process maps a block, as JSON can hold it; the block has to outlive all who do."""
    storage = block.memory.untyped_storage()
    on_gpu = block.memory.is_cuda
    handle = storage._share_cuda_() if on_gpu else storage._share_filename_cpu_()
    words = [{"hex": part.hex()} if isinstance(part, bytes) else part for part in handle]
    return {"cuda": on_gpu, "handle": words, "places": block.places, "sum": total(block.memory)}


def total(memory: Any) -> int:
    """Sum of a block, as numbers of 4 bytes: who maps it compares."""
    import torch

    return int(memory.view(torch.int32).sum())


def fill(module: Any, told: Message) -> None:
    """Let every parameter and buffer of a module be a view of the block that `told` describes.

    Raises
    ------
    NotShared
        If the block cannot be mapped, is not what it was, or belongs to another network.
    """
    import torch

    here = {name: list(tensor.shape) for name, tensor in tensors(module)}
    there = {name: place[1] for name, place in told["places"].items()}
    if here != there:
        raise NotShared("the network that holds the parameters is another one: its tensors have other names or shapes")
    handle = [bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in told["handle"]]
    kind: Any = torch.UntypedStorage
    try:
        storage = (kind._new_shared_cuda if told["cuda"] else kind._new_shared_filename_cpu)(*handle)
        memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        seen = total(memory)
    except Exception as error:  # whatever it is, the network can be loaded as ever
        raise NotShared(f"the block cannot be mapped: {error}") from error
    if seen != told["sum"]:
        raise NotShared(f"the mapped block sums to {seen}, not to {told['sum']}")
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for table, wrap in ((owner._parameters, _constant), (owner._buffers, lambda view: view)):
            for name in [name for name, tensor in table.items() if tensor is not None]:
                table[name] = wrap(_view(torch, memory, *told["places"][f"{prefix}.{name}" if prefix else name]))


def mapped(module: Any, path: str, asked: Message, load_s: float = LOAD_S, map_s: int = MAP_S) -> socket.socket:
    """Fill a module with parameters that the host at `path` holds for the network `asked`.

    Returns
    -------
    socket.socket
        Readable once the host is gone: what was mapped is not to be trusted from then on (see `gone`).

    Raises
    ------
    NotShared
        If that cannot be: the module has to be loaded as ever then.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.settimeout(load_s)
        line.connect(path)
        line.sendall(encode(asked))
        with line.makefile("rb") as answers:
            told = json.loads(answers.readline() or b'{"error": "it ended"}')
        if "error" in told:
            raise NotShared(f"the process that holds the parameters says: {told['error']}")
        with ended_after(map_s):
            fill(module, told)
    except (OSError, ValueError) as error:
        line.close()
        raise NotShared(f"the process that holds the parameters does not answer: {error}") from error
    except BaseException:
        line.close()
        raise
    return line


def gone(line: socket.socket) -> bool:
    """Whether the process that holds what was mapped has ended."""
    return bool(select.select([line], [], [], 0)[0])


@contextlib.contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    """Let the kernel end this process by SIGALRM if the block takes longer: a driver that hangs hears nothing else."""
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _view(torch: Any, memory: Any, dtype: str, shape: Any, stride: Any, at: int) -> Any:
    kind = getattr(torch, dtype)
    return torch.empty(0, dtype=kind, device=memory.device).set_(memory.untyped_storage(), at // kind.itemsize, shape, stride)


def _constant(view: Any) -> Any:
    import torch

    return torch.nn.Parameter(view, requires_grad=False)
