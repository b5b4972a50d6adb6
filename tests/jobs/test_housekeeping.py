"""The commands that look after a house in use, from their words to their exit codes, on the embedded default."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from uuid import UUID

import boto3
import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from jobs import Client, KeyNotFound, Settings, State, checks, cli, commands, doctor, housekeeping
from jobs.db import db_now, open_engines
from jobs.errors import NightshiftError
from jobs.models import job as job_table
from jobs.repair import TOO_MANY
from jobs.storage import DirStorage, open_storage
from jobs.storage_s3 import S3Storage
from jobs.store import Store
from jobs.views import Output
from tests.conftest import Bucket
from tests.servers import free_port

COMMANDS = {
    "status": commands.status,
    "prune": housekeeping.prune,
    "repair": housekeeping.repair,
    "doctor": housekeeping.doctor,
}


@pytest.fixture
def client() -> Iterator[Client]:
    with Client() as opened:
        yield opened


@pytest.fixture
def storage(client: Client) -> DirStorage:
    opened = open_storage(client.settings.storage_url)
    assert isinstance(opened, DirStorage)
    return opened


@pytest.fixture
def draw(client: Client, storage: DirStorage) -> Callable[..., UUID]:
    """A job that shows one picture."""

    def work(batch: str | None = None) -> UUID:
        (view,) = client.submit_many(["a star"], batch=batch)
        store = Store.open(client.settings.database_url)
        claim = store.claim(view.id, "stand-in")
        assert claim is not None
        key, data = f"images/{view.id}/{claim.token}/0.png", str(view.id).encode()
        storage.put(key, data, "image/png")
        assert store.finish(claim, [Output(0, key, 0, 64, 64, hashlib.sha256(data).hexdigest(), len(data))])
        store.close()
        return view.id

    return work


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def invoke(*words: str) -> Result:
        result = CliRunner().invoke(COMMANDS[words[0]], list(words[1:]))
        assert result.exception is None or isinstance(result.exception, (SystemExit, NightshiftError)), result
        return result

    return invoke


Run = Callable[..., Result]
Draw = Callable[..., UUID]


@pytest.mark.parametrize("name", ["prune", "repair", "doctor"])
def test_every_command_has_help_with_an_example(run: Run, name: str) -> None:
    assert f"nightshift {name}" in run(name, "--help").stdout.partition("Example")[2]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--older-than", "30"],
        ["--older-than", "-1d"],
        ["--older-than", "999999d"],
        ["--older-than", "0s", "--orphans-older-than", "999999w"],
        ["--older-than", "1d", "--state", "running"],
        ["--older-than", "1d", "--state", ""],
    ],
)
def test_prune_refuses_what_it_does_not_understand(run: Run, draw: Draw, client: Client, words: list[str]) -> None:
    draw()
    assert run("prune", *words).exit_code == 2
    assert client.counts()[State.succeeded] == 1


def test_prune_counts_and_removes(run: Run, draw: Draw, client: Client, storage: DirStorage) -> None:
    draw(batch="old")
    kept = draw(batch="new")
    words = ("prune", "--older-than", "0s", "--batch", "old")
    assert run(*words, "--dry-run").stdout.startswith(
        "1 jobs with 1 objects, 0 empty batches, 0 inputs and 0 orphans w"
    )
    assert json.loads(run(*words, "--state", "failed", "--json").stdout)["jobs"] == 0
    counts = dict.fromkeys(("orphans", "inputs", "unknown", "unfinished"), 0)
    counts |= {"dry_run": False, "jobs": 1, "objects": 1, "batches": 1}
    assert json.loads(run(*words, "--json").stdout) == counts
    assert [view.id for view in client.jobs()] == [kept]
    assert client.image_bytes(kept)
    assert run("prune", "--older-than", "1h").stdout.startswith("0 jobs")


def test_a_lost_picture_is_told_everywhere_and_repaired(
    run: Run, draw: Draw, client: Client, storage: DirStorage
) -> None:
    lost, whole = draw(), draw()
    assert client.image_url(lost) in run("status", str(lost)).stdout
    storage.delete(client.get(lost).images[0].key)
    remedy = f"nightshift repair --job {lost}"
    for call in (client.image_bytes, client.image_url):
        with pytest.raises(KeyNotFound, match=remedy):
            call(lost)
    assert remedy in run("status", str(lost)).stdout
    (shown,) = json.loads(run("status", str(lost), "--json").stdout)["jobs"]
    assert (shown["images"][0]["url"], remedy in shown["images"][0]["problem"]) == (None, True)

    planned = run("repair", "--dry-run")
    assert (planned.exit_code, str(lost) in planned.stdout) == (1, True)
    assert client.get(lost).state == State.succeeded
    assert json.loads(run("repair", "--json").stdout)["queued"] == [str(lost)]
    view = client.get(lost)
    assert (view.state, view.attempts, view.images) == (State.queued, 0, ())
    assert "missing in the storage" in (view.error or "")
    assert client.get(whole).state == State.succeeded
    assert run("repair").stdout == "0 damaged pictures, 0 jobs queued again\n"


def test_repair_reads_the_bytes_only_when_it_is_asked_to(run: Run, draw: Draw, client: Client) -> None:
    job = draw(batch="b")
    picture = Path(client.image_url(job).removeprefix("file://"))
    picture.write_bytes(b"x" * picture.stat().st_size)
    assert "0 damaged" in run("repair", "--job", str(job)).stdout
    assert "--deep" in run("status", str(job)).stdout or client.get(job).state == State.succeeded
    assert "1 jobs queued" in run("repair", "--deep", "--batch", "b").stdout


def test_repair_believes_no_storage_that_has_lost_everything(
    run: Run, draw: Draw, client: Client, storage: DirStorage
) -> None:
    for job in [draw() for _ in range(TOO_MANY)]:
        storage.delete(client.get(job).images[0].key)
    refused = run("repair")
    assert "NIGHTSHIFT_STORAGE_URL" in str(refused.exception)
    assert client.counts()[State.succeeded] == TOO_MANY
    assert f"{TOO_MANY} jobs queued" in run("repair", "--all-missing").stdout


def test_a_job_that_was_repaired_and_drawn_again_shows_its_new_picture(
    draw: Draw, client: Client, storage: DirStorage
) -> None:
    lost = draw()
    storage.delete(client.get(lost).images[0].key)
    assert client.repair(client.check_images()) == [lost]
    assert client.repair(client.check_images()) == []
    store = Store.open(client.settings.database_url)
    claim = store.claim(lost, "stand-in")
    assert claim is not None
    key = f"images/{lost}/{claim.token}/0.png"
    storage.put(key, b"anew", "image/png")
    assert store.finish(claim, [Output(0, key, 0, 64, 64, hashlib.sha256(b"anew").hexdigest(), 4)])
    store.close()
    assert client.image_bytes(lost) == b"anew"


def test_status_of_a_job_shows_its_traceback_and_why_it_is_held_back(run: Run, client: Client) -> None:
    failed, suspect = client.submit("a"), client.submit("b")
    store = Store.open(client.settings.database_url)
    claim = store.claim(failed.id, "w")
    assert claim is not None
    store.fail(claim, "boom", retry=False, traceback="Traceback (most recent call last):\n  line 7\nValueError: boom")
    held = store.claim(suspect.id, "w", lease_s=0.0)
    assert held is not None and store.sweep().requeued == 1
    store.close()
    text = run("status", str(failed.id), str(suspect.id)).stdout
    assert "ValueError: boom" in text and "line 7" in text
    assert "held by a worker that stopped answering; waits to be rendered alone" in text
    assert "ValueError: boom" not in run("status").stdout.replace("boom  ", "")
    shown = {job["id"]: job for job in json.loads(run("status", "--json").stdout)["jobs"]}
    assert shown[str(failed.id)]["traceback"].endswith("ValueError: boom")
    assert (shown[str(suspect.id)]["suspect"], shown[str(suspect.id)]["solo_crashes"]) == (True, 0)


class TestDoctor:
    @pytest.fixture(autouse=True)
    def producer_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = [
            EntryPoint("worker", "no_such_package.doctor:checks", checks.GROUP),
            EntryPoint("jobs", "jobs.doctor:checks", checks.GROUP),
        ]
        monkeypatch.setattr(checks, "entry_points", lambda group: points)

    def found(self, run: Run) -> dict[str, tuple[str, str, str]]:
        result = run("doctor", "--json")
        lines = json.loads(result.stdout)
        assert result.exit_code == any(line["mark"] == "failed" for line in lines)
        return {line["check"]: (line["mark"], line["seen"], line["remedy"]) for line in lines}

    def test_a_fresh_machine_is_told_that_nothing_is_there_yet_and_nothing_is_made(self, run: Run) -> None:
        found = self.found(run)
        assert {found[check][0] for check in ("database", "storage", "broker", "worker")} == {"skipped"}
        assert "pip install 'nightshift[worker]'" in found["worker"][2]
        assert not Settings().home.exists()

    def test_a_home_that_nobody_can_make_is_told(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path / "file" / "home"))
        found = self.found(run)
        for check in ("database", "storage"):
            mark, seen, remedy = found[check]
            assert (mark, f"made in {tmp_path}/file" in seen, "NIGHTSHIFT_HOME" in remedy) == ("failed", True, True)

    def test_a_house_in_use_is_ok(self, run: Run, draw: Draw, storage: DirStorage) -> None:
        draw()
        before = {found.key for found in storage.list("")}
        found = self.found(run)
        names = {"database", "database file", "migrations", "database clock", "queue", "storage", "storage clock"}
        names |= {"settings", "celery version", "kombu version", "pillow version", "storage access", "database disk"}
        assert {name: found[name][0] for name in names} == dict.fromkeys(names, "ok")
        assert {found.key for found in storage.list("")} == before
        text = run("doctor")
        assert text.exit_code == 0
        assert "\nok       migrations " in text.stdout

    def test_a_damaged_file_and_an_old_revision_are_told(self, run: Run, client: Client) -> None:
        engines = open_engines(client.settings.database_url)
        with engines.writer.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        assert self.found(run)["migrations"][0] == "failed"
        with engines.writer.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
        assert self.found(run)["migrations"][0] == "warning"
        engines.dispose()
        client.close()
        file = client.settings.home / "nightshift.db"
        file.write_bytes(b"no database at all" * 100)
        mark, seen, remedy = self.found(run)["database"]
        assert (mark, "not a database" in seen, bool(remedy)) == ("failed", True, True)

    def test_a_queue_that_does_not_move_is_told(self, run: Run, client: Client) -> None:
        waiting = client.submit("a", model="nobodys")
        held = client.submit("b")
        store = Store.open(client.settings.database_url)
        assert store.claim(held.id, "w") is not None
        with store.engines.writer.begin() as connection:
            old = sa.update(job_table).values(available_at=db_now(-3600), lease_expires_at=db_now(-3600))
            connection.execute(old)
        store.close()
        found = self.found(run)
        assert found["queue"][0] == "warning"
        assert "1 jobs wait for the model nobodys, the oldest for 60 minutes" in found["queue"][1]
        assert "never" in found["queue"][1] and "NIGHTSHIFT_MODELS" in found["queue"][2]
        assert (found["leases"][0], "1 jobs" in found["leases"][1]) == ("warning", True)
        client.cancel(waiting)
        assert self.found(run)["queue"][0] == "ok"

    def test_a_folder_that_cannot_be_written_is_told(
        self, run: Run, draw: Draw, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw()
        (client.settings.home / "file").write_text("in the way")
        monkeypatch.setenv("NIGHTSHIFT_STORAGE_URL", f"file://{client.settings.home}/file/storage")
        assert self.found(run)["storage"][0] == "failed"

    def test_production_is_looked_at_and_no_secret_is_shown(
        self, run: Run, postgres_url: str, redis_url: str, s3: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NIGHTSHIFT_DATABASE_URL", postgres_url.replace("postgres@", "postgres:geheim@"))
        monkeypatch.setenv("NIGHTSHIFT_BROKER_URL", redis_url)
        monkeypatch.setenv("NIGHTSHIFT_STORAGE_URL", s3.url)
        found = self.found(run)
        assert (found["migrations"][0], found["migrations"][2]) == ("failed", "nightshift db upgrade")
        names = ("database", "broker", "broker memory", "broker access", "storage", "storage clock")
        assert found["storage access"][:2] == ("skipped", "not known: the server does not say who may read")
        assert {name: found[name][0] for name in names} == dict.fromkeys(names, "ok")
        assert "geheim" not in json.dumps(found) and os.environ["AWS_SECRET_ACCESS_KEY"] not in json.dumps(found)

    def test_what_is_away_is_told_with_its_remedy(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        port = free_port()
        monkeypatch.setenv("NIGHTSHIFT_DATABASE_URL", f"postgresql://me:geheim@127.0.0.1:{port}/x")
        monkeypatch.setenv("NIGHTSHIFT_BROKER_URL", f"redis://:geheim@127.0.0.1:{port}/0")
        found = self.found(run)
        for check in ("database", "broker"):
            mark, seen, remedy = found[check]
            assert mark == "failed" and "NIGHTSHIFT_" in remedy and "geheim" not in seen
        monkeypatch.setenv("NIGHTSHIFT_BROKER_URL", "geheim")
        assert self.found(run)["settings"][0] == "failed"

    @pytest.mark.parametrize(
        ("url", "mark"),
        [
            ("redis://10.0.0.1:6379/0", "warning"),
            ("redis://:p@10.0.0.1:6379/0", "warning"),
            ("rediss://redis.example:6379/0", "warning"),
            ("rediss://:p@redis.example:6379/0", "ok"),
            ("rediss://:p@redis.example:6379/0?ssl_cert_reqs=required", "ok"),
            ("rediss://:p@redis.example:6379/0?ssl_cert_reqs=none", "warning"),
            ("redis://localhost:6379/0", "ok"),
            ("redis://[::1]:6379/0", "ok"),
        ],
    )
    def test_a_broker_off_this_machine_needs_password_and_tls(self, url: str, mark: str) -> None:
        assert doctor.broker_access(url).mark == mark


def test_a_bucket_that_anybody_may_read_is_told(moto_bucket: Bucket) -> None:
    storage = open_storage(moto_bucket.url)
    assert storage.public() is True  # moto lets everybody in


def test_a_bucket_says_by_its_settings_who_may_read(moto_bucket: Bucket) -> None:
    storage = open_storage(moto_bucket.url)
    assert isinstance(storage, S3Storage)
    name, client = moto_bucket.url.split("/")[2], boto3.client("s3")
    assert storage.said_public() is False
    client.put_bucket_acl(Bucket=name, ACL="public-read")
    assert storage.said_public() is True
    block = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    client.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=dict.fromkeys(block, True))
    assert storage.said_public() is False


def test_a_full_database_is_told_in_a_sentence_and_takes_nothing_by_halves(client: Client) -> None:
    job = client.submit("x")
    store = Store.open(client.settings.database_url)
    with store.engines.writer.connect() as connection:  # the writer's one connection keeps this limit
        connection.exec_driver_sql("PRAGMA max_page_count=1")

    group = cli.EntryPointGroup("nightshift")
    fill = click.Command("fill", callback=lambda: store.submit([job.spec] * 2000))
    group.get_command = lambda ctx, cmd_name: fill  # type: ignore[method-assign]
    result = CliRunner().invoke(group, ["fill"])
    store.close()
    assert result.exit_code == 1
    assert "the database cannot write: database or disk is full; make room" in result.stderr
    assert client.counts()[State.queued] == 1
