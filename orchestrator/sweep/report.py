"""What a sweep leaves behind for people and for the tracking server, kept up to date while it runs.

Eats a study and the keeper of its books; yields `run.json`, `metrics.jsonl`, `plan.txt`, `comparison.csv`, `figures/`,
`summary.json` and `trials/<name>/` in the sweep's folder, and the last lines on the terminal.
"""

import hashlib
import io
import json
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from orchestrator.cost import estimate as cost_lines
from orchestrator.files import read_json, write_atomically
from orchestrator.redact import redact
from orchestrator.runs import journal, metrics
from orchestrator.runs.facts import facts_of
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep import figures as sweep_figures
from orchestrator.sweep import ranking as comparison
from orchestrator.sweep import trials
from orchestrator.sweep import view as tree_view
from orchestrator.sweep.progress import Keeper
from orchestrator.sweep.stage_states import BLOCKED, DIVERGED, DONE, FAILED, STOPPED
from orchestrator.sweep.study import Study, data_key
from orchestrator.sweep.tree import Stage
from orchestrator.sweep.trials import Candidate
from orchestrator.text import duration, number, table

SCRIPT = "pipelines/sweep.py"
FEW = 8  # trials of a stage
STATUS = {
    DONE: "FINISHED",
    FAILED: "FAILED",
    DIVERGED: "FAILED",
    BLOCKED: "FAILED",
    STOPPED: "KILLED",
}


