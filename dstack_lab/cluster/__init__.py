"""Several GPUs: which services and replicas on which one, who serves a request, and what no cluster can pass."""

from dstack_lab.cluster.dispatch import Dispatch, LeastWork, Random, RoundRobin
from dstack_lab.cluster.gpus import Cluster
from dstack_lab.cluster.limits import ClusterBound, cluster_bound
from dstack_lab.cluster.placement import Placement, Replica, place
from dstack_lab.cluster.simulate import ClusterTrace, simulate_cluster

__all__ = [
    "Cluster",
    "ClusterBound",
    "ClusterTrace",
    "Dispatch",
    "LeastWork",
    "Placement",
    "Random",
    "Replica",
    "RoundRobin",
    "cluster_bound",
    "place",
    "simulate_cluster",
]
