"""Buckets of S3, by boto3.

Credentials, region, profile and endpoint come from boto3's own chain, such as AWS_ACCESS_KEY_ID,
AWS_PROFILE, AWS_ENDPOINT_URL and the role of the machine. This program does not read them.

`gs://` is a bucket of Google over its interface for clients of S3, with HMAC keys as credentials.
It was not tried.
"""

import base64
import functools
import hashlib
import http.client
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import boto3
import botocore.exceptions as boto
from botocore.config import Config

from orchestrator.errors import UserError
from orchestrator.objects.address import Address
from orchestrator.objects.store import (
    ChangedObjectError,
    Content,
    Info,
    MissingObjectError,
    StoreAwayError,
)
from orchestrator.redact import redact_text

T = TypeVar("T")
CONNECT_S = 5
READ_S = 20  # without a byte
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
CREDENTIALS_S = 3.0  # the service that gives a machine its role may be busy at the start of a job
PAGE = 1000  # objects of one answer; S3's limit
GOOGLE = "https://storage.googleapis.com"
CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
)
CONFIGURED = "AWS_ENDPOINT_URL, AWS_REGION and the credentials"
# Codes of S3's answers
NO_BUCKET = {"NoSuchBucket", "InvalidBucketName"}
MISSING = {"NoSuchKey", "404", "NotFound"}
BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError"}
BUSY |= {"ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict"}
# The bytes were changed on their way.
BUSY |= {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "IncompleteBody"}
REFUSED = {
    "RequestTimeTooSkewed": "the clock of this machine is wrong by minutes; set it",
    "InvalidObjectState": "an object is in an archive; restore it there first",
    "NotImplemented": "the store cannot do what is asked of it, such as a conditional write; use "
    "another store",
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"),
        "the bucket has another address or region; set AWS_ENDPOINT_URL or AWS_REGION",
    ),
}


class _NoCredentialsError(UserError):
    """No credentials were found."""


