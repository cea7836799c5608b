#!/usr/bin/env python3
"""Show the runs of a storage in a browser. Starts an MLflow server on 127.0.0.1; Ctrl-C ends it.

  pipelines/ui.py               # $ESPALIER_STORAGE, else runs
  pipelines/ui.py /shared/runs --port 5001

From another machine: ssh -L 5000:127.0.0.1:5000 HOST. For runs that are tracked by another MLflow
server (tracking.uri), open the pages of that server.
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.folders import subfolders
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import storage_root
from orchestrator.track.outbox import Sent
from orchestrator.track.server import UI_PORT, experiment_url, sqlite_uri, store_path
from pipelines.common import run_command
from pipelines.options import Options

ENVIRONMENT = {
    # Saves 13 processes and 2.4 GB that only features for generative AI need.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONSAFEPATH": "1",  # the current folder may hold a numpy.py
}


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__)
    parser.add_argument(
        "storage",
        nargs="?",
        default=os.environ.get("ESPALIER_STORAGE") or "runs",
        help="folder of the runs (default: $ESPALIER_STORAGE, else runs)",
    )
    parser.add_number("--port", "N", 1, UI_PORT, "port on 127.0.0.1")
    return parser


def main(argv: list[str]) -> NoReturn:
    """Print the addresses of the pages, and replace this process by the MLflow server."""
    args = options().parse_args(argv)
    store = store_path(storage_root(Experiment(storage=args.storage)))
    if not store.is_file():
        raise UserError(
            f"{args.storage}: has no tracked runs ({store} is missing); give the storage of a run "
            "as argument or in $ESPALIER_STORAGE"
        )
    check_port(args.port)
    print("\n".join(links(store.parent.parent, args.port)), flush=True)
    serve(store, args.port)


def check_port(port: int) -> None:
    """Raise UserError if the port is in use. MLflow would print a traceback after some seconds."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "no such port"
            other = port + 1 if port < 65535 else UI_PORT
            raise UserError(
                f"--port: {port} cannot be used ({reason}); try another, such as --port {other}"
            ) from None


def links(storage: Path, port: int) -> list[str]:
    """Return a link for each MLflow experiment of the storage.

    The start page of MLflow would show features for generative AI.
    """
    server = f"http://127.0.0.1:{port}"
    names: dict[str, str] = {}
    for folder in subfolders(storage):
        sent = Sent.read(RunFolder(folder))
        if sent is not None and sent.experiment_id and sent.uri.startswith("sqlite"):
            names[sent.experiment_id] = sent.experiment
    if not names:
        return [f"{server}/#/experiments?workflowType=machine_learning"]
    return [f"{name}: {experiment_url(server, number)}" for number, name in names.items()]


def serve(store: Path, port: int) -> NoReturn:
    """Replace this process by MLflow's server: one worker, on 127.0.0.1, files beside the store."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        f"--backend-store-uri={sqlite_uri(store)}",
        f"--artifacts-destination={store.parent / 'artifacts'}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--workers=1",
    ]
    # MLflow starts uvicorn by its name. It is in the folder of this Python, also if the virtual
    # environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT, "PATH": path})


if __name__ == "__main__":
    run_command(main)
