"""What panels that simulate share: policies by name, and one run whose failure is a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dstack_lab.bounds import checked_services
from dstack_lab.checks import require
from dstack_lab.ledger import PolicyError
from dstack_lab.policies import Clipper, DStack, Gpulet, Gslice, Nexus, Policy, Temporal, Triton
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Plan, Service
from dstack_lab.simulator import simulate
from dstack_lab.traces import Trace
from dstack_lab.workloads import load_of, scaled, workload

Policies = Iterable[Policy] | Mapping[str, Policy] | Policy


def named(policies: Policies | None) -> dict[str, Policy]:
    """Policies by name, in order; two of one name are numbered.

    Raises
    ------
    ValueError
        If there is none, or one is no policy.
    """
    if policies is None:
        policies = [DStack(reject=True), Temporal(), Triton(), Clipper(), Nexus(), Gslice(), Gpulet()]
    if isinstance(policies, Mapping):
        found = dict(policies)
    else:
        found = {}
        for policy in [policies] if isinstance(policies, Policy) else list(policies):
            good = isinstance(policy, Policy)
            require(good, "policies", policy, "policy objects such as DStack(), or a mapping of names to them")
            name, k = policy.name, 2
            while name in found:
                name, k = f"{policy.name} {k}", k + 1
            found[name] = policy
    require(bool(found), "policies", found, "1 or more")
    for policy in found.values():
        require(isinstance(policy, Policy), "policies", policy, "policy objects such as DStack()")
    return found


def services_at(
    load: float, profile: Profile, name: str, services: Sequence[Service] | None = None, arrivals: str = "poisson"
) -> tuple[Service, ...]:
    """Services at a part of what any schedule could serve: a workload's, or `services` with their rates scaled to it."""
    if services is None:
        return workload(name, profile, load, arrivals=arrivals)
    return scaled(services, load / load_of(services, profile))


def checked(services: Iterable[Service] | None, profile: Profile) -> tuple[Service, ...] | None:
    """Services that the profile knows; None stays None."""
    return None if services is None else checked_services(tuple(services), profile)


def ran(plan: Plan, policy: Policy, name: str, duration_ms: float, seed: int) -> tuple[Trace | None, str]:
    """Simulate, and say in words what kept a policy from scheduling.

    Returns
    -------
    trace : Trace or None
        None if the policy did not come to an end.
    words : str
        Empty if all is well.
    """
    try:
        trace = simulate(plan, policy, duration_ms, seed)
    except InfeasiblePlan as no:
        return None, f"{name} cannot schedule this: {no}"
    except PolicyError as broken:
        cause = broken.__cause__
        why = f" ({type(cause).__name__}: {cause})" if cause is not None and str(cause) not in str(broken) else ""
        return None, f"{name} broke a rule: {broken}{why}"
    except Exception as error:  # a reader's own class may fail anywhere
        return None, f"{name} failed: {type(error).__name__}: {error}"
    if not len(trace.launches) and len(trace.requests):
        return trace, f"{name} launched nothing: all {len(trace.requests)} requests went unserved; decide() must return a Launch"
    return trace, ""
