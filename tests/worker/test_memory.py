"""The engine's thread takes its memory as a process's first thread does."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading, torch
if sys.argv[1] == "shared":
    from worker.memory import share_one_arena
    assert share_one_arena()
torch.set_num_threads(1)

def work() -> None:
    for _ in range(40):
        (torch.ones(4 * 2**20) * 2).sum()  # a map of 16 MB, made and dropped

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
thread = threading.Thread(target=lambda: found.extend([faults(), faults()]))
thread.start()
thread.join()
print(found[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_a_thread_does_not_fault_the_pages_of_its_maps_in_anew() -> None:
    own, shared = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("own", "shared")
    )
    # A quarter was seen: what is freed at the arena's end still goes back to the system.
    assert shared < own / 2
