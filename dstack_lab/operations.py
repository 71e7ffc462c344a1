"""What a network asks of the GPU, operation by operation: recorded on the meta device.

The module is run once on tensors that have a shape but no memory. PyTorch's dispatcher says which
operations happen and what their results look like, and its FLOP counter what each costs, so no
layer is described by hand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

#: A tensor's content: where it is stored, and how often that was written to.
Value = tuple[int, int]

CURE = "trace it on a GPU and use from_trace, or give a measured profile"


@dataclass(slots=True)
class Operation:
    """One operation as recorded; `fusion.fuse` merges some of them into one kernel.

    ``flops`` counts 2 per multiply-add of matrix products and convolutions, as PyTorch does.
    ``reads`` and ``writes`` map each tensor's content to bytes. A product is ``groups`` matrices of
    ``rows`` x ``depth`` times ``depth`` x ``cols``; for anything else ``rows`` counts the results
    (kind "rows": the rows that are reduced) and ``cols`` is 1.
    """

    operator: str
    kind: str
    flops: float
    reads: dict[Value, float]
    writes: dict[Value, float]
    rows: float
    cols: float = 1.0
    depth: float = 1.0
    groups: float = 1.0
    winograd: bool = False
    constant: bool = False
    size: float = 0.0
    parts: list[str] = field(default_factory=list)


#: Operations that reorder or gather numbers without computing.
COPIES = {"cat", "clone", "copy", "copy_", "_to_copy", "embedding", "index", "index_select", "gather", "stack", "repeat"}
#: Of these, the first tensor is only read where the result needs it.
GATHERS = {"embedding", "index", "index_select", "gather"}
#: Operations that need a whole row at once.
ROWWISE = {"_softmax", "_safe_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "_fused_rms_norm"}
BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
#: Operations that reserve memory but launch nothing.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "detach"}


def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Operation]:
    """Run `module` once on meta copies of its weights and `inputs`; return its operations in order.

    The module itself, its weights and its buffers stay as they are.

    Raises
    ------
    ValueError
        If the module's control flow or shapes depend on numbers, which meta tensors do not have.
    """
    state = {n: t.detach().to("meta") for n, t in (*module.named_parameters(), *module.named_buffers())}
    recorder = _Recorder()
    inputs = tuple(t.detach().to("meta") for t in inputs)
    recorder.given(inputs)
    fast = torch.backends.mha.get_fastpath_enabled()
    was_training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path hides its parts
        with torch.no_grad(), recorder:
            torch.func.functional_call(module, state, inputs)
    except Exception as error:  # whatever the module's own code raises on shapes without numbers
        raise ValueError(
            f"module {type(module).__name__} = cannot be traced on the meta device "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}): {CURE}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part in was_training:
            part.training = True
    if not recorder.operations:
        raise ValueError(f"module {type(module).__name__} = no operation recorded: must compute something with tensors")
    return _without_unused_results(recorder.operations)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears every operation the dispatcher runs, and keeps all of it on meta."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.version: dict[int, int] = {}
        self.from_input: set[Value] = set()
        self.kept: list[Tensor] = []  # a freed tensor's address would be given to another
        self.moved: dict[int, Tensor] = {}

    def given(self, inputs: Iterable[Tensor]) -> None:
        """Note which values are the network's inputs: all else is known before a request arrives."""
        for tensor in inputs:
            self.from_input.add(self.value(tensor))

    def value(self, tensor: Tensor) -> Value:
        self.kept.append(tensor)
        storage = tensor.untyped_storage()._cdata
        return storage, self.version.get(storage, 0)

    def _to_meta(self, thing: Any) -> Any:
        if isinstance(thing, Tensor) and not thing.is_meta:
            if id(thing) not in self.moved:
                self.kept.append(thing)
                self.moved[id(thing)] = thing.to("meta")
            return self.moved[id(thing)]
        return torch.device("meta") if isinstance(thing, torch.device) else thing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._to_meta, (args, kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = [self.value(t) for t in inputs]
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._overloadpacket.__name__
        written = _written(func, args, kwargs)
        if not written:
            old = {v[0] for v in before}
            if name in SILENT or not results or all(t.untyped_storage()._cdata in old for t in results):
                for t in results:
                    self.kept.append(t)
                return out  # a view: another look at the same bytes
        for tensor in written:
            storage = tensor.untyped_storage()._cdata
            self.version[storage] = self.version.get(storage, 0) + 1
        self._note(func, name, args, kwargs, inputs, before, written or results, out)
        return out

    def _note(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        before: list[Value],
        results: list[Tensor],
        out: Any,
    ) -> None:
        reads: dict[Value, float] = {}
        for i, (tensor, value) in enumerate(zip(inputs, before, strict=True)):
            size = _bytes(tensor)
            if name in GATHERS and i == 0:
                size = min(size, _bytes(results[0]))
            whole = float(tensor.untyped_storage().nbytes())
            reads[value] = min(reads.get(value, 0.0) + size, max(whole, size))
        writes = {self.value(t): _bytes(t) for t in results if t.numel()}
        constant = not any(v in self.from_input for v in reads)
        if not constant:
            self.from_input.update(writes)
        count: Callable[..., Any] | None = flop_registry.get(func._overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
        first = results[0]
        op = Operation(
            name, "pointwise", flops, reads, writes, float(first.numel()), constant=constant, size=float(first.numel())
        )
        if count:
            _shape_product(op, name, args, first)
        elif name in COPIES:
            op.kind = "copy"
        elif name in ROWWISE:
            width = (
                first.shape[-1]
                if name.endswith("softmax")
                else prod(args[1])
                if name == "native_layer_norm"
                else first[0].numel()
            )
            op.kind, op.rows = "rows", first.numel() / max(int(width), 1)
        elif name in BATCH_NORMS:
            op.kind, op.groups = "norm", float(first.shape[1])
        elif torch.Tag.pointwise not in func.tags:
            op.kind = "reduction"
        op.parts = [name]
        self.operations.append(op)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that the operation changes in place."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    # batch norm's running statistics are marked as written, but evaluation leaves them alone
    return [] if func._overloadpacket.__name__ in BATCH_NORMS else found


def _bytes(tensor: Tensor) -> float:
    """Bytes that are really there: an expanded dimension is stored once."""
    there = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step != 0 or n == 0)
    return float(prod(there) * tensor.element_size())


def _shape_product(op: Operation, name: str, args: Any, out: Tensor) -> None:
    """Fill in the matrices that a product or convolution multiplies."""
    op.kind = "matmul"
    size = float(out.numel())
    if "attention" in name:
        query, key = args[0], args[1]
        op.kind, op.groups = "attention", float(prod(query.shape[:-2]))
        op.rows, op.cols, op.depth = float(query.shape[-2]), float(query.shape[-1]), 2.0 * float(key.shape[-2])
        return
    if name in ("convolution", "_convolution", "cudnn_convolution"):
        weight, stride, dilation = args[1], args[3], args[5]
        transposed, op.groups = bool(args[6]), float(args[8])
        op.kind = "conv"
        op.cols = float(weight.shape[1] if transposed else weight.shape[0] / op.groups)
        square = tuple(weight.shape[2:]) == (3, 3) and set(stride) == {1} and set(dilation) == {1}
        op.winograd = square and op.groups == 1 and not transposed
        if op.groups > 1 and op.groups == weight.shape[0]:
            op.kind = "depthwise"
    else:
        op.cols = float(out.shape[-1])
        left, right = (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])
        if out.dim() == 3 and 0 not in (left.stride(0), right.stride(0)):
            op.groups = float(out.shape[0])  # else one matrix serves the whole batch: one tall product
    op.rows = size / op.cols / op.groups
    op.depth = op.flops / (2.0 * size) if size else 1.0


def _without_unused_results(operations: list[Operation]) -> list[Operation]:
    """Drop the bytes of side results that nothing reads, such as a pooling's indices."""
    used = {value for op in operations for value in op.reads}
    for op in operations:
        first = next(iter(op.writes), None)
        op.writes = {v: size for v, size in op.writes.items() if v == first or v in used}
    return operations
