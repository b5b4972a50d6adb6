"""The torch half of a worker's start: what was asked for is what the engine gets, and what cannot be is told."""

from __future__ import annotations

import pytest
import torch

from jobs.errors import SettingsError
from sd_engine import Engine
from sd_engine.devices import DTYPES as ENGINE_DTYPES
from sd_engine.devices import devices_here
from sd_engine.offload import OFFLOADS as ENGINE_OFFLOADS
from tests.engine.half import cpu_with_units
from worker.cli import DTYPES, OFFLOADS
from worker.workshop import TorchOptions, gpu_names, open_workshop


def _engine(options: TorchOptions) -> Engine:
    engine = open_workshop({"nightshift-mini": "shipped"}, options).make_engine()
    assert isinstance(engine, Engine)
    return engine


def test_the_command_offers_what_the_engine_has() -> None:
    """Help must not wait for torch, so the command names them a second time."""
    assert list(DTYPES) == ["auto", *ENGINE_DTYPES]
    assert OFFLOADS == ENGINE_OFFLOADS


def test_the_engine_gets_the_dtype_the_offload_and_the_fixed_packs_that_were_asked_for() -> None:
    with cpu_with_units():
        engine = _engine(TorchOptions("cpu", dtype="bf16", offload="idle", deterministic=True))
    (model,) = engine.models.values()
    assert (model.dtype, model.offload) == (torch.bfloat16, "idle")
    assert next(model.unet.parameters()).dtype == torch.bfloat16
    assert engine.packer.max_unet_rows is not None


def test_unasked_a_cpu_draws_in_fp32_with_everything_resident_in_packs_of_any_size() -> None:
    engine = _engine(TorchOptions("cpu"))
    (model,) = engine.models.values()
    assert (model.dtype, model.offload) == (torch.float32, "resident")
    assert engine.packer.max_unet_rows is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            TorchOptions("cuda:99"),
            f"--device cuda:99: this machine has {', '.join(devices_here())}; choose one of them",
        ),
        (TorchOptions("cpu", dtype="half"), "--dtype half: auto, fp32, fp16, bf16"),
        (TorchOptions("cpu", offload="lazy"), "--offload lazy: resident, idle, sequential"),
    ],
)
def test_what_cannot_be_is_told_by_the_option_s_name(options: TorchOptions, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_workshop({"nightshift-mini": "shipped"}, options)
    assert str(caught.value).startswith(message)


def test_a_gpu_s_name_is_one_that_the_device_option_takes() -> None:
    assert gpu_names() == [name for name in devices_here() if name.startswith("cuda:")]
