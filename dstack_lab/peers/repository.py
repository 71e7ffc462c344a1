"""A model repository for Triton Inference Server: what `policies.Triton` says, in the server's own words."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dstack_lab.checks import count, require
from dstack_lab.policies import Triton
from dstack_lab.services import Plan

#: Different example inputs that a network holds at least, as our own workers do.
POOL = 64

#: Numbers that come back for a request: its class and score, then about its batch.
ANSWER = ("class", "score", "batch", "size", "service_ms", "cpu_ms")

CONFIG = """\
backend: "python"
max_batch_size: {max_batch}
dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}
instance_group [{{ count: 1 {kind} }}]
input [{{ name: "INPUT" data_type: TYPE_INT64 dims: [1] }}]
output [{{ name: "ANSWER" data_type: TYPE_FP64 dims: [{answer}] }}]
"""
#: Where a network computes -> how the server says that.
KINDS = {"cpu": "kind: KIND_CPU", "cuda": "kind: KIND_GPU gpus: [0]"}
PARAMETER = "parameters {{ key: {key} value: {{ string_value: {value} }} }}\n"


def names(plan: Plan) -> list[str]:
    """Names of the services on the server: those of the plan without what a folder's name cannot hold."""
    return [f"{i}-{re.sub(r'[^A-Za-z0-9_.]+', '_', s.name)}" for i, s in enumerate(plan.services)]


def settings(
    plan: Plan, policy: Triton | None = None, threads: int = 1, seed: int = 0, backend: str = "cpu"
) -> list[dict[str, Any]]:
    """What the server is to be told about each service.

    Raises
    ------
    ValueError
        If the policy is not one that the server follows, or a number is out of range.
    """
    policy = Triton() if policy is None else policy
    require(isinstance(policy, Triton), "policy", policy, "a Triton(): the server follows no other rule")
    require(not policy.drop_late, "policy.drop_late", True, "False: the server itself drops nothing")
    require(backend in KINDS, "backend", backend, f"one of {', '.join(KINDS)}")
    policy.reset(plan)
    shared = {"threads": str(count("threads", threads)), "seed": str(count("seed", seed, least=0)), "backend": backend}
    return [
        {
            "max_batch": policy.most[service.name],
            "delay_us": round(policy.delay_ms * 1000),
            "parameters": {"model": service.model, "pool": str(max(POOL, table.batch_max)), **shared},
        }
        for service, table in zip(plan.services, plan.tables, strict=True)
    ]


def write_repository(
    plan: Plan,
    folder: str | os.PathLike[str],
    policy: Triton | None = None,
    threads: int = 1,
    seed: int = 0,
    backend: str = "cpu",
) -> Path:
    """Write a model repository that a Triton server of one's own can serve to `peers.triton`.

    Each network is one instance of Triton's Python backend. The server's Python must have dstack_lab and
    torch; an environment variable ``PYTHONPATH`` of the server may say where.

    Parameters
    ----------
    plan : Plan
    folder : path
        Where to write; what it holds under the same names is overwritten.
    policy : Triton, optional
        Its ``max_batch`` and ``delay_ms`` become the server's dynamic batching; ``Triton()`` by default.
    threads : int
        Threads that each network computes with: all cores of the server, for the policy's rule.
    seed : int
        Of weights and inputs.
    backend : {"cpu", "cuda"}
        Where the networks compute; on a GPU in half precision and with CUDA graphs, as our workers there. That
        was never yet tried on a GPU.

    Returns
    -------
    Path
        The folder, for ``tritonserver --model-repository``.

    Raises
    ------
    ValueError
        If the policy drops requests, or a number is out of range.
    """
    root = Path(folder)
    for name, told in zip(names(plan), settings(plan, policy, threads, seed, backend), strict=True):
        version = root / name / "1"
        version.mkdir(parents=True, exist_ok=True)
        config = CONFIG.format(**told, kind=KINDS[backend], answer=len(ANSWER))
        for key, value in told["parameters"].items():
            config += PARAMETER.format(key=json.dumps(key), value=json.dumps(value, ensure_ascii=False))
        (root / name / "config.pbtxt").write_text(config, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("served_model.py"), version / "model.py")
    return root
