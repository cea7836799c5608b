"""Sweep tracking: the projection of a sweep's folder into MLflow, one parent run and under it a run per trial.

Eats `<sweep>/` (run.json, metrics.jsonl, events.jsonl, summary.json, sweep.yaml, plan.txt, comparison.csv, figures/) and
each `<sweep>/trials/<trial>/`, which looks like a lone run's folder; yields MLflow runs that show them, and in the registry the
best trial's checkpoint under the sweep's name and the alias `best`. As for a run, the folder is the truth: everything may
be sent twice. A trial whose folder has not changed since it was sent costs no request, in this process or the next.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from orchestrator.redact import redact_text
from orchestrator.track import attachments, outbox
from orchestrator.track.mlflow import KEY_TAG, STATE, Projection, Tracker, refusals, resend_metrics
from orchestrator.track.sender import Ending, RefusedError
from orchestrator.track.server import PARENT_TAG, first, hits, sweep_url, sweep_view, whole

BEST = "best"  # the registry's alias
VERSIONS_TAG = (
    "mlflow.modelVersions"  # by this the pages of a checkpoint's model name its registered versions
)
DOCUMENTS = ("sweep.yaml", "plan.txt", "comparison.csv", "summary.json")
TRIAL_DOCUMENTS = ("experiment.yaml", "summary.json")
WATCHED = (
    "run.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "samples",
)  # by these a trial's changes are seen
log = logging.getLogger(__name__)


class SweepTracker(Tracker):
    """A `Tracker` of a sweep's folder and all its trials. `url` is the page of the ranked trials with their curves."""

    _page = staticmethod(sweep_url)

    def _image(self, *where: Any) -> Projection:
        return _Sweep(*where)

    @property
    def url(self) -> str | None:
        """None until MLflow holds the view that it shows."""
        return super().url if self._projection.state.get("view") else None


def resend_sweep_metrics(
    sweep_dir: Path, uri: str, experiment_name: str, deadline_s: float = 60
) -> bool:
    """Send what a sweep's folder holds and MLflow does not; True if all was accepted. Statuses are the summaries'."""
    return resend_metrics(sweep_dir, uri, experiment_name, deadline_s, SweepTracker)


