"""`make submit RETRY=N` with a stand-in for `ray job submit`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import submit
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parents[2]
ACCEPTED = "Job 'raysubmit_x' submitted successfully\n"
LOST = ACCEPTED + "aiohttp.client_exceptions.ClientError: Connection closed\n"
UNREACHABLE = "ConnectionError: Failed to connect to Ray at address: http://127.0.0.1:8265.\n"
# Prints the next text of the folder `answers`, whose name ends with the exit status.
RAY = """#!{python}
import pathlib, sys, time
file = sorted(pathlib.Path("answers").iterdir())[0]
print(" ".join(sys.argv[1:3]), flush=True)
print(file.read_text(), end="", flush=True)
if file.name.endswith("wait"):
    time.sleep(60)
file.unlink()
sys.exit(int(file.name.partition("-")[2]))
"""
STILL_RUNS = "Status for job 'raysubmit_1': RUNNING\n"
NO_PACKAGE = "Status message: runtime_env setup failed: no space left on device\n"


def failed(status: int) -> str:
    return (
        f"{ACCEPTED}step 5 | loss 2.5\n"
        "2026-11-28 20:00:00,100\tINFO cli.py:87 -- Status message: Job entrypoint command failed "
        f"with exit code {status}, last available logs (truncated):\nstep 5 | loss 2.5\n"
    )


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Sets what the stand-in prints and its statuses, one a call."""
    monkeypatch.setattr(submit, "PAUSE_S", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ray").write_text(RAY.format(python=sys.executable))
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "answers").mkdir()

    def write(*texts: tuple[str, str]) -> None:
        for number, (text, status) in enumerate(texts):
            (tmp_path / "answers" / f"{number}-{status}").write_text(text)

    return write


@pytest.mark.parametrize(
    ("texts", "times", "status", "calls"),
    [
        ([(ACCEPTED, "0")], 3, 0, 1),
        ([(failed(75), "1"), (ACCEPTED, "0")], 3, 0, 2),
        ([(failed(75), "1")] * 3, 2, 1, 3),
        ([(failed(75), "1")], 0, 1, 1),
        ([(failed(-9), "1"), (ACCEPTED, "0")], 3, 0, 2),
        ([(failed(2), "1")], 3, 1, 1),
        ([(failed(1), "1")], 3, 1, 1),
        ([(LOST, "1"), (UNREACHABLE, "1"), (failed(75), "1"), (ACCEPTED, "0")], 5, 0, 4),
        ([(LOST, "1"), (failed(2), "1")], 5, 1, 2),
        ([(UNREACHABLE, "1")], 3, 1, 1),
        ([(UNREACHABLE, "2")], 3, 2, 1),
        ([(f"{ACCEPTED}{STILL_RUNS}", "0"), (ACCEPTED, "0")], 3, 0, 2),
        ([(f"{ACCEPTED}{STILL_RUNS}", "0")], 0, 1, 1),
        ([(f"{ACCEPTED}{NO_PACKAGE}", "1")], 3, 1, 1),
    ],
)
def test_job_is_submitted_again_after_status_75_and_a_lost_cluster(
    answers, texts, times, status, calls, capfd
):
    answers(*texts)
    assert submit.main(times, ["./ray", "job", "submit"]) == status
    out = capfd.readouterr().out
    assert out.count("job submit\n") == calls
    assert out.count("submit: ") == calls - 1


def test_text_of_the_job_is_passed_on_at_once_and_ctrl_c_ends_only_the_text(answers, tmp_path):
    answers((failed(75), "wait"))
    words = [sys.executable, REPO / "deploy" / "submit.py", "3", "./ray", "job", "submit"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(words, stdout=out, start_new_session=True)
        wait_until(lambda: "step 5" in (tmp_path / "out").read_text(), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130


def test_make_gives_the_number_of_tries(tmp_path):
    done = subprocess.run(
        ["make", "--dry-run", "submit", "RETRY=7", f"VENV={tmp_path}"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"deploy/submit.py 7 {tmp_path}/bin/ray job submit --working-dir ." in done.stdout


@pytest.mark.parametrize("words", [["x", "ray"], ["-1", "ray"], ["1.5", "ray"], ["3"], []])
def test_wrong_number_of_tries_is_one_line_with_status_2(words):
    command = [sys.executable, str(REPO / "deploy" / "submit.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: give RETRY=N, a whole number of 0 to 999999\n"
