"""A model's file is data: nothing in it runs, nothing in it takes memory or time unbounded, and no job names one."""

from __future__ import annotations

import ast
import json
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.errors import InvalidSpec
from jobs.spec import JobSpec, read_spec
from sd_engine.errors import WeightsError
from sd_engine.weights import load_model
from tests.engine.models import refusal
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jobs", "sd_engine", "worker", "migrations", "benchmarks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers folder; to be read, not changed."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def calls(root: Path, packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call of the packages: file and line, the last name of what is called, the call."""
    for file in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield f"{file.relative_to(root)}:{node.lineno}", name, node


def unsafe_loads(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Calls that may run what a file says."""
    found = []
    for where, name, call in calls(root, packages):
        safe = any(
            word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
            for word in call.keywords
        )
        of_torch = name == "load" and "torch" in ast.dump(call.func)
        told_unsafe = any(word.arg == "weights_only" for word in call.keywords) and not safe
        trusting = any(word.arg == "trust_remote_code" for word in call.keywords)
        if (of_torch and not safe) or told_unsafe or trusting or name in ("load_library", "add_safe_globals"):
            found.append(f"{where} {ast.unparse(call)}")
    return found


def test_no_line_of_ours_loads_a_pickle_that_may_run() -> None:
    loads = [where for where, name, call in calls(ROOT) if name == "load" and "torch" in ast.dump(call.func)]
    assert loads, "the scan sees nothing"
    assert unsafe_loads(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=chosen)",
        "torch.jit.load(path)",
        "torch.export.load(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_a_load_that_may_run(tmp_path: Path, line: str) -> None:
    (tmp_path / "sd_engine").mkdir()
    (tmp_path / "sd_engine" / "a.py").write_text(f"def f(path, chosen):\n    return {line}\n")
    assert len(unsafe_loads(tmp_path)) == 1


LOAD = """
import sys
from pathlib import Path
from sd_engine.errors import WeightsError
from sd_engine.weights import load_model
for path in map(Path, sys.argv[1:]):
    try:
        load_model(path)
    except WeightsError:
        print(path.name, "refused")
"""


def loaded_elsewhere(*paths: Path) -> list[str]:
    """What a process of its own says of the files; a crash of it fails the test."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *map(str, paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"the process ended with {result.returncode}: {result.stderr[-500:]}"
    return result.stdout.splitlines()


def with_indices_moved_out(path: Path, indices: Tensor) -> None:
    """Write far larger numbers in the place of a saved tensor's indices: what no library would save."""
    before, after = (tensor.numpy().tobytes() for tensor in (indices, indices + 2**40))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    assert sum(data == before for data in entries.values()) == 1, "the file does not hold what is to be changed"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, after if data == before else data)


def test_a_sparse_tensor_whose_indices_point_outside_is_refused_and_crashes_nothing(tmp_path: Path) -> None:
    """Made dense, such a tensor would write outside its memory; torch checks its indices only when it is asked to."""
    columns, values = torch.tensor([3, 5]), torch.ones(2)
    with torch.sparse.check_sparse_tensor_invariants(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layout is in beta
        odd = {
            "csr": torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), columns, values, (2, 8)),
            "coo": torch.sparse_coo_tensor(columns[None], values, (8,)),
        }
    for layout, tensor in odd.items():
        torch.save({"state_dict": {"odd": tensor, "plain": torch.ones(3)}}, tmp_path / f"{layout}.ckpt")
        with_indices_moved_out(tmp_path / f"{layout}.ckpt", columns)
    said = loaded_elsewhere(*(tmp_path / f"{layout}.ckpt" for layout in odd))
    assert said == [f"{layout}.ckpt refused" for layout in odd]


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.ckpt", "model.safetensors"])
def test_a_program_of_torch_is_refused_whatever_its_name(tmp_path: Path, name: str) -> None:
    """TorchScript and exported programs hold code, and their loaders fall back to unpickling it."""
    path = tmp_path / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02]q\x00.")
        archive.writestr("archive/data.pkl", b"\x80\x02c__torch__\nModel\nq\x00)\x81.")
        archive.writestr("archive/code/__torch__.py", "class Model(Module):\n  pass\n")
        archive.writestr("archive/version", "3")
    with pytest.raises(WeightsError) as caught:
        load_model(path)
    assert path.name in str(caught.value)


