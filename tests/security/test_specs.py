"""Whatever a producer asks for: a spec within bounds, or a refusal in a sentence, at once; and SQL only of our own."""

from __future__ import annotations

import ast
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from jobs import Client, Settings, schema
from jobs.bulkfile import read_bulk
from jobs.errors import InvalidSpec, JobNotFound
from jobs.fields import ALLOWED, MAX_IMAGES, MAX_LARGER_SIDE, MAX_PROMPT, MAX_SEED, MAX_SIDE, MAX_STEPS
from jobs.models import MAX_ATTEMPTS, job
from jobs.spec import JobSpec, read_spec
from jobs.spec_checks import MAX_WORK, larger_side, upscale_steps
from jobs.store import Store
from tests.jobs.conftest import make_available

ROOT = Path(__file__).resolve().parents[2]
HUGE = (10**6, 10**9, 2**31, 2**63, 2**64, 10**400, -1, -(10**400), 0)
NUMBERS = st.integers() | st.floats() | st.sampled_from([*HUGE, math.nan, math.inf, -math.inf, 1e308, 5e-324])
TEXTS = st.text() | st.sampled_from(["\0", "a\0b", "\x1b[2J", "\ud800", "\x85", "x" * 1_000_000, "1e309", "NaN", "٣"])
VALUES: st.SearchStrategy[Any] = (
    NUMBERS | TEXTS | st.none() | st.booleans() | st.binary(max_size=30) | st.lists(st.none()) | st.just({})
)
FIELDS = sorted(ALLOWED)


def assert_within_bounds(spec: JobSpec) -> None:
    """What a worker relies on, counted here once more."""
    for text in (spec.prompt, spec.negative_prompt):
        assert len(text) <= MAX_PROMPT and not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text)
        text.encode("utf-8")
    for side in (spec.width, spec.height):
        assert side is None or (64 <= side <= MAX_SIDE and side % 8 == 0)
    assert 1 <= spec.steps <= MAX_STEPS and 1 <= spec.images <= MAX_IMAGES
    assert spec.seed is None or 0 <= spec.seed <= MAX_SEED + 1 - spec.images
    numbers = [value for value in spec.__dict__.values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)
    width, height = spec.width or 512, spec.height or 512
    work = width * height * spec.steps
    if spec.upscale is not None:
        wide, high = larger_side(width, spec.upscale), larger_side(height, spec.upscale)
        assert max(wide, high) <= MAX_LARGER_SIDE
        work += wide * high * max(1, int(upscale_steps(spec) * spec.upscale_strength))
    assert work * spec.images <= MAX_WORK


@pytest.mark.parametrize("from_text", [False, True])
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), VALUES, max_size=8), st.booleans())
def test_any_fields_are_a_spec_within_bounds_or_refused_in_a_sentence(
    from_text: bool, fields: dict[str, Any], with_prompt: bool
) -> None:
    given_fields = ({"prompt": "x"} if with_prompt else {}) | fields
    if from_text:
        given_fields = {name: value if value is None else str(value) for name, value in given_fields.items()}
    try:
        spec = read_spec(given_fields, from_text=from_text)
    except InvalidSpec as error:
        assert error.errors and len(str(error)) < 20_000, "a megabyte is not quoted"
    else:
        assert_within_bounds(spec)


