"""Runs whose processes are killed at random moments have the same bits as other runs."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.runs import journal
from tests.faults import hooks
from tests.faults.campaign import Campaign, make_source
from tests.faults.case import Case
from tests.faults.cause_table import CAUSES
from tests.faults.command import Ended
from tests.faults.command_case import CommandCase
from tests.faults.kinds import KINDS, Fault, draw
from tests.faults.outcome import outcome

REPO = Path(__file__).resolve().parents[2]
SEED = 4
KILLS = 15
# Kinds of one case of commands, and of one of corpora. `make faults` has all kinds.
QUICK = (("driver-kill", "driver-term", "checkpoint"), ("utf-8", "null"))


@pytest.fixture(scope="module")
def campaign(tiny_dataset, tmp_path_factory) -> Campaign:
    """A campaign of ranks, without SIGSTOP, which takes seconds and has a test of its own."""
    only = tuple(kind for kind in KINDS if kind != "hang")
    path = tmp_path_factory.mktemp("faults")
    source = tmp_path_factory.mktemp("source")
    (source / "tokens").symlink_to(tiny_dataset)
    return Campaign(SEED, path, source, only)


def test_random_kills_change_no_bit(campaign):
    kills = 0
    kinds = set()
    for number, report in enumerate(campaign.reports(), 1):
        faults = [record.text for record in report.happened]
        assert not report.problems, f"seed {SEED}, {report.name}: {report.problems} after {faults}"
        # The speed of the machine also decides which of the drawn faults happen.
        kinds |= {record.kind for record in report.happened}
        kills += sum(record.kills for record in report.happened)
        if kills >= KILLS and len(kinds) > len(KINDS) / 2:
            break
        assert number < KILLS, f"the kinds are not mixed: {sorted(kinds)}"


def test_commands_and_corpora_with_faults_have_no_problem(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    make_source(source, with_store=False)
    for number, only in enumerate(QUICK):
        path = tmp_path / str(number)
        path.mkdir()
        report = Campaign(SEED, path, source, only).case(number)
        assert not report.problems, f"{only}: {report.problems} after {report.happened}"
        assert report.happened


def test_fault_that_shows_after_the_next_start_is_undone_then(campaign, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(campaign.source / "tokens", source / "tokens")
    (source / "corpus.txt").write_text("a")
    case = CommandCase(campaign.starter, tmp_path / "case", source, "train")
    first, second = CAUSES["corpus"], CAUSES["shard"]
    for cause in (first, first, second):
        cause.before(case, random.Random(0))
    shard = case.data_dir / "train-00000.parquet"
    case._check(Ended(-9, "", ""), [first, second, CAUSES["driver-kill"]])
    assert shard.read_bytes() != (source / "tokens" / shard.name).read_bytes()
    case._check(Ended(2, "", "error: changed\n"), [])
    assert case.report.problems == []
    assert case.corpus.read_text() == "a"
    assert shard.read_bytes() == (source / "tokens" / shard.name).read_bytes()
    case._check(Ended(2, "", "error: changed\n"), [])
    assert case.report.problems == ["manual: start 0 ended with 2: error: changed"]


def test_journals_of_a_finished_sweep_are_restored(campaign, tmp_path):
    source = make_source(tmp_path, with_store=False)
    case = CommandCase(campaign.starter, tmp_path / "case", source, "sweep")
    assert case.finish(random.Random(0)), case.texts
    golden = case.outcomes()
    for stage in case.folder.stages():
        stage.journal_file.write_bytes(2 * stage.journal_file.read_bytes())
    assert case.finish(random.Random(0)), case.texts
    case.compare(golden)
    assert case.report.problems == []


@pytest.mark.parametrize("moment", ["before forward", "before batch", "after batch"])
def test_stopped_rank_is_named_and_the_run_goes_on(campaign, moment):
    path = campaign.path / f"hang {moment}"
    case = Case(campaign.starter, path, campaign.source / "tokens", ["train.log_interval=1"])
    assert not case.attempt(2, Fault("hang", 2, 1, moment, 24, patience=5.0))
    assert not case.report.problems, "the watchdog did not find the hang, or it named another rank"
    assert case.attempt(1, None)
    # Only the watchdog writes these files; gloo's timeout would end the hang without them.
    assert list(case.folder.hangs.glob("0001/hang-rank*.txt"))


def test_campaign_reports_a_difference(campaign):
    path = campaign.path / "other"
    case = Case(campaign.starter, path, campaign.source / "tokens", ["train.log_interval=1"])
    assert case.attempt(1, None)
    golden = outcome(case.folder.path)
    case.compare(golden)
    assert case.report.problems == []
    lines = journal.read(case.folder)
    journal.Journal(case.folder).write(lines[-1])
    case.compare(golden)
    assert case.report.problems == ["curve differs from the golden run's"]
    case.compare(golden | {"optimizer.safetensors": b""})
    assert "optimizer.safetensors differs from the golden run's" in case.report.problems


def draw_500(seed: int) -> list[Fault]:
    rng = random.Random(seed)
    faults: list[Fault] = []
    for _ in range(500):
        faults += draw(rng)
    return faults


def test_seed_draws_the_same_faults_and_all_kinds():
    faults = draw_500(seed=1)
    assert faults == draw_500(seed=1)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.world for fault in faults} == {1, 2, 4}


HOOKED = """
import os, sys
from pathlib import Path
from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from tests.faults import hooks
from tests.helpers.tiny import TINY
tokens, folder = sys.argv[1:]
hooks.install("after optimizer", 2, lambda _: os._exit("torch._dynamo" in sys.modules))
experiment = load_experiment(None, [*TINY, "train.max_steps=4"])
train(experiment, RunFolder(folder), Path(tokens), Worker())
sys.exit("the second step was not noticed")
"""


def test_step_of_the_optimizer_is_noticed_without_the_compiler_of_torch(tiny_dataset, tmp_path):
    """Importing it would take seconds in each rank."""
    words = [sys.executable, "-c", HOOKED, tiny_dataset, tmp_path]
    ended = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_every_moment_is_a_function_of_the_product():
    for owner, attribute in hooks.POINTS.values():
        assert callable(getattr(owner, attribute, None)), f"{owner}.{attribute} was renamed"
