#!/usr/bin/env python3
"""Look at the runs of a storage in a browser: serves its embedded MLflow store on this machine only, until Ctrl-C.

  pipelines/ui.py               # $ESPALIER_STORAGE, else runs
  pipelines/ui.py /shared/runs --port 5001

From another machine: ssh -L 5000:127.0.0.1:5000 HOST. A store of a server's own (tracking.uri) has its own pages.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from orchestrator.errors import UserError
from orchestrator.track.server import UI_PORT, experiment_url, store_path
from pipelines.common import Options, at_least, guarded

ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 13 processes and 2.4 GB that only GenAI features need
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument(
        "storage",
        nargs="?",
        type=Path,
        default=Path(os.environ.get("ESPALIER_STORAGE") or "runs"),
        help="folder of the runs ($ESPALIER_STORAGE, else runs)",
    )
    parser.add_argument(
        "--port", metavar="N", type=at_least(1), default=UI_PORT, help=f"on 127.0.0.1 ({UI_PORT})"
    )
    args = parser.parse_args(argv)
    store = store_path(args.storage.expanduser())
    if not store.is_file():
        raise UserError(
            f"{args.storage}: holds no tracked runs ({store} is missing); give the storage of a run as "
            f"argument or in ESPALIER_STORAGE"
        )
    check_port(args.port)
    print("\n".join(links(store.parent.parent, args.port)), flush=True)
    serve(store, args.port)


def check_port(port: int) -> None:
    """Raise where something listens already: MLflow would say so in a traceback, after seconds."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "no such port"
            raise UserError(
                f"--port: {port} cannot be had ({reason}); take another, for example "
                f"--port {port + 1 if port < 65535 else UI_PORT}"
            ) from None


def links(storage: Path, port: int) -> list[str]:
    """A page per experiment that this storage's runs are in: MLflow itself would open its GenAI side."""
    found = {}
    for file in sorted(storage.glob("*/tracking.json")):
        state = json.loads(file.read_text("utf-8"))
        if state["uri"].startswith("sqlite") and state["experiment_id"]:
            found[state["experiment_id"]] = state["experiment"]
    pages = [
        f"{name}: {experiment_url(f'http://127.0.0.1:{port}', number)}"
        for number, name in found.items()
    ]
    return pages or [f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"]


def serve(store: Path, port: int) -> NoReturn:
    """Become MLflow's server: one worker, loopback, nothing written outside the store's folder."""
    # MLflow starts uvicorn by name, which is beside this Python even where its environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--artifacts-destination",
        str(store.parent / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT, "PATH": path})


if __name__ == "__main__":
    guarded(main)
