"""Files that a sweep writes, and updates while it runs, for its user and for MLflow.

In the sweep's folder: run.json, metrics.jsonl, sweep.yaml, plan.txt, comparison.csv,
figures/tree.png, summary.json and trials/<name>/, each with the file names of a lone run.
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, cast

from orchestrator.errors import NOT_WRITABLE
from orchestrator.files import write_atomically, write_json
from orchestrator.folders import make_folder
from orchestrator.own_files import store
from orchestrator.runs import journal
from orchestrator.runs.ending import Ending, Kind
from orchestrator.runs.facts import facts_of
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.identity import new_record
from orchestrator.runs.summary import last_state
from orchestrator.sweep import trials
from orchestrator.sweep.report import comparison, figures, view
from orchestrator.sweep.report.pace import Pace
from orchestrator.sweep.report.summary import SweepSummary, summarize
from orchestrator.sweep.states import BLOCKED, DONE, FAILED, RUNNING, WAITING
from orchestrator.sweep.study import Study
from orchestrator.sweep.tree import Stage, StageTree
from orchestrator.sweep.trials import PlannedTrial, data_key

SCRIPT = "pipelines/sweep.py"
TICK_S = 30.0  # seconds between two updates while no stage ends
FEW = 8  # at the end of a stage of at most so many trials, all their folders are updated


class SweepFiles:
    """Files of one sweep: call `begin` once, `stage_ended` with each stage, then `finish`.

    Args:
        study: The sweep.
        pace: Steps that were made, and the time that is left.
    """

    def __init__(self, study: Study, pace: Pace | None = None) -> None:
        self.study = study
        self.pace = pace or Pace(study, slots=1)
        self.last = time.monotonic()  # when the journal of the sweep was last extended
        self.progress = study.progress
        self.folder = study.folder
        record = self.folder.read_record() or new_record(self.folder)
        self.key = record["key"]
        self.attempts = record.get("attempts", [])
        self.drawn: StageTree | None = None
        self.facts: dict[str, Any] = {}  # of each trial, for MLflow

    def begin(self) -> None:
        """Write the sweep's own files, and the folders of trials that have stored stages."""
        study = self.study
        attempt = {
            "started": _now(),
            "layout": asdict(study.layout),
            "trials": len(study.trials),
        }
        self.attempts.append(attempt)
        store(self.folder.code, [k for e in study.sweep.experiments for k in e.own_kinds])
        write_atomically(self.folder.sweep_file, study.sweep.to_yaml())
        write_json(self.folder.run_file, self._run_record())
        self.folder.summary_file.unlink(missing_ok=True)
        self.write_plan()
        self.write_trials()

    def write_trials(self) -> None:
        """Write the files of all trials that are missing, damaged, or not up to date."""
        for trial in self.study.trials.values():
            self._assemble(trial)

    def stage_ended(self, stage: Stage) -> None:
        """Update the trials of a stage, and append a line to the sweep's journal.

        If few trials share the stage, all their folders are updated, so that MLflow shows the
        curves early. If many share it, only those of trials that are over.
        """
        for name in stage.trials:
            trial = self.study.trials.get(name)
            if trial and (len(stage.trials) <= FEW or self._is_over(trial)):
                with _unless_not_writable(self.folder.trial(name)):
                    self._assemble(trial)

        self._append_metrics()

    def tick(self) -> None:
        """While long stages run, update the sweep's journal and the curves of few trials."""
        if self.drawn is None:  # it takes a second, in which the workers start
            with _unless_not_writable(self.folder):
                self.write_figure()
        if time.monotonic() - self.last < TICK_S:
            return
        self._append_metrics()
        for stage, state in self.progress.states.by_stage.items():
            names = self.progress.tree.by_id[stage].trials if state == RUNNING else ()
            for name in names if len(names) <= FEW else ():
                if name in self.study.trials:
                    with _unless_not_writable(self.folder.trial(name)):
                        self._assemble(self.study.trials[name])

    def _append_metrics(self) -> None:
        self.last = time.monotonic()
        tree = self.progress.tree
        now = self.pace.look()
        done = [name for name in self.study.trials if self.progress.states.of_trial(name) == DONE]
        metrics: dict[str, float] = {
            "sweep/steps_run": self.progress.steps_run + sum(now.live.values()),
            "sweep/steps_saved": tree.steps_asked - tree.steps_to_run,
            "sweep/trials_done": len(done),
        }
        if now.left_s is not None:
            metrics["sweep/seconds_left"] = now.left_s
        best = self.study.best()
        if best is not None:
            metric = self.study.metric.rpartition("/")[2]
            metrics[f"sweep/best_{metric}"] = best[1]
        last = journal.last(self.folder) or {"step": 0}
        journal.Journal(self.folder).append(last["step"] + 1, metrics)

    def finish(self, ending: Ending, wall_s: float, *, quick: bool = False) -> SweepSummary:
        """Write the comparison and the summary of the trials, however the sweep ended.

        Args:
            ending: How the sweep ended.
            wall_s: Seconds that it took.
            quick: Leave out the tree and the folders of the trials. After SIGTERM there may be
                three seconds left.
        """
        if not quick:
            for trial in self.study.trials.values():
                # The advice for a trial that ran out of memory came after its summary.
                has_failed = self.progress.states.of_trial(trial.name) in (FAILED, BLOCKED)
                if has_failed or not self._has_summary(trial):
                    with _unless_not_writable(self.folder.trial(trial.name)):
                        self._assemble(trial)
        estimate = self.pace.estimate
        if estimate is not None and self.pace.corrected_s is not None:
            estimate = {**estimate, "corrected_s": self.pace.corrected_s}
        summary = summarize(self.study, ending, estimate, wall_s)
        with _unless_not_writable(self.folder):
            write_json(self.folder.summary_file, summary)
            write_atomically(self.folder.comparison_file, comparison.csv_text(self.study.results()))
            if not quick:
                self.write_plan()
                self.write_figure()
        return summary

    # ---- the sweep ----

    def _run_record(self) -> dict[str, Any]:
        """Return run.json: what the trials have in common, for MLflow's parent run."""
        study = self.study
        first = study.sweep.experiments[0]
        facts = facts_of(first, study.datasets[data_key(first.data)], SCRIPT)
        varied = {name for c in study.trials.values() for name in c.fields}
        params = {
            name: value
            for name, value in facts["params"].items()
            if name not in varied and not name.startswith("derived.")
        }
        for name, value in study.sweep.settings.model_dump(by_alias=True).items():
            if value:
                params[f"sweep.{name}"] = json.dumps(value)
        tags = {
            "sweep.trials": len(study.trials),
            "sweep.steps_asked": self.progress.tree.steps_asked,
            "sweep.steps_in_tree": self.progress.tree.steps_in_tree,
        }
        return {
            "name": study.sweep.base.name,
            "key": self.key,
            **facts,
            "params": params,
            "tags": facts["tags"] | tags,
            "attempts": self.attempts,
        }

    def write_plan(self) -> None:
        """Write the tree of stages as text."""
        tree = self.progress.tree
        if tree.stages:  # optuna may not have proposed a trial yet
            text = "\n".join([*view.summary(tree), "", view.text(tree), ""])
            write_atomically(self.folder.plan_file, text)

    def write_figure(self) -> None:
        """Draw the tree of stages, unless this one was drawn."""
        tree = self.progress.tree
        if tree.stages and tree is not self.drawn:
            self.drawn = tree
            picture = io.BytesIO()
            figures.stage_tree(tree).savefig(picture)
            make_folder(self.folder.figures)
            write_atomically(self.folder.figure_file("tree"), picture.getvalue())

    # ---- one trial ----

    def _has_summary(self, trial: PlannedTrial) -> bool:
        return self.folder.trial(trial.name).read_summary() is not None

    def _is_over(self, trial: PlannedTrial) -> bool:
        return self.progress.states.of_trial(trial.name) not in (WAITING, RUNNING)

    def _assemble(self, trial: PlannedTrial) -> None:
        """Write the folder of a trial as far as its stages are done."""
        last = self.progress.last_stage(trial.name)
        if last is None and not self._is_over(trial):
            return
        folder = self.folder.trial(trial.name)
        if not self._is_over(trial):
            trials.assemble(folder, last, trial, self._trial_record(trial), None)
            return
        # The record of a trial that is over names the code that trained it.
        record = folder.read_record()
        if not self._has_summary(trial) or (record or {}).get("trial") != trial.key:
            record = None
        summary = self._trial_summary(trial)
        trials.assemble(folder, last, trial, record or self._trial_record(trial), summary)

    def _trial_record(self, trial: PlannedTrial) -> dict[str, Any]:
        """Return run.json of a trial."""
        name = trial.name
        if name not in self.facts:
            self.facts[name] = facts_of(trial.experiment, trial.dataset, SCRIPT)
        path = self.progress.tree.stages_of(name)
        tags = {
            "sweep.name": self.folder.name,
            "sweep.setting": trial.setting,
            "sweep.state": self.progress.states.of_trial(name),
            "sweep.stages": " > ".join(f"{s.id[:8]}[{s.start}:{s.stop}]" for s in path),
            "sweep.steps_shared": sum(s.steps for s in path if len(s.trials) > 1),
        }
        reason = self.study.reason(name)
        if reason:
            tags["sweep.reason"] = reason
        known = self.folder.trial(name).read_record() or {}
        first_attempt = {"started": _now(), "layout": asdict(self.study.layout)}
        return {
            "name": name,
            "key": trials.tracking_key(self.key, trial, known),
            "trial": trial.key,
            "settings": trial.settings_key,
            **self.facts[name],
            "tags": self.facts[name]["tags"] | tags,
            "attempts": known.get("attempts") or [first_attempt],
        }

    def _trial_summary(self, trial: PlannedTrial) -> dict[str, Any]:
        """Return summary.json of a trial that is over."""
        name = trial.name
        state = self.progress.states.of_trial(name)
        stages = self.progress.tree.stages_of(name)
        results = [self.progress.stored.results.get(stage.id) for stage in stages]
        seconds = sum(result.seconds for result in results if result is not None)
        kind = FAILED if state == BLOCKED else state
        status = Ending(cast(Kind, kind)).mlflow_status
        lines = self.study.curve(trial)
        step = lines[-1]["step"] if lines else 0
        checkpoint = self.folder.trial(name).checkpoint(step) if status == "FINISHED" else None
        result = self.progress.result(name)
        state_at_end = last_state(
            lines,
            step,
            trial.steps.batch_sizes.before(step) * trial.experiment.model.block_size,
            checkpoint,
            result.weights_sha256 if result is not None else None,
        )
        return {
            "status": status,
            **state_at_end,
            "state": state,
            "reason": self.study.reason(name),
            "wall_s": round(seconds, 1),
        }


@contextlib.contextmanager
def _unless_not_writable(folder: RunFolder) -> Iterator[None]:
    """Leave the files of a folder as they are if they cannot be written; the next start
    writes them."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        print(f"{folder.path}: not all files are written: {error.strerror}", file=sys.stderr)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
