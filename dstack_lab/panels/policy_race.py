"""Who wins, and when? Policies under the same requests, beside the bound."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from dstack_lab import figures
from dstack_lab.checks import require
from dstack_lab.metrics import ALL, summary
from dstack_lab.panels.base import Look
from dstack_lab.panels.racing import Policies, Racing, ran
from dstack_lab.profiles import DEFAULT_PROFILE, Profile
from dstack_lab.services import Service
from dstack_lab.simulator import sample_arrivals
from dstack_lab.trials import bound_rps
from dstack_lab.workloads import WORKLOADS

ARRIVALS = (("Poisson", "poisson"), ("bursty (gamma, cv 3)", "gamma"))


class PolicyRace(Racing):
    """Policies side by side under one load.

    Parameters
    ----------
    workload : str
        Which of `lab.workload`'s to begin with.
    profile : Profile, str or path
        Or its name, as for `lab.load_profile`.
    policies : policies or mapping of str to Policy, optional
        Who races, one's own classes too. By default D-STACK, which turns away what would be late, and the
        baselines as their systems do.
    duration_ms : float
        Of each run [ms].
    services : iterable of Service, optional
        One's own instead of a workload: their rates are scaled to the load, and come as they say or as `arrivals` does.

    Attributes
    ----------
    workload, load, arrivals, seed
        Controls. `load` is a part of what any schedule could serve on average; ``bound_rps`` of the facts is
        the bound for the requests that came.
    """

    def __init__(
        self,
        workload: str = "C-4",
        profile: Profile | str | os.PathLike[str] = DEFAULT_PROFILE,
        policies: Policies | None = None,
        duration_ms: float = 2000.0,
        services: Iterable[Service] | None = None,
    ) -> None:
        super().__init__(profile, policies, duration_ms, services)
        names = list(WORKLOADS) if self.services is None else ["own services"]
        first = workload if self.services is None else names[0]
        self.workload = self._choice("workload", "Workload", names, "Which networks share the GPU", first)
        self._add_load()
        offered = ARRIVALS if self.services is None else (("as the services say", "own"), *ARRIVALS)
        self.arrivals = self._choice("arrivals", "Arrivals", offered, "How requests come")
        self._add_seed()
        self._begin()

    def _look(self) -> Look:
        name, load, kind, seed = self.workload.value, self.load.value, self.arrivals.value, self.seed.value
        plan = self._plan(name, None if kind == "own" else kind)
        came = [times.size * 1000 / self.duration_ms for times in sample_arrivals(plan, self.duration_ms, seed)]
        limit = bound_rps(plan, came)[ALL]
        require(limit > 0, "load", load, f"high enough that a request comes within {self.duration_ms:g} ms")
        rows, said, failed, origin = [], [], [], str(self.profile.provenance)
        for policy_name, policy in self.policies.items():
            trace, words = ran(plan, policy, policy_name, self.duration_ms, seed)
            said += [words] if words else []
            if trace is None:
                failed.append(policy_name)
                rows.append(pd.DataFrame({"policy": policy_name, "service": [s.name for s in plan.services]}))
            else:
                origin = f"{replace(trace.provenance, marks=())}; seed {seed}, {self.duration_ms:g} ms"
                rows.append(summary(trace).assign(policy=policy_name))
        columns = ["goodput_rps", "slo_attainment", "p99_ms"]
        table = pd.concat([row.reindex(columns=["policy", "service", *columns]) for row in rows], ignore_index=True)
        whole = table[table["service"] == "all"].set_index("policy")["goodput_rps"]
        reached = {p: round(float(whole[p]), 1) for p in self.policies if p not in failed}
        ranked = sorted(reached, key=lambda p: -reached[p])
        goodput = {p: reached.get(p) for p in self.policies}
        best = ranked[0] if ranked else None
        facts = {
            "workload": name,
            "load": round(load, 3),
            "arrivals": kind,
            "seed": seed,
            "bound_rps": round(limit, 1),
            "goodput_rps": goodput,
            "best": best,
        }
        if best is None:
            words = f"At a load of {load:g} no policy came to an end."
        else:
            words = f"At a load of {load:g}, at most {limit:,.0f} requests/s of those that came can be in time. In this run: "
            words += ", ".join(f"{p} {reached[p]:,.0f} ({reached[p] / limit:.0%})" for p in ranked) + "."
            words += f" {', '.join(failed)} did not finish." if failed else ""
        return Look(facts, words, figures.comparison(table, origin, limit), "; ".join(said))
