"""How much memory does loading a full-size model take, and how long, from each kind of file?

    python -m benchmarks.load_memory

A checkpoint of SD 1.5's size is written with random numbers (up to 4.3 GB of temporary disk), and each way to load it
runs in a process of its own. `peak` is the most resident memory since before the loading began, mapped pages of the
file included, over the size of the model at the dtype that it is loaded in; `check` is what looking for numbers that
are not finite takes of the time, the best of five looks. Prints a table and writes
`benchmarks/results/load_memory.json`; exits with 1 where a peak is above its bar. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import RESULTS, write
from sd_engine import load_model, shipped_model
from sd_engine.clip import ClipTextEncoder
from sd_engine.filling import is_finite
from sd_engine.keymaps import diffusers_name
from sd_engine.model import SD1
from sd_engine.unet import UNet
from sd_engine.vae import Vae
from tests.engine import ldm_names

# Of the model's size: room for the largest tensor in the file's dtype (152 MB in fp32: the text encoder's words) and
# for what the allocator keeps.
BAR = 1.15
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The file's dtype and suffix, and the dtype that it is loaded in.
WAYS = (
    ("fp16", ".safetensors", "fp16"),
    ("fp16", ".ckpt", "fp16"),
    ("fp32", ".safetensors", "fp16"),
    ("fp32", ".safetensors", "bf16"),
    ("fp32", ".safetensors", "fp32"),
    ("fp32", ".ckpt", "fp16"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One way to load: from what into what, the sizes in GB, the time in seconds."""

    file: str
    loaded_in: str
    file_gb: float
    model_gb: float
    peak_gb: float
    ratio: float
    seconds: float
    check_seconds: float


def write_checkpoint(path: Path, dtype: torch.dtype) -> None:
    """SD 1.5's tensors under their original names, one random tensor cut for each: what they say does not matter."""
    with torch.device("meta"):
        modules = {"text_encoder": ClipTextEncoder(SD1.text), "unet": UNet(SD1.unet), "vae": Vae(SD1.vae)}
    states = [
        {diffusers_name(component, name): tensor for name, tensor in module.state_dict().items()}
        for component, module in modules.items()
    ]
    names = ldm_names.checkpoint(*states)
    tensors = {name: torch.randn(1, dtype=dtype).expand(meta.shape).clone() for name, meta in names.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(path: Path, dtype: torch.dtype) -> Line:
    """Load once; runs in a fresh process."""
    load_model(shipped_model())  # what is imported or made on first use is not the checkpoint's
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts anew
    before, began = _status("VmRSS"), time.perf_counter()
    model = load_model(path, "cpu", dtype, tokenizer=shipped_model() / "tokenizer")
    seconds = time.perf_counter() - began
    peak = _status("VmHWM") - before
    tensors: list[Tensor] = [tensor for module in model.modules.values() for tensor in module.state_dict().values()]
    checked, size = min(_check(tensors) for _ in range(5)), sum(tensor.nbytes for tensor in tensors)
    return Line(
        path.name, str(dtype).removeprefix("torch."), path.stat().st_size / 1e9, size / 1e9, peak / 1e9, peak / size,
        seconds, checked,
    )  # fmt: skip


def _check(tensors: list[Tensor]) -> float:
    began = time.perf_counter()
    assert all(is_finite(tensor) for tensor in tensors)
    return time.perf_counter() - began


def _child(path: Path, dtype: torch.dtype, answers: multiprocessing.Queue[str]) -> None:
    answers.put(json.dumps(asdict(measure(path, dtype))))


def lines(folder: Path) -> Iterator[Line]:
    """Every way, each in a process of its own; one file at a time is on the disk."""
    spawn = multiprocessing.get_context("spawn")
    for stored, suffix in dict.fromkeys((stored, suffix) for stored, suffix, _ in WAYS):
        path = folder / f"{stored}{suffix}"
        writer = spawn.Process(target=write_checkpoint, args=(path, TYPES[stored]))
        writer.start()
        writer.join()
        for loaded in [loaded for *file, loaded in WAYS if file == [stored, suffix]]:
            answers: multiprocessing.Queue[str] = spawn.Queue()
            reader = spawn.Process(target=_child, args=(path, TYPES[loaded], answers))
            reader.start()
            yield Line(**json.loads(answers.get(timeout=600)))
            reader.join()
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "load_memory.json")
    args = parser.parse_args()
    found = []
    print(f"{'file':18} {'in':9} {'file GB':>8} {'model GB':>9} {'peak GB':>8} {'ratio':>6} {'s':>6} {'check s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(Path(folder)):
            print(f"{line.file:18} {line.loaded_in:9} {line.file_gb:8.2f} {line.model_gb:9.2f} {line.peak_gb:8.2f} "
                  f"{line.ratio:6.2f} {line.seconds:6.1f} {line.check_seconds:8.2f}", flush=True)  # fmt: skip
            found.append(line)
    write(args.out, {"bar": BAR, "loads": [asdict(line) for line in found]}, beside=("safetensors",))
    return 0 if all(line.ratio <= BAR for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
