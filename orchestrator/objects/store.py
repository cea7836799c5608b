"""What is asked of an object store, and the errors of one."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from orchestrator.errors import UnreadableError, UserError
from orchestrator.objects.address import Address

PATIENCE_S = 60.0  # how long a request is repeated while the store does not answer


class Info(NamedTuple):
    """An object in a listing.

    Attributes:
        key: Its whole key.
        size: In bytes.
        version: Another value after each write of the object (ETag).
        modified: Time of the write, in seconds.
    """

    key: str
    size: int
    version: str
    modified: float


class Content(NamedTuple):
    """What a request has read of an object."""

    data: bytes
    version: str


class StoreAwayError(UnreadableError):
    """The store has not answered, although it was asked again and again."""


class MissingObjectError(UserError):
    """There is no such object."""


class ChangedObjectError(UserError):
    """The object has another version than the request expects."""


class Store(Protocol):
    """A bucket. Requests are repeated with growing pauses while the store does not answer.

    Every method raises UserError if the store refuses the request (no bucket, wrong or expired
    credentials), and StoreAwayError if it does not answer. Threads may share a store.
    """

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> Content:
        """Read an object, or `length` bytes of it.

        Raises:
            MissingObjectError: There is none.
            ChangedObjectError: It is not of this `version`.
        """

    def size(self, key: str) -> int | None:
        """Return the bytes of an object; None if there is none."""

    def put(self, key: str, data: bytes, sha256: str | None = None) -> None:
        """Write an object. The store compares the bytes that arrive with their SHA-256.

        Args:
            key: Its key.
            data: Its content.
            sha256: Of the data, in hexadecimal digits, if it is known.
        """

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Write an object only if it is of this version; None: only if there is none.

        The data must differ from those of other writers: after an answer that was lost, it tells
        whether the object was written.

        Returns:
            The new version.

        Raises:
            ChangedObjectError: The object is of another version.
        """

    def delete(self, key: str) -> None:
        """Remove an object, if there is one."""

    def list(self, prefix: str) -> Iterator[Info]:
        """List the objects whose keys begin with a text, by key."""


def open_store(address: Address, patience_s: float | None = None) -> Store:
    """Connect to the store of an address. Nothing is requested yet.

    Args:
        address: An address in it.
        patience_s: How long a request is repeated; None: `PATIENCE_S`.

    Raises:
        UserError: boto3 is not installed, or there are no credentials.
    """
    try:
        from orchestrator.objects import s3
    except ModuleNotFoundError as error:
        if error.name not in ("boto3", "botocore"):
            raise
        raise UserError(f"{address}: needs boto3; pip install 'espalier[s3]'") from None
    return s3.S3Store(address, PATIENCE_S if patience_s is None else patience_s)
