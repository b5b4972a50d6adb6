"""SECURITY.md tells the truth: every threat has its row, every test is there, and what it says of Redis runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from jobs import Client, Settings, State
from tests.integration.processes import PATIENCE_S, fake_worker, stop, tail, wait_until

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


def functions(file: Path) -> set[str]:
    """Every test of a file, also those in classes."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_it_names_is_there(file: str, name: str) -> None:
    assert (ROOT / file).is_file() and name in functions(ROOT / file)


def test_every_threat_has_one_row_with_a_test() -> None:
    rows = re.findall(r"^\| (S\d+) \| ([^|]+) \| ([^|]+) \| (.+) \|$", TEXT, re.MULTILINE)
    assert [number for number, *_ in rows] == [f"S{number}" for number in range(1, 29)]
    assert [number for number, _, _, tests in rows if "::" not in tests] == []


def test_every_setting_and_file_that_it_names_is_there() -> None:
    settings = {f"NIGHTSHIFT_{field.upper()}" for field in Settings.model_fields}
    assert set(re.findall(r"NIGHTSHIFT_[A-Z_]+", TEXT)) <= settings
    files = set(re.findall(r"`((?:jobs|tests|worker|sd_engine)/[\w/.-]+)`", TEXT))
    assert [name for name in files if not (ROOT / name).exists()] == []
    targets = set(re.findall(r"^([.a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) <= targets


def names_in_code() -> Iterator[tuple[str, str]]:
    """Every name, attribute and import of the packages, and where it stands."""
    for package in ("jobs", "sd_engine", "worker"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Name | ast.Attribute):
                    yield where, node.id if isinstance(node, ast.Name) else node.attr
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    yield from ((where, alias.name) for alias in node.names)


def test_no_code_of_ours_signs_urls_or_calls_back() -> None:
    banned = re.compile(r"presign|webhook|callback_url|urlopen|urlretrieve")
    assert [(where, name) for where, name in names_in_code() if banned.search(name.lower())] == []


def test_no_code_of_ours_knows_tenants() -> None:
    assert [(where, name) for where, name in names_in_code() if "tenant" in name.lower()] == []


def test_a_worker_and_a_producer_need_no_more_of_redis_than_the_rule_gives(redis_url: str, tmp_path: Path) -> None:
    (rule,) = re.findall(r"`ACL SETUSER (nightshift on [^`]+)`", TEXT)
    log = tmp_path / "worker.log"
    with redis.Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", *rule.replace("PASSWORD", "a-password").split())
        try:
            url = f"redis://nightshift:a-password@{urlsplit(redis_url).netloc}/0"
            settings = Settings(home=tmp_path / "home", broker_url=url)
            with Client(settings) as client, fake_worker(settings, log, step_s=0.0, concurrency=2) as worker:
                jobs = client.submit_many([{"prompt": "x", "steps": 2, "priority": each} for each in (0, 5, 9)])
                assert {view.state for view in client.wait(jobs, PATIENCE_S)} == {State.succeeded}, tail(log)
                wait_until(lambda: not admin.hlen("nightshift:unacked"), "every bell acked", log)
                stop(worker, log)
            assert "NOPERM" not in log.read_text() and "permission" not in log.read_text().lower()
            with redis.Redis.from_url(url) as narrow:
                for command in (["FLUSHALL"], ["GET", "other"], ["CONFIG", "GET", "dir"], ["KEYS", "*"]):
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        narrow.execute_command(*command)
        finally:
            admin.execute_command("ACL", "DELUSER", "nightshift")
