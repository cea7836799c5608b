"""Submits a job, and submits it again if it ends with status 75 or if the cluster is lost.

    deploy/submit.py TIMES ray job submit …

Use `make submit RETRY=TIMES`. It needs the standard library only. It passes on what the command
prints, and learns from it how the job ended: `ray job submit` itself tells only success or failure.
"""

import os
import re
import subprocess
import sys
import time

AGAIN = {75, -9, 137}  # run the same command again; the driver was killed
ACCEPTED = re.compile(r"Job '\S+' submitted successfully")
FAILED = re.compile(r"Status message: Job entrypoint command failed with exit code (-?\d+)")
RUNNING = re.compile(r"Status for job '\S+': (?:PENDING|RUNNING)")
REFUSED = re.compile(r"Status message: runtime_env setup failed")
PAUSE_S = 10.0  # doubled after each try
LONGEST_PAUSE_S = 300.0


def submit(command: list[str], again: bool) -> tuple[int, str | None]:
    """Run the command. Return its status, and why the job should be submitted again, if so.

    Args:
        command: It submits a job and waits for its end.
        again: Whether an earlier submission was accepted.
    """
    accepted = again
    job_status = None
    is_running = is_refused = False
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            accepted = accepted or ACCEPTED.search(line) is not None
            if found := FAILED.search(line):
                job_status = int(found[1])
            is_running = is_running or RUNNING.search(line) is not None
            is_refused = is_refused or REFUSED.search(line) is not None
    status = process.returncode
    if is_running:  # such as after the time limit of a proxy
        return status or 1, "its output ended before the job"
    if status == 0 or is_refused or not accepted:
        return status, None
    if job_status is None:
        return status, "the cluster was lost, or cannot be reached"
    return status, f"its status was {job_status}" if job_status in AGAIN else None


def main(times: int, command: list[str]) -> int:
    """Submit until the job is done, or fails in another way. Return the status of the command."""
    pause_s = PAUSE_S
    status, reason = submit(command, again=False)
    for time_ in range(1, times + 1):
        if reason is None:
            break
        print(f"submit: {reason}; again in {pause_s:g} s ({time_} of {times})", flush=True)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        status, reason = submit(command, again=True)
    return status


if __name__ == "__main__":
    if len(sys.argv) < 3 or not re.fullmatch("[0-9]{1,6}", sys.argv[1]):
        print("error: give RETRY=N, a whole number of 0 to 999999", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:  # the job goes on
        sys.exit(130)
