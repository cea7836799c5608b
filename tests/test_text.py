"""Numbers, durations and tables as people read them."""

import pytest

from orchestrator.text import duration, number, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (0.6, "1s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (61, "1m01s"),
        (250, "4m10s"),
        (3599, "59m59s"),
        (3599.6, "1h00m"),
        (3600, "1h00m"),
        (11100, "3h05m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (187200, "2d04h"),
        (10**9, "11574d01h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0, "0"),
        (1.5, "1.5000"),
        (1234567.891, "1,234,568"),
        ("FINISHED", "FINISHED"),
        (True, "True"),
        (None, "None"),
        ([1, "a"], '[1, "a"]'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_table_is_aligned_and_leaves_out_what_is_none():
    assert table({"a": 1, "long name": "x", "gone": None}) == "  a          1\n  long name  x"
    assert table({}) == table({"gone": None}) == ""
