"""Where shares are real: each device hands out workers at a GPU%."""

from dstack_lab.devices.base import Device, Worker, WorkerDied, WorkerError, WorkerFailed, WorkerTimeout
from dstack_lab.devices.cpu import Cpu

__all__ = ["Cpu", "Device", "Worker", "WorkerDied", "WorkerError", "WorkerFailed", "WorkerTimeout"]
