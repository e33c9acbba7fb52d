"""What a measurement ran on: facts that explain a number, none that name the machine or its owner."""

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from formery import __version__

GIBIBYTE = 2**30


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, memory and operating system."""
    return {**_fixed(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Of Python, torch and this package."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "formery": __version__}


@cache
def _fixed() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": usable or 1,
        "memory_gib": _memory(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown"


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIBIBYTE, 1)
    except (AttributeError, OSError, ValueError):
        return None
