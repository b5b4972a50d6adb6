"""S3Storage. Apart from `storage`, because boto3 is an extra."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from jobs.errors import KeyNotFound, StorageError
from jobs.storage import check_key

_ABSENT = {"NoSuchKey", "404", "NotFound"}


class S3Storage:
    """Objects in a bucket, below a prefix. Endpoint and credentials come from boto3's own variables."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = _client()

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """As Storage.put."""
        with self._told(key):
            self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=data, ContentType=content_type)

    def get(self, key: str) -> bytes:
        """As Storage.get."""
        with (
            self._told(key),
            contextlib.closing(self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"]) as body,
        ):
            data: bytes = body.read()
            return data

    def delete(self, key: str) -> None:
        """As Storage.delete."""
        with contextlib.suppress(KeyNotFound), self._told(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def exists(self, key: str) -> bool:
        """As Storage.exists."""
        with contextlib.suppress(KeyNotFound), self._told(key):
            self._client.head_object(Bucket=self._bucket, Key=self._name(key))
            return True
        return False

    def url(self, key: str) -> str:
        """s3://bucket/prefix/key."""
        return f"s3://{self._bucket}/{self._name(key)}"

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    @contextlib.contextmanager
    def _told(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            if code in _ABSENT:
                raise KeyNotFound(f"the bucket {self._bucket} has no object {key}") from None
            raise StorageError(f"the bucket {self._bucket} refused {key}: {code}") from error
        except BotoCoreError as error:  # no credentials, no connection, timeout
            reason = str(error).splitlines()[0]
            raise StorageError(f"the bucket {self._bucket} cannot be reached for {key}: {reason}") from error


def _client() -> Any:
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "max_attempts": 4},
        max_pool_connections=32,
        # Servers other than AWS seldom have a name per bucket, and some cannot read AWS's newer checksum trailers.
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of its own: boto3's default one is not safe to make clients from in several threads.
    return boto3.session.Session().client("s3", config=config)
