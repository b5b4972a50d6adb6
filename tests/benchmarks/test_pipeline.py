"""The arithmetic of the pipeline's benchmark: what is computed from fewer steps says what it says."""

from __future__ import annotations

import pytest

from benchmarks.pipeline import goals
from benchmarks.pipeline_turns import Turn


def test_a_picture_of_twenty_steps_is_computed_from_the_steps_that_were_made() -> None:
    """2 s before the first step, 3 s each, 1 s after: in batches of two."""
    turn = Turn.of(2, 100.0, [105.0, 108.0, 111.0], 112.0)
    assert (turn.before_s, turn.step_s, turn.after_s) == (2.0, 3.0, 1.0)
    assert turn.whole_s == 2 + 20 * 3 + 1
    assert turn.images_per_hour == pytest.approx(2 * 3600 / 63)


def test_what_is_no_unet_call_is_the_engines_share_of_a_step() -> None:
    assert Turn(1, 0.0, 4.0, 0.0).outside_unet is None
    assert Turn(1, 0.0, 4.0, 0.0, unet_s=3.0).outside_unet == 0.25


def test_one_step_says_nothing_about_the_next() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Turn.of(1, 0.0, [5.0], 6.0)


def test_pictures_must_agree_where_the_tolerance_is_stated() -> None:
    ways = {"ours, one by one": {"before_s": 0.0, "step_s": 1.0, "after_s": 0.0}}
    about = {"model": "m", "side": 64, "steps_of_the_figures": 20, "ways": ways}
    found = [about | {"one by one, x reference": 1.5, "levels_apart": 3.0}]
    assert [goal.passed for goal in goals(found, "fp32")] == [True, False]
    assert [goal.passed for goal in goals(found, "bf16")] == [True, True]
    found[0]["levels_apart"] = 17.0
    assert [goal.passed for goal in goals(found, "bf16")] == [True, False]
    assert [goal.passed for goal in goals(found, "fp16")] == [True]


def test_a_goal_that_is_missed_says_what_is_not_the_unets() -> None:
    ours = {"before_s": 1.0, "step_s": 0.9, "after_s": 1.0, "outside_unet": 0.05}
    one = {"model": "m", "side": 64, "steps_of_the_figures": 20, "ways": {"ours, one by one": ours}}
    goal = goals([one | {"one by one, x reference": 1.3, "levels_apart": 3.0}], "bf16")[0]
    assert not goal.passed and "5.0% of a step" in goal.why and "10.0% of a picture are what comes" in goal.why
