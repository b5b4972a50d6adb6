"""What the engine's thread frees serves its next request."""

import itertools
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys, threading, torch
if sys.argv[1] == "kept":
    from worker.memory import keep_freed_memory
    assert keep_freed_memory()
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


ARENAS = """
import threading
together = threading.Barrier(5)
def work() -> None:
    kept = bytearray(10_000)
    together.wait()
    together.wait()
for _ in range(4):
    threading.Thread(target=work).start()
together.wait()
print("ready", flush=True)
input()
together.wait()
"""
GIVEN_BACK = """
import pathlib
from worker.memory import give_back_freed_memory, keep_freed_memory
assert keep_freed_memory()

def resident_kb() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])

blocks = [bytearray(b"x" * 2**20) for _ in range(200)]
last = blocks.pop()
blocks.clear()
kept = resident_kb()
give_back_freed_memory()
print(kept - resident_kb())
"""
_HEAP = 64 * 2**20

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")


def arenas_of_threads(pid: int) -> int:
    """Of a process, as its maps show them: parts of 64 MB at such addresses, used first and reserved behind that."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    spans = [
        (int(line[0].split("-")[0], 16), int(line[0].split("-")[1], 16), line[1]) for line in lines if len(line) == 5
    ]
    return sum(
        (used, reserved) == ("rw-p", "---p") and middle == again and began % _HEAP == ended % _HEAP == 0
        for (began, middle, used), (again, ended, reserved) in itertools.pairwise(spans)
    )


@glibc_only
def test_arenas_of_threads_are_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", ARENAS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert arenas_of_threads(child.pid) > 0
        child.communicate(b"\n")


@glibc_only
def test_a_thread_does_not_fault_the_pages_of_its_maps_in_anew() -> None:
    usual, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("usual", "kept")
    )
    assert kept < usual / 10  # 0 were seen beside 33 thousand; how many the usual ones are depends on the size of pages


@glibc_only
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 150 * 1024  # of 199 MB, below a block that is still in use
