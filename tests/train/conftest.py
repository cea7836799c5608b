"""Fixtures of tests of training."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices are slower on two threads; the number of threads is set back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
