"""The samplers' names: the engine's, and those that other programs have for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sd_engine
from jobs.samplers import DEFAULT, SAMPLERS, TABLE, our_name


def test_the_sampler_names_are_the_engines() -> None:
    assert set(SAMPLERS) == set(sd_engine.SAMPLERS)
    assert DEFAULT in SAMPLERS


def test_every_name_that_is_accepted_means_one_sampler() -> None:
    for name, names in TABLE.items():
        assert {our_name(one) for one in (name, *names.accepted)} == {name}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpm++ 2m karras", "dpmpp_2m_karras"),
        ("Euler a", "euler_a"),
        ("DPM2 a Exponential", "dpm2_a_exponential"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        ("PLMS", "pndm"),
        ("euler_ancestral", "euler_a"),
        ("euler_ancestral_karras", "euler_a_karras"),
        ("dpmpp_2m karras", "dpmpp_2m_karras"),
        ("dpmpp_2s_ancestral", "dpmpp_2s_a"),
        ("dpm_2", "dpm2"),
        ("dpmpp_sde_gpu karras", "dpmpp_sde_karras"),
        ("uni_pc_bh2 normal", "unipc"),
    ],
)
def test_the_names_of_others_are_taken(theirs: str, ours: str) -> None:
    assert our_name(theirs) == ours


@pytest.mark.parametrize(
    ("near", "meant"), [("dpmpp_2n", "dpmpp_2m"), ("euler_kerras", "euler_karras"), ("Eulr a", "euler_a")]
)
def test_a_near_miss_is_told_the_name(near: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"'{near}' is no sampler; did you mean {meant}\?"):
        our_name(near)


def test_a_name_that_is_near_to_nothing_gets_no_advice() -> None:
    with pytest.raises(ValueError, match=r"^'x' is no sampler$"):
        our_name("x")


@given(st.text(max_size=30))
def test_any_text_is_a_sampler_or_refused(text: str) -> None:
    try:
        assert our_name(text) in SAMPLERS
    except ValueError as error:
        assert len(str(error)) < 200
