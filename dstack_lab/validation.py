"""Simulation against reality: a recorded run's requests through the simulator, and the errors that remain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import dstack_lab.policies as policies
from dstack_lab.arrivals import Poisson
from dstack_lab.bounds import service_tables
from dstack_lab.checks import require
from dstack_lab.contention import Contention
from dstack_lab.metrics import summary
from dstack_lab.optimizer import optimize
from dstack_lab.policies.base import Policy
from dstack_lab.profiles import Profile
from dstack_lab.recipes import plan_of, policy_of
from dstack_lab.services import Plan, Service
from dstack_lab.simulator import simulate
from dstack_lab.traces import Trace
from dstack_lab.variability import Variability

#: Error of rates and times as a part of what was recorded; of fractions as a difference.
RELATIVE = ("goodput_rps", "p99_ms")
ABSOLUTE = ("slo_attainment", "utilization")


def validate(
    trace: Trace,
    profile: Profile | None = None,
    policy: Policy | None = None,
    plan: Plan | None = None,
    variability: Variability | None = None,
    contention: Contention | None = None,
) -> pd.DataFrame:
    """Replay a run's requests through the simulator and say how far its numbers are from those recorded.

    Parameters
    ----------
    trace : Trace
        Of `run`, or of `simulate`.
    profile : Profile, optional
        Service times to simulate with: those measured on the machine of the run. By default those that the
        run was planned with, which a trace of `run` carries.
    policy : Policy, optional
        The run's, with its parameters. By default the one that a trace of `run` carries, else the policy of
        that name with its default parameters.
    plan : Plan, optional
        The run's: its shares, batches and planned rates are kept, its service times come from `profile`. By
        default the one that a trace of `run` carries, else the plan that `optimize` makes from `profile` for
        the services and rates of the run.
    variability : Variability, optional
        How service times scatter; see `simulate`.
    contention : Contention, optional
        What launches cost each other; see `simulate`.

    Returns
    -------
    pandas.DataFrame
        One row per service and one for all. For ``goodput_rps``, ``p99_ms``, ``slo_attainment`` and
        ``utilization``: the recorded value, ``..._simulated`` and ``..._error``: simulated over recorded, less
        one, for goodput and p99; simulated less recorded for the two fractions. An error above 0
        means that the simulation says more. ``attrs["provenance"]`` holds both origins.

    Raises
    ------
    ValueError
        If the policy's name is not one of this package's and no policy is given; if the plan or the
        profile does not fit the run.
    InfeasiblePlan
        If no plan fits the run's rates; pass the run's own.
    """
    require(isinstance(trace, Trace), "trace", type(trace).__name__, "a Trace")
    recipe = trace.recipe
    allowed = "a profile of the run's machine: this trace carries no plan (those of lab.run do)"
    require(profile is not None or recipe is not None, "profile", profile, allowed)
    if policy is None and recipe is not None:
        policy = policy_of(recipe)
    if policy is None:
        kind = getattr(policies, trace.policy, None)
        known = isinstance(kind, type) and issubclass(kind, Policy)
        require(known, "trace.policy", trace.policy, "the name of a policy of dstack_lab: pass policy=")
        policy = kind()  # type: ignore[misc]
    again = simulate(_replayed(trace, profile, plan), policy, trace.duration_ms, trace.seed, variability, contention)
    recorded, simulated = summary(trace), summary(again)
    table = recorded[["service"]].copy()
    for metric in (*RELATIVE, *ABSOLUTE):
        was, says = recorded[metric], simulated[metric]
        table[metric], table[f"{metric}_simulated"] = was, says
        # nothing recorded and nothing simulated agree; nothing recorded has no relative error otherwise
        parts = (says / was.where(was > 0) - 1).where(says != was, 0.0)
        table[f"{metric}_error"] = parts if metric in RELATIVE else says - was
    table.attrs["provenance"] = (trace.provenance, again.provenance)
    return table


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The requests of a run at the rate that was expected of them: a policy plans for the rate, not for what came."""

    rate_rps: float
    times_ms: NDArray[np.float64]

    def sample(self, duration_ms: float, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return all of them, whatever the generator."""
        return self.times_ms


def _replayed(trace: Trace, profile: Profile | None, plan: Plan | None) -> Plan:
    """Return the plan of the run with its very requests."""
    asked = [
        Service(str(model), float(slo), Poisson(float(rate)), str(name))
        for name, model, slo, rate in trace.services[["service", "model", "slo_ms", "rate_rps"]].itertuples(index=False)
    ]
    if plan is None and trace.recipe is not None:
        plan = plan_of(trace.recipe, asked)
    if plan is None:
        assert profile is not None  # without a recipe it was asked for
        plan = optimize(asked, profile, overload="reject")
    else:
        names, planned = [s.name for s in asked], [s.name for s in plan.services]
        require(names == planned, "plan.services", planned, f"those of the trace, in their order: {names}")
        for service in asked if profile is not None else ():
            assert profile is not None
            require(service.model in profile.models, f"model of {service.name}", service.model, f"one of {profile.models}")
    times = dict(list(trace.requests.groupby("service", observed=False)["arrival_ms"]))
    # a request in the last nanosecond was rounded up to the end, where the simulator would not take it
    last = np.nextafter(trace.duration_ms, 0)
    services = tuple(
        replace(s, arrivals=_Recorded(s.rate_rps, np.minimum(np.sort(times.get(s.name, np.empty(0))), last))) for s in asked
    )
    if profile is None:
        return replace(plan, services=services)
    tables = service_tables(asked, profile)
    for allocation, table in zip(plan.allocations, tables, strict=True):
        most = f"at most {table.batch_max}, the largest in the profile"
        require(allocation.batch <= table.batch_max, f"batch of {allocation.service}", allocation.batch, most)
    allocations = tuple(replace(a, service_ms=t.at(a.batch, a.gpu_pct)) for a, t in zip(plan.allocations, tables, strict=True))
    return replace(plan, services=services, allocations=allocations, tables=tables, provenance=profile.provenance)
