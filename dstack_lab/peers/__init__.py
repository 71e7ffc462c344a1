"""Real servers beside our policies: the same requests, the same networks, the same cores, another scheduler."""

from __future__ import annotations

from dstack_lab.peers.race import triton
from dstack_lab.peers.repository import write_repository

__all__ = ["triton", "write_repository"]
