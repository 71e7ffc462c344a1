"""What a recorded run was made with, in plain values that a trace carries: its plan with service times, its policy."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from dstack_lab import policies
from dstack_lab.contention import Contention
from dstack_lab.policies.base import Policy
from dstack_lab.provenance import Provenance
from dstack_lab.services import Allocation, Plan, Service, ServiceTable

#: Plain values and, under ``"tables"``, an array of service times for each service.
Recipe = Mapping[str, Any]

#: Parameters that a policy keeps under another name, since their own is a method's.
KEPT_AS = {"shares": "start"}


def recipe_of(plan: Plan, policy: Policy) -> Recipe:
    """Return the recipe of a run that is about to begin: a policy may change itself while it runs."""
    return {
        "policy": described(policy),
        "allocations": [asdict(a) for a in plan.allocations],
        "shares": list(plan.shares),
        "objective": plan.objective,
        "provenance": plan.provenance.to_dict(),
        "contention": None if plan.contention is None else asdict(plan.contention),
        "tables": [table.ms for table in plan.tables],
    }


def plan_of(recipe: Recipe, services: Iterable[Service]) -> Plan:
    """Return the plan of a recipe for the same services, in their order."""
    told = recipe.get("contention")
    return Plan(
        tuple(services),
        tuple(Allocation(**a) for a in recipe["allocations"]),
        tuple(ServiceTable(ms) for ms in recipe["tables"]),
        tuple(recipe["shares"]),
        recipe["objective"],
        Provenance.from_dict(recipe["provenance"]),
        None if told is None else Contention(**told),
    )


def described(policy: Policy) -> Recipe | None:
    """Return name and parameters of one of this package's policies; None if plain values cannot tell them."""
    kind = type(policy)
    if getattr(policies, kind.__name__, None) is not kind:
        return None
    try:
        parameters = {name: getattr(policy, KEPT_AS.get(name, name)) for name in _parameters(kind)}
        return {"name": kind.__name__, "parameters": json.loads(json.dumps(parameters))}
    except (AttributeError, TypeError):
        return None


def policy_of(recipe: Recipe) -> Policy | None:
    """Return a fresh policy with the recipe's parameters; None if the recipe does not tell."""
    told = recipe["policy"]
    if told is None:
        return None
    kind = getattr(policies, told["name"])
    policy: Policy = kind(**told["parameters"])
    return policy


def _parameters(kind: type) -> list[str]:
    """Names that ``kind(...)`` takes; what it hands on as ``**options`` are its base's."""
    found: list[str] = []
    for one in kind.__mro__:
        if "__init__" not in vars(one) or one is object:
            continue
        parameters = list(inspect.signature(vars(one)["__init__"]).parameters.values())[1:]
        found += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in found]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found
