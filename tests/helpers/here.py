"""Preparing tokens without Ray: its jobs run in this process, in random order."""

import contextlib
import json
import random
from collections.abc import Iterator

import pytest

from orchestrator.data import prepare as tokens
from orchestrator.errors import UserError


@contextlib.contextmanager
def here() -> Iterator[None]:
    def run_shuffled(function, items, common=None):
        for item in random.sample(items, len(items)):
            result = json.loads(
                tokens._run(function, common or {}, None, {"item": json.dumps(item)})["result"]
            )
            if "error" in result:
                raise UserError(result["error"])
            yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_map", run_shuffled)
        patch.setattr(tokens, "_cpus", lambda: 1)
        patch.setattr(tokens, "_ray", contextlib.nullcontext)
        yield
