"""CUDA's errors in plain words, with the cure."""

from __future__ import annotations

import re

#: Number, names and words of each of CUDA's MPS errors, and what to do.
_CURES = {
    "805": (
        r"MPS_CONNECTION_FAILED|MpsConnectionFailed|failed to connect to the MPS",
        "no way to the MPS daemon (805): it died, or belongs to another user. Close all workers and start again",
    ),
    "806": (
        r"MPS_RPC_FAILURE|MpsRpcFailure|MPS.{0,40}remote procedural call|MPS client-server RPC",
        "the MPS server stopped answering (806): a fault of another worker? Close all workers and start again",
    ),
    "807": (
        r"MPS_SERVER_NOT_READY|MpsServerNotReady|MPS server is not ready",
        "the MPS server takes no clients now (807): after a fault it does so once all workers have ended. Close them all",
    ),
    "808": (
        r"MPS_MAX_CLIENTS_REACHED|MpsMaxClientsReached|required to create (an )?MPS client",
        "the GPU has as many MPS clients as it takes (808): close some, or plan fewer shares",
    ),
    "809": (
        r"MPS_MAX_CONNECTIONS_REACHED|MpsMaxConnectionsReached|required to support device connections",
        "the GPU has no connection left (809): close some workers, or unset CUDA_DEVICE_MAX_CONNECTIONS",
    ),
    "810": (
        r"MPS_CLIENT_TERMINATED|MpsClientTerminated|MPS client has been terminated",
        "the MPS server ended this worker (810): only a fresh one can go on",
    ),
    "46": (
        r"cudaErrorDevicesUnavailable|devices? is/are busy or unavailable",
        "another process has the GPU to itself (46): end it, or as root: nvidia-smi -c DEFAULT",
    ),
    "2": (
        r"CUDA out of memory|cudaErrorMemoryAllocation",
        "the GPU's memory is full: a smaller batch, fewer workers, or a higher memory_mib",
    ),
}


def cure_of(text: str) -> str | None:
    """What to do about an error message of CUDA; None if it is none of those known."""
    for number, (pattern, cure) in _CURES.items():
        code = len(number) == 3 and re.search(rf"\b(error code|CUDA error|CUDA_ERROR):? ?\(?{number}\b", text, re.IGNORECASE)
        if code or re.search(pattern, text):
            return cure
    return None


def with_cure(text: str) -> str:
    """Return `text`, preceded by its cure if one is known."""
    cure = cure_of(text)
    return text if cure is None else f"{cure}. It said: {text}"


def shared_fault(text: str) -> str | None:
    """What is wrong for all workers of the GPU, if an error message of one of them says so."""
    cure = cure_of(text)
    return cure if cure is not None and any(f"({number})" in cure for number in ("805", "806", "807")) else None
