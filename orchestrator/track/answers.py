"""What an error of a request to MLflow means: try again, or not. Imports no mlflow."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from orchestrator.track.sender import DoubtfulError, RefusedError

# Error codes of a server that has no free connection.
TRANSIENT = ("BAD_REQUEST",)
# A proxy answers so if its server has not started yet; a wrong address does so for ever.
DOUBTFUL = (403, 404)
PROBE_S = 2.0


def rejection(error: Exception, uri: str) -> RefusedError | DoubtfulError | None:
    """Return the rejection that an error of a request to `uri` means; None if it may be transient.

    Waiting does not help if a package is missing, a certificate is not valid, an answer is not HTTP
    or a code is 400 to 407. Later codes are timeouts and overload.
    """
    # The driver of a database is not installed, or SQLAlchemy does not know it.
    if isinstance(error, ModuleNotFoundError) or "Can't load plugin" in str(error):
        return RefusedError(f"{error}; install it")
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return RefusedError(
                f"{cause}; check that the address should begin with https:// (a certificate of "
                "your own: MLFLOW_TRACKING_SERVER_CERT_PATH)"
            )
        is_closed = isinstance(cause, (http.client.RemoteDisconnected, ConnectionResetError))
        if is_closed and _speaks_tls(uri):
            return RefusedError("the server expects https://, the address begins with http://")
        if isinstance(cause, http.client.BadStatusLine) and not is_closed and _is_no_http(cause):
            return RefusedError(f"the answer is not HTTP: {cause}")
    status = _status(error)
    if status in DOUBTFUL:
        return DoubtfulError(str(error))
    if 400 <= status < 408 and getattr(error, "error_code", None) not in TRANSIENT:
        return RefusedError(str(error))
    return None


def _status(error: Exception) -> int:
    """Return the HTTP status of an error of MLflow or of requests; 0 if it has none."""
    if hasattr(error, "get_http_status_code"):
        return error.get_http_status_code()
    return getattr(getattr(error, "response", None), "status_code", 0)


def _is_no_http(error: http.client.BadStatusLine) -> bool:
    """Return whether the answer is of another protocol; a cut one begins like an answer."""
    line = str(error).strip("\"'")
    return line[:5] != "HTTP/"[: len(line)]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all errors inside it: requests and urllib3 put them into `args`."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "reason", None), *found.args]


def _speaks_tls(uri: str) -> bool:
    """Return whether the server of an http:// address expects https://."""
    parts = urlsplit(uri)
    if parts.scheme != "http" or parts.hostname is None:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((parts.hostname, parts.port or 80), PROBE_S) as connection,
            context.wrap_socket(connection),
        ):
            return True
    except OSError:
        return False
