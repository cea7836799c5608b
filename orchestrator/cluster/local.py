"""A Ray of one's own: for the driver that finds no cluster, on this machine, for as long as its process lives.

It calls nobody. Of itself Ray starts a process that asks the cloud's metadata addresses where it is, at every start and
also with its usage reports off; where there is no such cloud that is a call to the outside, and it loads nothing else.
"""

import contextlib
import os
from pathlib import Path


def start(**settings) -> None:
    """`ray.init(**settings)` of a new local cluster without a dashboard; a token protects it, which only this user reads."""
    import ray
    from ray._private import services

    # No public switch leaves this process out; (None, None) is Ray's own answer where it could not be started.
    original, services.start_api_server = services.start_api_server, lambda *_, **__: (None, None)
    try:
        ray.init(address="local", include_dashboard=False, **settings)
    finally:
        services.start_api_server = original
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with contextlib.suppress(
        OSError
    ):  # Ray writes it for all to read; there is none, or it is somebody else's
        file.chmod(0o600)
