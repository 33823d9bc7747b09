"""What a figure was measured with, and the memory it took."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch


def machine() -> str:
    """One line on what the figures were measured with."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def peak_memory_mb() -> dict[str, int]:
    """The most that this process, and the largest of its loader processes, had resident so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # what getrusage counts in
    who = {"training": resource.RUSAGE_SELF, "largest loader process": resource.RUSAGE_CHILDREN}
    return {name: resource.getrusage(number).ru_maxrss // unit for name, number in who.items()}
