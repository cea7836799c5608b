"""Prepares a corpus with faults, and compares what was read with what was written."""

import json
import random
from pathlib import Path

from orchestrator.data.batches import TokenStream
from tests.faults.command import Command, Ended
from tests.faults.corpora import CORPORA, Corpus
from tests.faults.rank import RankStarter
from tests.faults.report import FaultRecord, Report

SECONDS = 20.0
PAIRS = 0.2
EOT = 256  # of the byte tokenizer


class CorpusCase:
    """One preparation in its own storage.

    Args:
        starter: Forks the command.
        path: Folder of the case.
        breaks: As for `CommandCase`.
    """

    def __init__(self, starter: RankStarter, path: Path, breaks: str | None = None) -> None:
        self.starter = starter
        self.path = path
        self.breaks = breaks
        self.report = Report(path.name)

    def run(self, rng: random.Random, only: tuple[str, ...]) -> Report:
        """Prepare a corpus of one kind; in a fifth of the cases, of two."""
        names = rng.sample(only, min(len(only), 2 if rng.random() < PAIRS else 1))
        try:
            parts = []
            for name in names:
                folder = self.path / f"files-{name}"
                folder.mkdir(parents=True)
                parts.append(CORPORA[name][1](folder, rng))
            self._check(parts, names, "as written")
            if any(part.then for part in parts):
                for part in parts:
                    part.documents = part.then() if part.then else part.documents
                self._check(parts, names, "changed after it was prepared")
        except Exception as error:
            self.report.problems.append(f"harness: {type(error).__name__}: {error}")
        for name in names:
            self.report.happened.append(FaultRecord(name, name, pair=len(names) > 1))
        return self.report

    def _check(self, parts: list[Corpus], names: list[str], when: str) -> None:
        """Prepare all parts as one corpus, and check the ending."""
        self.report.attempts += 1
        entries = [entry for part in parts for entry in part.entries]
        expected: list[str] | None = []
        for part in parts:
            # The first one that must be refused decides.
            expected = None if None in (expected, part.documents) else expected + part.documents
        storage = self.path / "runs"
        words = [
            f"storage={storage}",
            f"data.corpus={json.dumps(entries)}"
            if len(entries) > 1
            else f"data.corpus={entries[0]}",
            "data.tokenizer=byte",
            "data.append_eot=true",
            "data.split=tail",
            "data.val_fraction=0.25",
        ]
        before = set(storage.glob("data/*"))
        changes = [part.change for part in parts if part.change]
        facts = {"change": changes[0] if changes else None, "breaks": self.breaks}
        path = self.path / f"start-{self.report.attempts}"
        ended = Command(self.starter, "prepare", words, path, **facts).wait(SECONDS)
        where = f"{'+'.join(names)} {when}"
        if ended is None:
            self._problem("status", f"{where}: no end within {SECONDS:.0f} s")
        elif ended.status == 0:
            self._check_documents(expected, where, ended)
        else:
            may_refuse = expected is None or any(part.may_refuse for part in parts)
            self._check_refusal(may_refuse or when != "as written", where, ended)
            new = [p for p in storage.glob("data/*/manifest.json") if p.parent not in before]
            if new:
                self._problem("loss", f"{where}: refused, and a dataset was left")

    def _check_documents(self, expected: list[str] | None, where: str, ended: Ended) -> None:
        if expected is None:
            self._problem("silent", f"{where}: was prepared, and not refused")
            return
        rows = [line.split() for line in ended.out.splitlines()]
        directory = Path(next(row[-1] for row in rows if row[:1] == ["folder"]))
        ids: list[int] = []
        for split in ("train", "val"):
            stream = TokenStream(directory, split)
            ids += stream.read(0, stream.tokens).tolist()
        found: list[bytes] = []
        rest = bytearray()
        for id_ in ids:
            if id_ == EOT:
                found.append(bytes(rest))
                rest.clear()
            else:
                rest.append(id_)
        if found != [text.encode() for text in expected]:
            self._problem("silent", f"{where}: another text was prepared")

    def _check_refusal(self, is_right: bool, where: str, ended: Ended) -> None:
        text = ended.lines[-1][:200] if ended.lines else "no line"
        if ended.has_traceback:
            self._problem("traceback", f"{where}: {text}")
        elif ended.status != 2 or len(ended.lines) != 1:
            self._problem("status", f"{where}: {ended.status}, {len(ended.lines)} lines: {text}")
        elif not is_right:
            self._problem("manual", f"{where}: refused: {text}")

    def _problem(self, category: str, text: str) -> None:
        self.report.problems.append(f"{category}: {text}")
