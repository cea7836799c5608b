"""Figures: they show what the journal says, also where it says little."""

import io
import math
import subprocess
import sys

import pytest

from orchestrator.track.figures import loss_curve, points, schedule_curve

RECORDS = [
    {
        "step": s,
        "train/loss": 5 - s / 100,
        "optim/lr": 1e-3,
        **({"val/loss": 5 - s / 90} if s % 50 == 0 else {}),
    }
    for s in range(0, 201, 10)
]


def test_curves_hold_the_points():
    lines = loss_curve(RECORDS).axes[0].get_lines()
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == [
        points(RECORDS, "train/loss"),
        points(RECORDS, "val/loss"),
    ]
    assert list(schedule_curve([(1, 0.1), (2, 0.2)]).axes[0].get_lines()[0].get_ydata()) == [
        0.1,
        0.2,
    ]


def test_what_is_not_finite_is_left_out():
    assert points([{"step": 1, "a": math.nan}, {"step": 2, "a": 3.0}, {"step": 3}], "a") == [
        (2, 3.0)
    ]


@pytest.mark.parametrize("records", [[], RECORDS[:1], RECORDS])
def test_they_can_be_drawn(records):
    for figure in (loss_curve(records), schedule_curve(points(records, "optim/lr"))):
        png = io.BytesIO()
        figure.savefig(png)
        assert png.getvalue().startswith(b"\x89PNG")


def test_matplotlib_is_imported_when_it_is_needed():
    code = "import sys, orchestrator.track.mlflow; sys.exit(bool({'matplotlib', 'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
