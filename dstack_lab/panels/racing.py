"""What panels that simulate share: policies by name, and one run whose failure is a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dstack_lab.arrivals import Gamma, Poisson
from dstack_lab.bounds import checked_services
from dstack_lab.checks import positive, require
from dstack_lab.ledger import PolicyError
from dstack_lab.panels.base import Panel, as_profile
from dstack_lab.policies import Clipper, DStack, Gpulet, Gslice, Nexus, Policy, Temporal, Triton
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Plan, Service
from dstack_lab.simulator import simulate
from dstack_lab.traces import Trace
from dstack_lab.trials import plan_for
from dstack_lab.workloads import BURSTY_CV, load_of, scaled, workload

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


class Racing(Panel):
    """Base of the panels that simulate: policies, services, and the load they are put under.

    Parameters
    ----------
    profile, policies, duration_ms, services
        As the panels document them.
    """

    def __init__(
        self,
        profile: Profile | str | os.PathLike[str],
        policies: Policies | None,
        duration_ms: float,
        services: Iterable[Service] | None,
    ) -> None:
        super().__init__()
        self.profile = as_profile(profile)
        self.policies = named(policies)
        self.duration_ms = positive("duration_ms", duration_ms)
        self.services = None if services is None else checked_services(tuple(services), self.profile)

    def _add_load(self, value: float = 0.5) -> None:
        """Add the control `load`."""
        words = "1 is what the best schedule could serve"
        self.load = self._slider("load", "Load [part of bound]", 0.05, 1.5, value, words, step=0.05, live=False)

    def _add_seed(self) -> None:
        """Add the control `seed`."""
        self.seed = self._slider("seed", "Seed", 0, 999, 1, "Of the arrivals: every policy sees the same", live=False)

    def _plan(self, name: str, arrivals: str | None = None) -> Plan:
        """Plan for a workload's services at the load, or for one's own; see `services_at`."""
        return plan_for(services_at(self.load.value, self.profile, name, self.services, arrivals), self.profile, "efficacy", None)


def services_at(
    load: float, profile: Profile, name: str, services: Sequence[Service] | None = None, arrivals: str | None = None
) -> tuple[Service, ...]:
    """Services at a part of what any schedule could serve: a workload's, or `services` with their rates scaled to it.

    Without `arrivals`, a workload's requests come as Poisson streams and those of `services` as they say; with
    ``"poisson"`` or ``"gamma"``, in that way at the same rates.
    """
    if services is None:
        return workload(name, profile, load, arrivals=arrivals or "poisson")
    found = scaled(services, load / load_of(services, profile))
    if arrivals is None:
        return found
    return tuple(replace(s, arrivals=Gamma(s.rate_rps, BURSTY_CV) if arrivals == "gamma" else Poisson(s.rate_rps)) for s in found)


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
    return trace, idle(trace, name)


def idle(trace: Trace, name: str) -> str:
    """Say that a policy launched nothing, if so."""
    if len(trace.launches) or not len(trace.requests):
        return ""
    return f"{name} launched nothing: all {len(trace.requests)} requests went unserved; decide() must return a Launch"
