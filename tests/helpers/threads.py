"""The number of torch's threads in a test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: small matrices are slower on two. The number is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