class Report:
    """`begin` once, `stage_ended` with each stage, `finish` and `show` at the end."""

    def __init__(self, study: Study, books: Keeper, estimate: dict[str, float] | None = None):
        self.study, self.books, self.folder, self.estimate = study, books, study.folder, estimate
        known = read_json(self.folder / "run.json") or {"key": uuid.uuid4().hex, "attempts": []}
        self.key, self.attempts = known["key"], known["attempts"]
        self.facts: dict[str, dict[str, Any]] = {}

    def begin(self) -> None:
        """The sweep's own papers, and the folders of the trials that have something already."""
        study = self.study
        attempt = {
            "started": _now(),
            "layout": asdict(study.layout),
            "trials": len(study.candidates),
        }
        self.attempts = [*self.attempts, redact(attempt)]
        first = next((c.experiment for c in study.candidates.values()), study.sweep.base)
        facts = facts_of(first, study.datasets[data_key(first.data)], SCRIPT)
        varying = {key for c in study.candidates.values() for key in c.spec.fields}
        params = {
            k: v
            for k, v in facts["params"].items()
            if k not in varying and not k.startswith("derived.")
        }
        params |= {
            f"sweep.{k}": json.dumps(v)
            for k, v in study.sweep.settings.model_dump(by_alias=True).items()
            if v
        }
        tags = facts["tags"] | {
            "sweep.trials": len(study.candidates),
            "sweep.steps_asked": self.books.plan.steps_asked,
            "sweep.steps_in_tree": self.books.plan.steps_in_tree,
        }
        run = {
            "name": study.sweep.base.name,
            "key": self.key,
            **facts,
            "params": params,
            "tags": tags,
            "attempts": self.attempts,
        }
        write_atomically(self.folder / "sweep.yaml", study.sweep.to_yaml())
        write_atomically(self.folder / "run.json", json.dumps(run, indent=1))
        (self.folder / "summary.json").unlink(missing_ok=True)
        self._draw_plan()
        for candidate in study.candidates.values():
            if not (
                self.folder / "trials" / candidate.name / "summary.json"
            ).exists() or self._is_pending(candidate):
                self._assemble(candidate)

    def _is_pending(self, c: Candidate) -> bool:
        return self.books.progress.trial(c.name) not in STATUS

    def _draw_plan(self) -> None:
        plan = self.books.plan
        if plan.stages:  # else a sampler has not asked for any yet
            write_atomically(
                self.folder / "plan.txt",
                "\n".join([*tree_view.summary(plan), "", tree_view.text(plan), ""]),
            )
            self._figure("tree", sweep_figures.tree(plan))

    def stage_ended(self, stage: Stage) -> None:
        """Trials that are over get their folders; of a stage that few share, the others too, for their curves to be seen."""
        for name in stage.trials:
            c = self.study.candidates.get(name)
            if c and (len(stage.trials) <= FEW or not self._is_pending(c)):
                self._assemble(c)
        step = (journal.last(RunFolder(self.folder)) or {"step": 0})["step"] + 1
        best = self.study.best()
        plan = self.books.plan
        journal.Journal(RunFolder(self.folder)).append(
            step,
            {
                "sweep/steps_run": self.books.steps_run,
                "sweep/steps_saved": plan.steps_asked - plan.steps_to_run,
                "sweep/trials_done": sum(
                    self.books.progress.trial(name) == DONE for name in self.study.candidates
                ),
                **({f"sweep/best_{self.study.metric.rpartition('/')[2]}": best[1]} if best else {}),
            },
        )

    def finish(
        self, end: tuple[str, int], wall_s: float, in_a_hurry: bool = False
    ) -> dict[str, Any]:
        """The comparison of what there is, whatever ended the sweep.

        Args:
            end: MLflow's status and the driver's exit status, which says more.
            in_a_hurry: what has to be, and no figures.
        """
        study, rows = self.study, self.study.rows()
        for candidate in study.candidates.values():
            if (
                not (self.folder / "trials" / candidate.name / "summary.json").exists()
                and not in_a_hurry
            ):
                self._assemble(candidate)
        self.summary = self._summary(end, rows, wall_s)
        write_atomically(self.folder / "summary.json", json.dumps(self.summary, indent=1))
        write_atomically(self.folder / "comparison.csv", comparison.csv_text(rows))
        if in_a_hurry:
            return self.summary
        self._draw_plan()
        done = {row["trial"] for row in rows if row["final"] is not None}
        histories = {name: study.records(c) for name, c in study.candidates.items() if name in done}
        if done:
            self._figure("final_losses", sweep_figures.final_losses(rows))
            self._figure("curves", sweep_figures.curves(rows, histories))
            self._figure("parallel_coordinates", sweep_figures.parallel_coordinates(rows))
        return self.summary

    def _summary(
        self, end: tuple[str, int], rows: list[dict[str, Any]], wall_s: float
    ) -> dict[str, Any]:
        study, plan, best = self.study, self.books.plan, self.study.winner(rows)
        probes = [
            self.books.progress.trial(probe.name)
            for probe in {p.name: p for p in study.probes.values()}.values()
        ]
        states = [row["state"] for row in rows]
        summary = {
            "status": end[0],
            "exit_status": end[1],
            "trials": len(rows),
            **{state: states.count(state) for state in sorted(set(states))},
            **(
                {
                    "probes": len(probes),
                    "probes_failed": len([p for p in probes if p in (FAILED, BLOCKED)]),
                }
                if probes
                else {}
            ),
            "steps_asked": plan.steps_asked,
            "steps_in_tree": plan.steps_in_tree,
            "steps_run": self.books.steps_run,
            "stages_run": sum(self.books.progress.state[i] == DONE for i in plan.to_run),
            "metric": study.metric,
            "best_trial": best[0] if best else None,
            "best_value": best[1] if best else None,
            "best_checkpoint": None,
            "wall_s": round(wall_s, 1),
        }
        if self.estimate and self.books.steps_run == plan.steps_to_run:
            summary |= {
                "estimated": self.estimate,
                "measured": {
                    "time_s": summary["wall_s"],
                    "memory_gib": self._memory_gib(),
                    "disk_bytes": self.books.peak_bytes,
                },
            }
        if best:
            trial = (
                read_json(self.folder / "trials" / best[0] / "summary.json") or {}
            )  # none yet where it is in a hurry
            summary["best_checkpoint"] = trial.get("checkpoint")
        return summary

    def _memory_gib(self) -> float | None:
        """The most that a worker took in a stage of this sweep's plan."""
        lines = (
            line
            for i in self.books.plan.to_run
            for line in journal.read(RunFolder(self.books.stages / i))
        )
        return metrics.peak_memory_gib(lines)

    def show(self, url: str | None) -> None:
        """How the trials compare, where everything is, and what to type next."""
        rows, s = self.study.rows(), self.summary
        print("\n" + comparison.table(rows))
        shown = {
            k: number(v)
            for k, v in s.items()
            if v is not None and k not in ("wall_s", "metric", "estimated", "measured")
        }
        cost = (
            cost_lines.comparison_line(s["estimated"], s["measured"]) if "estimated" in s else None
        )
        places = {"folder": self.folder, "figures": self.folder / "figures", "MLflow": url}
        print(
            f"\n{self.folder.name}\n"
            + table({**shown, "wall time": duration(s["wall_s"]), "estimate": cost, **places})
        )
        if s["status"] not in ("FINISHED", "FAILED"):
            print(
                "\nnext: the same command again goes on with the stages that are not done",
                flush=True,
            )
        elif s["best_trial"]:
            best = self.folder / "trials" / s["best_trial"]
            print(
                f"\nnext:\n  pipelines/sample.py {best} --prompt '…'\n  pipelines/evaluate.py {best}\n"
                f"  pipelines/ui.py {self.folder.parent}\nmore values in the grid, and the same command, run only what is new",
                flush=True,
            )

    # ---- one trial ----
    def _assemble(self, c: Candidate) -> None:
        last = self.books.last_stage(c.name)
        if last is None and self.books.progress.trial(c.name) not in STATUS:
            return
        folder, state = self.folder / "trials" / c.name, self.books.progress.trial(c.name)
        known = read_json(folder / "run.json") or {}
        facts = self._facts(c)
        path = self.books.plan.path(c.name)
        tags = {
            "sweep.name": self.folder.name,
            "sweep.setting": c.spec.setting,
            "sweep.state": state,
            "sweep.stages": " > ".join(f"{s.id[:8]}[{s.start}:{s.stop}]" for s in path),
            "sweep.steps_shared": sum(s.steps for s in path if len(s.trials) > 1),
        }
        if reason := self.study.reason(c.name):
            tags["sweep.reason"] = reason
        key = hashlib.sha256(f"{self.key}/{c.name}".encode()).hexdigest()[:32]
        run = {
            "name": c.name,
            "key": key,
            "trial": c.trial.key(c.trial.steps),
            **facts,
            "tags": facts["tags"] | tags,
            "attempts": known.get("attempts")
            or [{"started": _now(), "layout": asdict(self.study.layout)}],
        }
        trials.assemble(
            folder, last, c, run, self._trial_summary(c, state) if state in STATUS else None
        )

    def _facts(self, c: Candidate) -> dict[str, Any]:
        if c.name not in self.facts:
            self.facts[c.name] = facts_of(c.experiment, c.dataset, SCRIPT)
        return self.facts[c.name]

    def _trial_summary(self, c: Candidate, state: str) -> dict[str, Any]:
        row = self.study.row(c)
        results = [self.books.stored.results.get(s.id, {}) for s in self.books.plan.path(c.name)]
        seconds = round(sum(r.get("seconds", 0) for r in results), 1)
        return trials.summary_of(
            STATUS[state],
            self.study.records(c),
            c,
            self.folder / "trials" / c.name,
            self.books.result(c.name),
            {"state": state, "reason": row["reason"], "wall_s": seconds},
        )

    def _figure(self, name: str, figure) -> None:
        (self.folder / "figures").mkdir(exist_ok=True)
        picture = io.BytesIO()
        figure.savefig(picture)
        write_atomically(self.folder / "figures" / f"{name}.png", picture.getvalue())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
