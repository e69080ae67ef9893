"""A rank's process: what it keeps from step to step."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import torch
from planner.execute.process import keep_freed_memory

def faults():
    for _ in range(5):  # the first ones warm up, and may leave gaps that do not fit the next
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
print(first, faults())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc's way to give memory back")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    before, kept = map(int, done.stdout.split())
    pages = 2**26 // resource.getpagesize()
    assert kept < 0.01 * pages < before