class _Sweep(Projection):
    """The parent run; it knows its trials by their folders."""

    def __init__(self, *where: Any):
        super().__init__(*where)
        self.seen: dict[Path, tuple[str, str | None]] = {}
        self.refused: set[str] = set()

    def send(self, reopen: bool, ending: Ending | None) -> None:
        super().send(reopen, ending)
        self.send_view()
        if ending is None:
            self.send_documents()
        # A trial without a summary runs while its sweep does; a sweep that ended has killed it.
        default = (ending.status and "KILLED") if ending else ("RUNNING" if reopen else None)
        self.send_trials(default)
        self.send_best()
        if ending and self.refused:
            raise RefusedError(f"trials {', '.join(sorted(self.refused))}")

    def send_view(self) -> None:
        key, value = sweep_view(self.state["run_id"])
        if self.state.get("view") != value:
            self.client.set_experiment_tag(self.state["experiment_id"], key, value)
            self.state["view"] = value
            self.save()

    def send_documents(self) -> None:
        pictures = sorted((self.run_dir / "figures").glob("*.png"))
        attachments.send_changed(self, [*(self.run_dir / name for name in DOCUMENTS), *pictures])

    # ---- its trials ----
    def send_trials(self, default: str | None) -> None:
        """Every trial that is not as it was sent; `default` is the status of those without a summary."""
        changed = []
        for file in sorted(self.run_dir.glob("trials/*/run.json"), reverse=True):
            folder = file.parent
            look = " ".join(
                f"{path.name} {mark}"
                for path, mark in outbox.marked(folder / n for n in WATCHED).items()
            )
            if self.seen.get(folder) != (look, default):
                status = outbox.status(folder) or default
                trial = _Trial(folder, self, f"{self.state['run_id']} {status} {look}", status)
                if trial.is_sent:
                    self.seen[folder] = look, default
                elif trial.facts.get("key"):
                    changed.append((trial, look))
        known = (
            self._known_trials() if any(not trial.state["run_id"] for trial, _ in changed) else {}
        )
        while changed:  # taken out one by one: each has files open while it is there
            trial, look = changed.pop()
            self._send_trial(trial, known)
            self.seen[trial.run_dir] = look, default

    def _send_trial(self, trial: "_Trial", known: dict[str, Any]) -> None:
        """One trial; where MLflow says no to it, the others go on."""
        name = trial.run_dir.name
        try:
            with refusals():
                trial.send_all(known)
            self.refused.discard(name)
        except RefusedError as error:
            if name not in self.refused:
                log.warning(
                    "trial %s: refused by MLflow, the others go on: %s",
                    name,
                    redact_text(str(error)),
                )
            self.refused.add(name)

    def _known_trials(self) -> dict[str, Any]:
        """MLflow's runs of this sweep by their keys: one search for all trials, not one for each."""
        found, page = {}, None
        query = f"tags.`{PARENT_TAG}` = '{self.state['run_id']}'"
        while True:
            runs = hits(
                self.client.search_runs,
                [self.state["experiment_id"]],
                query,
                max_results=1000,
                page_token=page,
            )
            found |= {run.data.tags.get(KEY_TAG): run for run in runs}
            page = getattr(runs, "token", None)
            if not page:
                return found

    # ---- its best checkpoint ----
    def send_best(self) -> None:
        """Register the final checkpoint of summary.json's `best_trial`, by reference, and point the alias at it."""
        trial = outbox.read_json(self.run_dir / "summary.json").get("best_trial")
        sent = outbox.read_json(self.run_dir / "trials" / str(trial) / STATE)
        standing = {
            name: c["model_id"] for name, c in sent.get("checkpoints", {}).items() if c["sha256"]
        }
        if not standing or sent["uri"] != self.state["uri"]:
            return  # none yet, or its trial was refused
        model_id = standing[max(standing)]
        if self.state.get("best") != model_id:
            name = re.sub(r"[/:]", "-", self.facts.get("name") or self.run_dir.name)
            version = self._version(name, model_id, trial)
            self.client.set_registered_model_alias(name, BEST, version)
            self.state["best"] = model_id
            self.save()

    def _version(self, name: str, model_id: str, trial: str) -> str:
        """The registered version of a checkpoint's model, found or made."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if known := first(
            self.client.search_model_versions, f"name = '{name}' AND tags.`model_id` = '{model_id}'"
        ):
            return known.version
        model = self.client.get_logged_model(model_id)
        whole(model, model.model_id)
        words = {
            "model_id": model_id,
            "trial": trial,
            "checkpoint.uri": model.tags["checkpoint.uri"],
        }
        # Its artifacts by their place: MLflow looks `models:/<id>` up in the store of the process, not in this client's.
        made = self.client.create_model_version(
            name,
            model.artifact_location,
            model.source_run_id,
            words,
            model_id=model_id,
            await_creation_for=0,
        )
        named = [
            *json.loads(model.tags.get(VERSIONS_TAG, "[]")),
            {"name": name, "version": whole(made, made.version).version},
        ]
        self.client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps(named)})
        return made.version


class _Trial(Projection):
    """A child run. Made anew for every change of its folder: hundreds of trials must not keep hundreds of files open."""

    def __init__(self, folder: Path, sweep: _Sweep, mark: str, status: str | None):
        super().__init__(folder, sweep.uri, sweep.experiment_name, sweep.given_up)
        self.client, self.parent, self.mark, self.status = sweep.client, sweep, mark, status
        self.tags = {PARENT_TAG: sweep.state["run_id"]}
        self.known: dict[str, Any] = {}

    @property
    def is_sent(self) -> bool:
        return self.state.get("mark") == self.mark

    def send_all(self, known: dict[str, Any]) -> None:
        """Everything that is missing. `known`: MLflow's runs of the sweep, by key."""
        self.known = known
        self.attach(reopen=False)
        self.send_metrics()
        self.send_facts()
        self.send_status()
        if outbox.status(
            self.run_dir
        ):  # until then its checkpoints are those of a stage that it shares
            self.send_checkpoints()
        samples = list(outbox.samples(self.run_dir).items())
        attachments.send_samples(self, dict(samples[-1:]))  # the last one: there are many trials
        attachments.send_changed(self, [self.run_dir / name for name in TRIAL_DOCUMENTS])
        self.state["mark"] = self.mark  # what changed since it was taken changes it again
        self.save()

    def _found_run(self):
        self.state["experiment_id"] = self.parent.state["experiment_id"]
        return self.known.get(self.facts["key"])

    def send_status(self) -> None:
        """Also of a run that had ended and goes on, because its sweep has grown or was started again."""
        info, ended = self.run.info, outbox.ended_ms(self.run_dir)
        if self.status == "RUNNING" and info.status != "RUNNING":
            self.client.update_run(info.run_id, status="RUNNING")
        elif self.status in outbox.STATUSES and (info.status, info.end_time) != (
            self.status,
            ended or info.end_time,
        ):
            self.client.set_terminated(info.run_id, self.status, ended)
