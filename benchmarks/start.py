#!/usr/bin/env python3
"""Measure what users wait for besides training, in seconds, beside nanoGPT.

    benchmarks/start.py --nanogpt PATH --text tinyshakespeare.txt [--rounds 3]

`PATH` is a checkout of nanoGPT. Both programs train `shakespeare-char-cpu` for 20 steps in turns,
on tokens that exist, without the evaluation at step 0:

- start: from the command to the line of step 1;
- end: from the line of the last step to the end of the process.

A first run of ours has a new storage: the tracking store is created. A second run has not. A job on
a running cluster joins a Ray that was started with `ray start --head` and has had a job before. The
table also has the other commands. Times are medians; the load is printed beside them.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from studies import markdown

from pipelines.common import run_command
from pipelines.options import Options, at_least

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from tests.helpers import cluster  # noqa: E402 - not installed

STEPS = 20
# nanoGPT's documented run on a CPU. Its evaluation at step 0 has one batch.
NANOGPT = {
    "device": "cpu",
    "compile": "False",
    "eval_iters": 1,
    "eval_interval": 10_000,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": STEPS,
    "dropout": 0.0,
}
OURS = (
    f"train.max_steps={STEPS}",
    "schedule.warmup_steps=10",
    "train.log_interval=1",
    "train.eval_interval=null",
    "train.eval_tokens=768",
)


@dataclass(frozen=True)
class Waits:
    """Seconds of one command: until step 1, and from the last step to the end."""

    start: float
    end: float


def timed_run(
    command: list[str], cwd: Path, first: str, last: str, env: Mapping[str, str] = os.environ
) -> Waits:
    """Run a command and note when it prints the lines with `first` and `last`.

    Raises:
        RuntimeError: It failed, or did not print the lines.
    """
    began = time.monotonic()
    seen: dict[str, float] = {}
    output = []
    environment = {**env, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            for words in (first, last):
                if words in line:
                    seen.setdefault(words, time.monotonic())
    ended = time.monotonic()
    if process.returncode != 0 or len(seen) < len({first, last}):
        raise RuntimeError(f"{' '.join(command)}:\n{''.join(output)}")
    return Waits(seen[first] - began, ended - seen[last])


class Bench:
    """The commands of the benchmark, in a temporary folder."""

    def __init__(self, nanogpt: Path, text: Path, folder: Path) -> None:
        self.folder = folder
        self.nanogpt = folder / "nanogpt"
        shutil.copytree(nanogpt, self.nanogpt, ignore=shutil.ignore_patterns(".git"))
        data = self.nanogpt / "data" / "shakespeare_char"
        shutil.copy(text, data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
        self.fields = [f"data.corpus={text}", f"data.dir={folder / 'tokens'}", *OURS]
        self._ours("prepare", *self.fields, f"storage={folder}")

    def _command(self, name: str, *words: str) -> list[str]:
        return [sys.executable, f"pipelines/{name}.py", *words]

    def _ours(self, name: str, *words: str, status: int = 0) -> float:
        """Return the seconds of one of our commands."""
        began = time.monotonic()
        config = [] if name == "sample" else ["configs/shakespeare-char-cpu.yaml"]
        command = self._command(name, *config, *words)
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        if done.returncode != status:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        return time.monotonic() - began

    def nanogpt_run(self) -> Waits:
        words = [f"--{name}={value}" for name, value in NANOGPT.items()]
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *words]
        return timed_run(command, self.nanogpt, "iter 1:", f"iter {STEPS}:")

    def our_run(self, storage: Path, name: str, env: Mapping[str, str] = os.environ) -> Waits:
        words = [*self.fields, f"storage={storage}", f"name={name}"]
        command = self._command("train", "configs/shakespeare-char-cpu.yaml", *words)
        return timed_run(command, REPO, f" 1/{STEPS} |", f"{STEPS}/{STEPS} |", env)

    def job_on_cluster(self, storage: Path) -> Waits:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        with cluster.head(storage, cpus=os.cpu_count() or 1) as head:
            self.our_run(storage, "first-job", head.env)
            wait = self.our_run(storage, "second-job", head.env)
        del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]
        return wait

    def round(self, number: int, seconds: dict[str, list[float]]) -> None:
        """Run every command once, and append its seconds to its row."""
        storage = self.folder / f"storage-{number}"
        os.environ["XDG_CACHE_HOME"] = str(storage / "cache")
        waits = {
            "nanoGPT": self.nanogpt_run(),
            "first run": self.our_run(storage, "first"),
            "second run": self.our_run(storage, "second"),
            "job on a running cluster": self.job_on_cluster(storage),
        }
        for name, wait in waits.items():
            seconds[f"{name}: start"].append(wait.start)
            seconds[f"{name}: end"].append(wait.end)
        sample = [str(storage / "second"), "--max-new-tokens", "1"]
        seconds["sample.py, 1 token"].append(self._ours("sample", *sample))
        fields = [*self.fields, f"storage={storage}"]
        for row in ("train.py --dry-run", "train.py --dry-run again"):
            seconds[row].append(self._ours("train", *fields, "--dry-run"))
        seconds["train.py --help"].append(self._ours("train", "--help"))
        seconds["a refusal"].append(self._ours("train", "model.n_head=3", status=2))


def main(argv: list[str]) -> int:
    """Print the table."""
    options = Options(__doc__)
    options.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    options.add_argument("--text", type=Path, required=True, help="tiny Shakespeare")
    options.add_argument("--rounds", type=at_least(1), default=3, help="of all commands")
    arguments = options.parse_args(argv)
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.nanogpt.resolve(), arguments.text.resolve(), Path(folder))
        for number in range(arguments.rounds):
            bench.round(number, seconds)
            print(f"round {number + 1}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    rows = [
        [name, f"{median(values):.1f}", f"{min(values):.1f} – {max(values):.1f}"]
        for name, values in seconds.items()
    ]
    print(markdown(["what", "s, median", "range"], rows))
    return 0


if __name__ == "__main__":
    run_command(main)