@given(st.fixed_dictionaries({name: NUMBERS for name in ("steps", "width", "height", "images", "seed", "guidance")}))
def test_any_numbers_are_a_spec_within_bounds_or_refused(numbers: dict[str, Any]) -> None:
    try:
        assert_within_bounds(read_spec({"prompt": "x"} | numbers))
    except InvalidSpec as error:
        assert {one.field for one in error.errors} <= {*numbers}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "x" * 1_000_000}, "prompt"),
        ({"negative_prompt": "x" * 1_000_000}, "negative_prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\x1b]0;owned\x07"}, "prompt"),
        ({"prompt": "\u0085"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"steps": 10**6}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"width": 10**9}, "width"),
        ({"height": 65}, "height"),
        ({"images": 10**6}, "images"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance": math.inf}, "guidance"),
        ({"steps": True}, "steps"),
        ({"width": 2048, "height": 2048, "steps": 1000, "images": 64}, "images"),
        ({"width": 2048, "height": 2048, "upscale": 4.0}, "upscale"),
        ({"webhook": "http://x"}, "webhook"),
        ({"__class__": "x"}, "__class__"),
    ],
)
def test_what_would_cost_too_much_or_mean_nothing_is_refused_at_once(fields: dict[str, Any], field: str) -> None:
    started = time.thread_time()
    with pytest.raises(InvalidSpec) as caught:
        read_spec({"prompt": "x"} | fields)
    assert [error.field for error in caught.value.errors] == [field]
    assert time.thread_time() - started < 0.5 and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x", "guidance": NaN}',
        '{"prompt": "x", "guidance": Infinity}',
        '{"prompt": "x", "guidance": -Infinity}',
        '{"prompt": "x", "guidance": 1e309}',
        '{"prompt": "x", "steps": 1e6}',
        '{"prompt": "x", "seed": -5}',
        '{"prompt": "x", "seed": ' + "9" * 4000 + "}",
        '{"prompt": "x", "seed": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"prompt": "a\\u0000b"}',
        '{"prompt": "\\ud800"}',
        "null",
    ],
)
def test_a_line_of_json_that_is_no_spec_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "good"}\n' + line + "\n")
    good, bad = read_bulk(tmp_path / "jobs.jsonl")
    assert good.spec is not None and bad.spec is None and bad.line == 2 and bad.errors


@pytest.mark.parametrize(
    "stored", ['{"prompt": "x", "guidance": 1e309}', '{"prompt":"x","steps":1000000}', "[", "null"]
)
def test_a_row_beyond_the_bounds_is_never_drawn(settings: Settings, stored: str) -> None:
    """The database holds text: whoever writes there goes through the same checks."""
    with Client(settings) as client:
        view = client.submit("x")
        store = Store.open(settings.database_url)
        with store.engines.writer.begin() as connection:
            connection.execute(sa.update(job).values(spec=stored))
        for _ in range(MAX_ATTEMPTS):  # another version may know more, so it is not given up at once
            assert store.claim(view.id, "w") is None
            assert "the stored spec" in str(client.get(view.id).error)
            make_available(store)
        assert client.get(view.id).state == "failed"
        store.close()


INJECTIONS = (
    "'; DROP TABLE job; --",
    '" OR "1"="1',
    "x' OR 1=1 --",
    "1; UPDATE job SET state='succeeded'",
    "%' UNION SELECT spec FROM job --",
    "\\'; SELECT pg_sleep(10); --",
    "{{7*7}} ${7*7} %(id)s :id $1 ?",
)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_no_text_becomes_sql(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    settings = Settings(home=tmp_path / "home")
    if database == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        settings = Settings(home=tmp_path / "home", database_url=url)
        opened = Store.open(url)
        schema.upgrade(opened.engines)
        opened.close()
    with Client(settings) as client:
        other = client.submit("other")
        for text in INJECTIONS:
            view = client.submit_many([{"prompt": text}], batch=text, idempotency_keys=[text])[0]
            again = client.submit_many([{"prompt": "y"}], batch=text, idempotency_keys=[text])[0]
            assert again.id == view.id and again.spec.prompt == text
            assert [each.id for each in client.batch(text).jobs()] == [view.id]
            assert sum(client.counts(text).values()) == 1
            for call in (client.get, client.cancel, client.retry):
                with pytest.raises(JobNotFound):
                    call(text)
        assert sum(client.counts().values()) == 1 + len(INJECTIONS)
        assert client.get(other.id).state == "queued"


#: Written of the names of states, which are constants of `jobs.states`, so that an index fits.
OF_OUR_OWN_WORDS = ("""sa.literal_column(f"'{state}'")""",)


def test_every_statement_of_ours_is_built_not_written() -> None:
    """Text that reaches a database is a constant: no f-string, no concatenation, in any module that speaks SQL."""
    odd = []
    for file in sorted((ROOT / "jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if name in ("text", "exec_driver_sql", "literal_column") and isinstance(node, ast.Call):
                first = node.args[0] if node.args else None
                if not isinstance(first, ast.Constant) and ast.unparse(node) not in OF_OUR_OWN_WORDS:
                    odd.append(f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert odd == []


def test_json_of_a_spec_holds_finite_numbers_alone() -> None:
    text = JobSpec(prompt="x", guidance=50.0, strength=0.75).model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
