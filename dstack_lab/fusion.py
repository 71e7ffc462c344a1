"""Which operations an inference stack runs as one kernel.

Only what every stack does (TensorRT, cuDNN's and cuBLASLt's epilogues, torch.compile): a batch
normalisation folded into the convolution before it; activations, additions and scalings applied as
a product writes its result; chains of element-wise operations; attention as one kernel; whatever
does not depend on the input computed beforehand.
"""

from __future__ import annotations

from collections import Counter

from dstack_lab.operations import Operation, Value

PRODUCTS = ("conv", "matmul", "depthwise")


def merge_attention(operations: list[Operation], every: bool) -> list[Operation]:
    """Make one kernel of product, softmax and product.

    ``scaled_dot_product_attention`` comes apart on the meta device, yet is one kernel on a GPU; its
    softmax is told by its name. With `every`, attention that was written out by hand is merged too.
    """
    softmaxes = ("_safe_softmax", "_softmax") if every else ("_safe_softmax",)
    operations = list(operations)
    for softmax in [op for op in operations if op.operator in softmaxes]:
        maker = {value: op for op in operations for value in op.writes}
        readers = _readers(operations)
        before: list[Operation] = []
        op = softmax
        while op.kind != "matmul":  # back, through masks and scalings, to the scores
            first = next((maker[v] for v in op.reads if v in maker and maker[v].kind in ("matmul", "pointwise", "copy")), None)
            if first is None or any(len(readers[v]) > 1 for v in first.writes):
                break
            op = first
            before.append(op)
        after = [r for v in softmax.writes for r in readers[v]]
        while len(after) == 1 and after[0].kind in ("pointwise", "copy"):
            before.append(after[0])
            after = [r for v in after[0].writes for r in readers[v]]
        if op.kind != "matmul" or len(after) != 1 or after[0].kind != "matmul":
            continue
        scores, mixed = op, after[0]
        merged = _union([*reversed(before), softmax, mixed])
        merged.operator, merged.kind = "attention", "attention"
        merged.rows, merged.groups = scores.rows, scores.groups
        merged.cols, merged.depth = mixed.cols, scores.depth + mixed.depth
        gone = [*before, softmax, mixed]
        # scalings and re-orderings that only prepare its inputs are done as it reads them
        while ready := [
            p
            for v in merged.reads
            if (p := maker.get(v)) is not None
            and not any(p is g for g in gone)
            and p.kind in ("pointwise", "copy")
            and all(any(r is g for g in gone) for w in p.writes for r in readers[w])
        ]:
            merged = _prepend(ready[0], merged)
            gone.append(ready[0])
        place = next(i for i, o in enumerate(operations) if o is mixed)
        out = [r for v in merged.writes for r in readers[v]]
        if len(out) == 1 and out[0].kind == "copy" and out[0].size == merged.size:  # it writes in any order
            merged.writes, merged.parts = out[0].writes, [*merged.parts, *out[0].parts]
            gone.append(out[0])
        operations[place] = merged
        operations = [o for o in operations if not any(o is g for g in gone)]
    return operations


def fuse(operations: list[Operation]) -> list[Operation]:
    """Fold constants, then merge each element-wise operation into what made its input."""
    constant = {v for op in operations if op.constant for v in op.writes}
    kept = [op for op in operations if not op.constant]
    if not kept:  # a network without inputs: nothing is known beforehand
        kept, constant = list(operations), set()
    done: list[Operation] = []
    readers = Counter(value for op in kept for value in op.reads)
    maker: dict[Value, Operation] = {}
    for op in kept:
        host = _host(op, maker, readers) if op.kind in ("pointwise", "norm") else None
        if host is not None:
            done = [o for o in done if o is not host]
            op = _epilogue(host, op, constant)
        done.append(op)
        maker.update(dict.fromkeys(op.writes, op))
    return done


def _host(op: Operation, maker: dict[Value, Operation], readers: Counter[Value]) -> Operation | None:
    """Return the latest kernel that could also do `op` as it writes: same size, read by nobody else."""
    fitting = [
        p
        for v in op.reads
        if (p := maker.get(v)) is not None
        and (p.kind in PRODUCTS or (p.kind in ("pointwise", "norm") and op.kind == "pointwise"))
        and p.size == op.size
        and readers[v] == 1
        and len(p.writes) == 1
    ]
    products = [p for p in fitting if p.kind in PRODUCTS]
    return (products or fitting)[-1] if fitting else None


def _epilogue(host: Operation, op: Operation, constant: set[Value]) -> Operation:
    inner = set(host.writes)
    # a folded normalisation only changes the weights: nothing more is read
    extra = {} if op.kind == "norm" else {v: size for v, size in op.reads.items() if v not in inner and v not in constant}
    reads = {**host.reads, **extra}
    return Operation(
        host.operator, host.kind, host.flops + op.flops, reads, op.writes, host.rows, host.cols, host.depth, host.groups,
        host.winograd, size=op.size, parts=[*host.parts, *op.parts],
    )  # fmt: skip


def _union(ops: list[Operation]) -> Operation:
    made = {v for op in ops[:-1] for v in op.writes}
    reads: dict[Value, float] = {}
    for op in ops:
        for v, size in op.reads.items():
            if v not in made:
                reads[v] = reads.get(v, 0.0) + size
    last = ops[-1]
    parts = [name for op in ops for name in op.parts]
    flops = sum(op.flops for op in ops)
    return Operation(last.operator, last.kind, flops, reads, last.writes, last.rows, size=last.size, parts=parts)


def _prepend(op: Operation, to: Operation) -> Operation:
    to.reads = {v: size for v, size in to.reads.items() if v not in op.writes}
    for v, size in op.reads.items():
        to.reads[v] = max(to.reads.get(v, 0.0), size)
    return to


def _readers(operations: list[Operation]) -> dict[Value, list[Operation]]:
    found: dict[Value, list[Operation]] = {v: [] for op in operations for v in op.writes}
    for op in operations:
        for v in op.reads:
            found.setdefault(v, []).append(op)
    return found