def written(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def many_tensors(count: int) -> bytes:
    return json.dumps(
        {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    ).encode()


MEASURED = """
import resource, sys, time
from pathlib import Path
from sd_engine.errors import WeightsError
from sd_engine.layouts import opened
for path in sys.argv[1:]:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with opened(Path(path)) as file:
            said = f"opened {len(file.keys)}"
    except WeightsError as error:
        said = "refused"
    more_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(Path(path).stem, said, more_kb / 1024, time.process_time() - started)
"""
HARMFUL = {
    "length-2^63": (b"{}", b"", 2**63),
    "length-2^64-1": (b"{}", b"", 2**64 - 1),
    "100-MB": (b" " * 100_000_000, b"", None),
    "100000-tensors": (many_tensors(100_000), b"0" * 100_000, None),
    "100000-hidden": (many_tensors(100_000).replace(b"data_offsets", b"data\\u005foffsets"), b"0" * 100_000, None),
    "nested": (b'{"a":' + b"[" * 5_000_000, b"", None),
    "overlapping": (
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}',
        b"0" * 12,
        None,
    ),
    "wraps": (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}', b"0" * 8, None),
}


def test_a_header_made_to_harm_costs_a_moment_and_little_memory(tmp_path: Path) -> None:
    """In a process of its own, one file after the other. CPU time, so that a busy machine changes nothing."""
    files = [str(written(tmp_path / f"{name}.safetensors", *harm)) for name, harm in HARMFUL.items()]
    command = [sys.executable, "-c", MEASURED, *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-500:]
    lines = [line.rsplit(maxsplit=2) for line in result.stdout.splitlines()]
    assert [said for said, _, _ in lines if not said.endswith("refused")] == []
    assert [said for said, more_mb, cpu_s in lines if float(more_mb) > 200 or float(cpu_s) > 1.0] == []
    assert len(lines) == len(HARMFUL)


def test_a_header_of_as_many_tensors_as_real_models_have_is_read(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.zeros(1) for i in range(3000)}, tmp_path / "many.safetensors")
    assert "no Stable Diffusion checkpoint" in refusal(tmp_path / "many.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "x/y",
        "../x",
        "http://host/model",
        "/etc/passwd",
        "..",
        ".hidden",
        "a\\b",
        "a\nb",
        "a" * 65,
        "",
        "a b",
        "~",
        "a:b",
    ],
)
def test_a_model_is_asked_for_by_a_plain_name_alone(name: str) -> None:
    for from_text in (False, True):
        with pytest.raises(InvalidSpec, match="model: "):
            read_spec({"prompt": "x", "model": name}, from_text=from_text)


@pytest.mark.parametrize("text", ["<lora:../../x:1>", "embedding:/etc/passwd", "<hypernet:http://x:1>", "__../x__"])
def test_what_a_prompt_names_is_text_and_no_file(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings are words that were read when the model was loaded; nothing is looked for while a prompt is read."""
    model = load_model(folder)
    opened: list[object] = []
    sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" and watching else None)
    watching = True
    try:
        model.text_encoder(model.tokenizer.encode([JobSpec(prompt=text).prompt]))
    finally:
        watching = False
    assert opened == []


def with_index(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    copy = shutil.copytree(folder, target)
    index = copy / "model_index.json"
    content = json.loads(index.read_text()) if index.exists() else {"_class_name": "StableDiffusionPipeline"}
    change(content)
    index.write_text(json.dumps(content))
    return copy


def test_a_folder_that_brings_code_of_its_own_is_refused_or_its_code_ignored(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    program = f"import os; os.mkdir({str(canary)!r})\n"

    def custom(content: dict[str, Any]) -> None:
        content["_class_name"] = ["pipeline", "MyPipeline"]

    def component(content: dict[str, Any]) -> None:
        content["unet"] = ["my_unet", "MyUNet"]

    for number, change in enumerate((custom, component)):
        copy = with_index(folder, tmp_path / str(number), change)
        for place in ("pipeline.py", "my_unet.py", "unet/my_unet.py", "tokenizer/tokenization.py"):
            (copy / place).write_text(program)
        config = copy / "tokenizer" / "tokenizer_config.json"
        settings = json.loads(config.read_text()) if config.exists() else {}
        settings |= {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}
        config.write_text(json.dumps(settings))
        try:
            load_model(copy)
        except WeightsError as error:
            assert "\n" not in str(error)
        else:
            assert change is component, "a pipeline that is none of ours was loaded"
        assert not canary.exists()


def test_no_package_of_ours_takes_the_word_of_a_scanner() -> None:
    """Scanners of pickles are passed by again and again; only the restricted reader decides."""
    names = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()
    assert "picklescan" not in names and "modelscan" not in names and "fickling" not in names
