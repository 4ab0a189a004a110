"""Laws of kept memory, each in a process of its own: it is a setting of the whole process."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
from infra.allocator import keep_freed_memory
import torch
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
x = torch.ones(1 << 24)
for _ in range(30):  # until the heap has room: how much it takes differs from process to process
    y = x + 1
    del y
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    y = x + 1
    del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_is_freed_is_used_again_without_a_page_fault() -> None:
    """Ten results of 64 MB, each freed before the next, by a process that has made such results before."""
    faults = {}
    for name in ("given back", "kept"):
        command = [sys.executable, "-c", COUNT_FAULTS, name.split()[0]]
        faults[name] = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert faults["kept"] < 100 < faults["given back"]  # 163,840 pages, or 320 huge ones
