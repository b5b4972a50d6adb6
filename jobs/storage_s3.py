"""S3Storage. Apart from `storage`, because boto3 is an extra."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from jobs.errors import KeyNotFound, SettingsError, StorageError, StorageRefused
from jobs.storage import Stored, check_key, check_prefix, is_key

_ABSENT = {"NoSuchKey", "404", "NotFound"}
#: Codes that do not always come with the status 401 or 403.
_NOT_ALLOWED = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}
_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
_EVERYBODY = ("/AllUsers", "/AuthenticatedUsers")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?\Z')
#: Seconds. With two attempts no call lasts longer than a minute; waiting longer is for those who hold the bytes.
CONNECT_S, READ_S, ATTEMPTS = 5, 20, 2


class S3Storage:
    """Objects in a bucket, below a prefix. Endpoint and credentials come from boto3's own variables."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        """Nothing is asked of the server yet. Raises SettingsError when boto3 cannot use its own variables."""
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = _client()

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """As Storage.put. What the server says of the stored object is compared with the bytes sent."""
        digest = hashlib.md5(data, usedforsecurity=False)
        md5 = digest.hexdigest()
        with self._told(key):
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=self._name(key),
                Body=data,
                ContentType=content_type,
                ContentMD5=base64.b64encode(digest.digest()).decode(),
            )
        if _told_md5(answer) == md5:
            return  # it has read them all
        # Asked once more, because some servers and proxies answer 200 to a body that was cut off.
        try:
            with self._told(key):
                head = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        except KeyNotFound:  # the storage's trouble, where a missing object is somebody's mistake
            raise StorageError(f"the bucket {self._bucket} took {key} but does not have it") from None
        if head["ContentLength"] != len(data) or not {_told_md5(answer), _told_md5(head)} <= {None, md5}:
            raise StorageError(
                f"the bucket {self._bucket} took {key} but holds other bytes than were sent "
                f"({head['ContentLength']} instead of {len(data)})"
            )

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
        with contextlib.suppress(KeyNotFound):
            self.look(key)
            return True
        return False

    def look(self, key: str) -> Stored:
        """As Storage.look."""
        with self._told(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        return Stored(key, head["ContentLength"], head["LastModified"].astimezone(UTC))

    def list(self, prefix: str) -> Iterator[Stored]:
        """As Storage.list; at most 1000 a page."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + check_prefix(prefix)
        )
        with self._told(prefix):
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._prefix)
                    if is_key(key):
                        yield Stored(key, found["Size"], found["LastModified"].astimezone(UTC))

    def tidy(self, before: datetime) -> int:
        """As Storage.tidy: nothing, since a bucket shows an object when it is whole and forgets it otherwise."""
        return 0

    def public(self) -> bool | None:
        """As Storage.public: whether the bucket lists itself to somebody without credentials, or says that it would."""
        with contextlib.suppress(ClientError, BotoCoreError):
            _client(signature_version=UNSIGNED).list_objects_v2(Bucket=self._bucket, MaxKeys=1)
            return True
        return self.said_public()

    def said_public(self) -> bool | None:
        """What the bucket's own settings say; servers that know no such settings say nothing."""
        said = list[bool]()
        with contextlib.suppress(ClientError, BotoCoreError):
            # Servers that do not know the question answer with what they have, sometimes with a list of objects.
            answer = self._client.get_public_access_block(Bucket=self._bucket)
            block = answer.get("PublicAccessBlockConfiguration", {})
            if block.get("RestrictPublicBuckets") and block.get("IgnorePublicAcls"):
                return False
        with contextlib.suppress(ClientError, BotoCoreError):
            status = self._client.get_bucket_policy_status(Bucket=self._bucket).get("PolicyStatus", {})
            said += [status["IsPublic"]] if "IsPublic" in status else []
        with contextlib.suppress(ClientError, BotoCoreError):
            grants = self._client.get_bucket_acl(Bucket=self._bucket).get("Grants")
            who = [grant.get("Grantee", {}).get("URI", "") for grant in grants or ()]
            said += [] if grants is None else [any(uri.endswith(_EVERYBODY) for uri in who)]
        return any(said) if said else None

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
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if code in _ABSENT:
                raise KeyNotFound(f"the bucket {self._bucket} has no object {key}") from None
            kind = StorageRefused if status in (401, 403) or code in _NOT_ALLOWED else StorageError
            raise kind(f"the bucket {self._bucket} refused {key}: {code}") from error
        except BotoCoreError as error:  # no credentials, no connection, timeout
            kind = StorageRefused if isinstance(error, _NO_CREDENTIALS) else StorageError
            reason = str(error).splitlines()[0]
            raise kind(f"the bucket {self._bucket} cannot be reached for {key}: {reason}") from error


def _told_md5(answer: dict[str, Any]) -> str | None:
    """The MD5 of the object that the answer is about. None: its ETag is none, by its form or because a key encrypts
    the object."""
    etag = _MD5.match(str(answer.get("ETag", "")))
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    return None if etag is None or encrypted else etag[1]


def _client(**options: Any) -> Any:
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=32,
        # Servers other than AWS seldom have a name per bucket, and some cannot read AWS's newer checksum trailers.
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **options,
    )
    try:
        # A session of its own: boto3's default one is not safe to make clients from in several threads.
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # half of a pair of credentials, an unknown profile, a bad endpoint
        raise SettingsError(f"the AWS_... settings of the storage: {error}") from None
