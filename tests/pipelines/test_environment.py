"""Environment variables that should be numbers."""

import pytest

from orchestrator.cluster.connection import RECONNECT
from tests.helpers.small_run import command

NOTICE = "RAY_JOB_STOP_WAIT_TIME_S"


@pytest.mark.parametrize(("variable", "example"), [(RECONNECT, 15), (NOTICE, 30)])
def test_variable_that_is_not_a_number_is_refused_before_anything_is_written(
    type_command, tiny_corpus, tmp_path, variable, example
):
    storage = tmp_path / "storage"
    words = command(storage, tiny_corpus)[2:]
    done = type_command("train.py", *words, RAY_ADDRESS="", **{variable: "1m"})
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {variable}: '1m' is not a whole number of seconds; give one, such as "
        f"{example}, or unset the variable\n",
    )
    assert not storage.exists()


def test_help_does_not_read_the_variables(type_command):
    done = type_command("train.py", "--help", **{RECONNECT: "x", NOTICE: "x"})
    assert (done.returncode, done.stderr) == (0, "")
