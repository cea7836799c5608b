"""The part of a journal line that is equal in equal runs."""

from collections.abc import Mapping
from typing import Any

from orchestrator.runs import metrics


def exact_part(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step and the exact metrics of a journal line."""
    return {k: value for k, value in line.items() if k == "step" or metrics.of(k).exact}
