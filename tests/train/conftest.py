"""Fixtures of tests of training."""

from tests.helpers.threads import one_thread  # noqa: F401 - used by all tests here
