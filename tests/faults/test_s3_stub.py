"""The faulty S3 server does what it says, seen through boto3 itself and through our storage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectionClosedError, ReadTimeoutError

from jobs.errors import KeyNotFound, StorageError
from jobs.storage import open_storage
from tests.conftest import make_bucket
from tests.faults.s3_stub import FaultyS3, faulty_s3

DATA = bytes(range(256)) * 400


@pytest.fixture
def stub() -> Iterator[FaultyS3]:
    with faulty_s3() as stub:
        yield stub


@pytest.fixture
def client(stub: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3 without patience: each call is one request."""
    for name, value in stub.server.environment.items():
        monkeypatch.setenv(name, value)
    config = Config(read_timeout=0.3, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    with contextlib.closing(boto3.client("s3", config=config)) as client:
        yield client


def put(client: Any, key: str = "a/b") -> Any:
    return client.put_object(Bucket="bucket", Key=key, Body=DATA)


def test_a_healthy_stub_passes_as_storage(stub: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = make_bucket(stub.server, monkeypatch)
    storage = open_storage(bucket.url)
    storage.put("images/a.png", DATA, "image/png")
    assert storage.get("images/a.png") == DATA
    assert storage.exists("images/a.png")
    assert not storage.exists("images/b.png")
    with pytest.raises(KeyNotFound):
        storage.get("images/b.png")
    storage.delete("images/a.png")
    assert not stub.objects


def test_lists_page_by_page(stub: FaultyS3, client: Any) -> None:
    for index in range(5):
        put(client, f"x/{index}")
    put(client, "y/0")
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", Prefix="x/", PaginationConfig={"PageSize": 2}
    )
    found = [entry for page in pages for entry in page["Contents"]]
    assert [entry["Key"] for entry in found] == [f"x/{index}" for index in range(5)]
    assert {entry["Size"] for entry in found} == {len(DATA)}


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (FaultyS3.slow_down, 503, "SlowDown"),
        (FaultyS3.deny, 403, "ExpiredToken"),
        (FaultyS3.conflict, 409, "ConditionalRequestConflict"),
    ],
)
def test_refusals_carry_their_code_and_store_nothing(
    stub: FaultyS3, client: Any, fault: Callable[[FaultyS3], None], status: int, code: str
) -> None:
    fault(stub)
    with pytest.raises(ClientError) as told:
        put(client)
    assert told.value.response["Error"]["Code"] == code
    assert told.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert not stub.objects


def test_an_error_after_storing_stores(stub: FaultyS3, client: Any) -> None:
    stub.fail_after_storing()
    with pytest.raises(ClientError, match="InternalError"):
        put(client)
    assert stub.objects == {"bucket/a/b": DATA}


def test_no_answer_until_it_is_healed(stub: FaultyS3, client: Any) -> None:
    stub.hang()
    with pytest.raises(ReadTimeoutError):
        put(client)
    stub.heal()
    put(client)
    assert [request.fault for request in stub.requests] == ["hang", ""]


def test_a_reset_in_the_middle_stores_nothing(stub: FaultyS3, client: Any) -> None:
    stub.reset_mid_body()
    with pytest.raises(ConnectionClosedError):
        put(client)
    assert not stub.objects


def test_a_reset_in_the_middle_of_an_answer_is_an_error(stub: FaultyS3, client: Any) -> None:
    put(client)
    stub.reset_mid_body(1.0, "GET")
    with pytest.raises((BotoCoreError, ConnectionError)):
        client.get_object(Bucket="bucket", Key="a/b")["Body"].read()


def test_a_truncated_body_is_called_a_success(stub: FaultyS3, client: Any) -> None:
    stub.truncate()
    put(client)
    assert stub.objects["bucket/a/b"] == DATA[: len(DATA) // 2]
    stub.heal()
    put(client)
    stub.truncate(1.0, "GET")
    assert client.get_object(Bucket="bucket", Key="a/b")["Body"].read() == DATA[: len(DATA) // 2]


def test_a_trickle_arrives_whole(stub: FaultyS3, client: Any) -> None:
    stub.trickle(bytes_per_s=1e6)
    put(client)
    assert stub.objects["bucket/a/b"] == DATA


def test_only_a_new_object_is_made_when_that_is_asked(stub: FaultyS3, client: Any) -> None:
    put(client)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="bucket", Key="a/b", Body=b"other", IfNoneMatch="*")
    assert stub.objects["bucket/a/b"] == DATA


def test_a_share_of_the_requests_is_hit_the_same_ones_for_a_seed() -> None:
    def hits(seed: int) -> list[str]:
        with faulty_s3(seed) as stub:
            stub.slow_down(0.5)
            for _ in range(20):
                stub._state.enter("PUT", "k")
            return [request.fault for request in stub.requests]

    assert hits(1) == hits(1) != hits(2)
    assert {*hits(1)} == {"503", ""}


def test_requests_can_be_waited_for(stub: FaultyS3, client: Any) -> None:
    put(client)
    stub.wait_seen(1)
    with pytest.raises(TimeoutError):
        stub.wait_seen(2, timeout_s=0.01)


def test_a_put_whose_object_is_not_there_is_the_storages_trouble(
    stub: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(make_bucket(stub.server, monkeypatch).url)
    stub.lose()
    with pytest.raises(StorageError, match="does not have it") as told:
        storage.put("images/a.png", DATA, "image/png")
    assert not isinstance(told.value, KeyNotFound)
