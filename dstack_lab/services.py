"""What is asked of the GPU (`Service`), what each service is given (`Allocation`), and both together (`Plan`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dstack_lab.arrivals import Arrivals
from dstack_lab.checks import count, non_negative, percent, positive, require
from dstack_lab.contention import Contention
from dstack_lab.provenance import Provenance
from dstack_lab.tables import ServiceTable as ServiceTable


@dataclass(frozen=True, slots=True)
class Service:
    """One network that answers requests: a model, an SLO and its arrivals.

    Parameters
    ----------
    model : str
        Network, as the profile names it.
    slo_ms : float
        A request is in time if it finishes at most this long after its arrival [ms].
    arrivals : Arrivals
        When requests come: `Poisson`, `Gamma`, `Deterministic`, `Steps`, `Drift`, `Replay`.
    name : str, optional
        Name in tables and figures; the model's by default. Names in one plan are distinct.
    """

    model: str
    slo_ms: float
    arrivals: Arrivals
    name: str = ""

    def __post_init__(self) -> None:
        require(isinstance(self.model, str) and bool(self.model), "model", self.model, "a non-empty text")
        object.__setattr__(self, "slo_ms", positive("slo_ms", self.slo_ms))
        require(
            isinstance(self.arrivals, Arrivals), "arrivals", self.arrivals, "an arrival process such as Poisson(rate_rps=100)"
        )
        object.__setattr__(self, "name", self.name or self.model)

    @property
    def rate_rps(self) -> float:
        """Rate a plan is made for [requests/s]."""
        return self.arrivals.rate_rps


@dataclass(frozen=True, slots=True)
class Allocation:
    """Operating point of one service.

    Parameters
    ----------
    service : str
        Name of the service.
    gpu_pct : float
        Share of the GPU of each launch, 1 to 100.
    batch : int
        Largest batch of a launch.
    service_ms : float
        Predicted service time of that batch at that share [ms].
    rate_rps : float
        Rate it is sized for [requests/s]; below the service's own where a plan rejects load.
    binding : str
        Which constraint keeps it from a better point, in the words of `constraints.binding`; empty if unknown.
    """

    service: str
    gpu_pct: float
    batch: int
    service_ms: float
    rate_rps: float
    binding: str = ""

    def __post_init__(self) -> None:
        percent("gpu_pct", self.gpu_pct)
        count("batch", self.batch)
        positive("service_ms", self.service_ms)
        non_negative("rate_rps", self.rate_rps)

    @property
    def area_pct_ms(self) -> float:
        """GPU%·ms that one request costs when the batch is full."""
        return self.gpu_pct * self.service_ms / self.batch


class InfeasiblePlan(ValueError):
    """No plan meets every SLO; the message says which service asks for how much GPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Share and batch of each service, with the service times they were chosen from.

    Parameters
    ----------
    services : tuple of Service
    allocations : tuple of Allocation
        One per service, in the same order.
    tables : tuple of ServiceTable
        One per service, in the same order.
    shares : tuple of float
        GPU% that the device can grant, ascending.
    objective : str
        What the operating points were chosen for.
    provenance : Provenance
        Of the profile behind the tables.
    contention : Contention, optional
        What launches are expected to cost each other, for policies that choose who runs beside whom (`DStack`). The
        tables are of networks alone, so that whoever runs the plan can apply what is true there, once.
    """

    services: tuple[Service, ...]
    allocations: tuple[Allocation, ...]
    tables: tuple[ServiceTable, ...]
    shares: tuple[float, ...]
    objective: str
    provenance: Provenance
    contention: Contention | None = None

    def __post_init__(self) -> None:
        names = [s.name for s in self.services]
        require(len(names) > 0, "services", names, "1 or more")
        require(len(set(names)) == len(names), "service names", names, "distinct: give each Service a name of its own")
        same = names == [a.service for a in self.allocations] and len(self.tables) == len(names)
        require(same, "allocations", [a.service for a in self.allocations], f"one for each of {names}, in this order")
        for share in self.shares:
            percent("shares", share)
        require(len(self.shares) > 0 and list(self.shares) == sorted(self.shares), "shares", self.shares, "ascending GPU%")
        told = self.contention
        require(told is None or isinstance(told, Contention), "contention", told, "None or Contention()")

    def __getitem__(self, service: str) -> Allocation:
        """Return the allocation of the service of that name."""
        for allocation in self.allocations:
            if allocation.service == service:
                return allocation
        raise ValueError(f"service = {service!r}: must be one of {[a.service for a in self.allocations]}")

    @property
    def demand_pct(self) -> float:
        """GPU% needed on average to serve the planned rates in full batches; above 100 cannot be sustained."""
        return sum(a.rate_rps * a.area_pct_ms for a in self.allocations) / 1000

    def to_frame(self) -> pd.DataFrame:
        """Return one row per service: SLO, rate, share, batch, service time, knee, demand and what binds (NaN if unknown)."""
        rows = [
            {
                "service": s.name,
                "slo_ms": s.slo_ms,
                "rate_rps": round(a.rate_rps, 1),
                "gpu_pct": a.gpu_pct,
                "batch": a.batch,
                "service_ms": round(a.service_ms, 2),
                "knee_pct": t.knee_pct(a.batch),
                "demand_pct": round(a.rate_rps * a.area_pct_ms / 1000, 1),
                "binding": a.binding or np.nan,
            }
            for s, a, t in zip(self.services, self.allocations, self.tables, strict=True)
        ]
        return pd.DataFrame(rows)

    @property
    def _title(self) -> str:
        knows = "" if self.contention is None else f", knows of {self.contention}"
        return f"Plan for {self.objective} from {self.provenance}{knows}"

    def __repr__(self) -> str:
        return f"{self._title}\n{self.to_frame().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{self._title}</p>{self.to_frame().to_html(index=False)}"
