"""A Ray cluster on this machine for one driver. It ends with the driver."""

import contextlib
import os
from pathlib import Path
from typing import Any

from orchestrator.cluster import private


def start(**settings: Any) -> None:
    """Start a local cluster without a dashboard, protected by a token that only this user can read.

    Args:
        settings: Passed to `ray.init`.
    """
    import ray

    with private.without_api_server():
        ray.init(address="local", include_dashboard=False, **settings)
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    # Ray makes the file readable for all users. It may be missing, or belong to another user.
    with contextlib.suppress(OSError):
        Path(path).expanduser().chmod(0o600)