class S3Store:
    """A bucket; see `store.Store`."""

    def __init__(self, address: Address, patience_s: float) -> None:
        self.address = address
        self.patience_s = patience_s
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if address.scheme == "gs":
            endpoint = endpoint or GOOGLE
        self._settings = (endpoint or None, os.environ.get("AWS_ACCESS_KEY_ID"))
        try:
            _client(*self._settings)
        except (boto.BotoCoreError, ValueError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{address}: {redact_text(text)}") from None

    @property
    def _client(self) -> Any:
        return _client(*self._settings)

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> Content:
        options = {} if version is None else {"IfMatch": version}
        if length is not None:
            options["Range"] = f"bytes={start}-{start + length - 1}"

        def read() -> Content:
            answer = self._client.get_object(Bucket=self.address.bucket, Key=key, **options)
            # Not `with`: its errors would be those of urllib3.
            found = Content(answer["Body"].read(), answer["ETag"])
            # A store may ignore what the request asks for.
            if version is not None and version.strip('"') != found.version.strip('"'):
                raise ChangedObjectError(f"{self._shown(key)}: was written by another process")
            if length not in (None, len(found.data)):
                raise boto.IncompleteReadError(actual_bytes=len(found.data), expected_bytes=length)
            return found

        return self._call(key, read)

    def size(self, key: str) -> int | None:
        def ask() -> int:
            answer = self._client.head_object(Bucket=self.address.bucket, Key=key)
            return int(answer["ContentLength"])

        try:
            return self._call(key, ask)
        except MissingObjectError:
            return None

    def put(self, key: str, data: bytes, sha256: str | None = None) -> None:
        self._put(key, data, sha256)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            return self._put(key, data, **condition)
        except (ChangedObjectError, MissingObjectError):
            # Perhaps it was written, but the answer was lost.
            try:
                found = self.get(key)
            except MissingObjectError:
                raise ChangedObjectError(f"{self._shown(key)}: was removed meanwhile") from None
            if found.data == data:
                return found.version
            raise

    def _put(self, key: str, data: bytes, sha256: str | None = None, **condition: str) -> str:
        digest = bytes.fromhex(sha256) if sha256 else hashlib.sha256(data).digest()
        checksum = base64.b64encode(digest).decode()

        def write() -> str:
            answer = self._client.put_object(
                Bucket=self.address.bucket, Key=key, Body=data, ChecksumSHA256=checksum, **condition
            )
            return str(answer["ETag"])

        return self._call(key, write)

    def delete(self, key: str) -> None:
        self._call(key, lambda: self._client.delete_object(Bucket=self.address.bucket, Key=key))

    def list(self, prefix: str) -> Iterator[Info]:
        token: dict[str, str] = {}
        while True:
            page = self._call(prefix, functools.partial(self._page, prefix, token))
            for found in page.get("Contents", []):
                modified = found["LastModified"].timestamp()
                yield Info(found["Key"], found["Size"], found["ETag"], modified)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, token: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(
            Bucket=self.address.bucket, Prefix=prefix, MaxKeys=PAGE, **token
        )
        page["Name"]  # KeyError if the answer is not a listing
        return page

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """Make a request; repeat it while the store does not answer."""
        now = time.monotonic()
        deadlines = {
            StoreAwayError: now + self.patience_s,
            _NoCredentialsError: now + min(CREDENTIALS_S, self.patience_s),
        }
        pause = FIRST_PAUSE_S
        while True:
            try:
                return request()
            except (boto.BotoCoreError, boto.ClientError, http.client.HTTPException) as error:
                problem = self._problem(key, error)
            except (KeyError, RecursionError):  # boto3 follows a redirection to the same address
                problem = self._refused(f"the answer is not one of S3; check {CONFIGURED}")
            except OSError as error:
                problem = self._away(str(error))
            if time.monotonic() + pause > deadlines.get(type(problem), 0.0):
                raise problem from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _problem(self, key: str, error: Exception) -> UserError:
        """Return what an error of boto3 means. The texts of its errors may hold keys."""
        if isinstance(error, CREDENTIALS):
            reason = "there are no credentials, or they cannot be read"
            return self._denied(reason, _NoCredentialsError)
        if isinstance(error, boto.ParamValidationError):
            return self._refused("no such bucket or key is possible")
        if _is_misconfigured(error):
            return self._denied(
                f"no request is possible ({type(error).__name__}); check {CONFIGURED}, also for "
                "line breaks in them, and AWS_CA_BUNDLE"
            )
        if not isinstance(error, boto.ClientError):
            return self._away(type(error).__name__)
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in REFUSED:
            return self._refused(f"{REFUSED[code]} ({code})")
        if code in NO_BUCKET:
            return self._refused("there is no such bucket; create it, or give another address")
        if code in MISSING:
            return MissingObjectError(f"{self._shown(key)}: there is no such object")
        if status == 412:
            return ChangedObjectError(f"{self._shown(key)}: was written by another process")
        if status >= 500 or status in (408, 429) or code in BUSY:
            return self._away(f"{code}, status {status}")
        if "Token" in code or "Expired" in code:
            return self._denied(f"the credentials have expired ({code}); renew them")
        if status in (401, 403):
            what = f"{code}, {error.operation_name}"
            say = self._refused if code == "AccessDenied" else self._denied
            return say(f"the credentials are wrong, or may not do this ({what})")
        return self._refused(f"the store refuses the request ({code}, status {status})")

    def _denied(self, reason: str, kind: type[UserError] = UserError) -> UserError:
        """Return the error, and drop the client, so that the next request reads the credentials."""
        _client.cache_clear()
        return kind(f"{self._bucket}: {reason}")

    def _refused(self, reason: str) -> UserError:
        return UserError(f"{self._bucket}: {reason}")

    def _away(self, reason: str) -> StoreAwayError:
        return StoreAwayError(
            f"{self._bucket}: the store does not answer ({redact_text(reason)}); run the same "
            "command again"
        )

    @property
    def _bucket(self) -> str:
        return f"{self.address.scheme}://{self.address.bucket}"

    def _shown(self, key: str) -> str:
        return f"{self._bucket}/{key}"


def _is_misconfigured(error: Exception) -> bool:
    """Return whether no request is possible with these settings."""
    cause = getattr(error, "kwargs", {}).get("error")
    return (
        isinstance(error, boto.EndpointProviderError)
        # An invalid header or address
        or (isinstance(cause, ValueError) and not isinstance(cause, OSError))
        or re.search("CERTIFICATE_VERIFY|WRONG_VERSION|No such file", str(cause)) is not None
    )


@functools.cache
def _client(endpoint: str | None, _access_key: str | None) -> Any:
    """Return a client, which threads may share. To make one takes a fifth of a second.

    With another access key, it is another client.
    """
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"total_max_attempts": 1},  # `_call` repeats, also reading a body
        max_pool_connections=16,
        request_checksum_calculation="when_required",  # `put` gives the SHA-256
        s3={"addressing_style": "path"} if endpoint else {},
    )
    return boto3.session.Session().client("s3", config=config, endpoint_url=endpoint)
