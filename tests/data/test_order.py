"""The order of samples: permutations that never change, and windows that cover each epoch once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.order import check_tokens, permute, sample_offsets, windows_per_epoch
from orchestrator.errors import UserError


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 100, 1023, 1025, 5000])
def test_permutations_are_permutations_and_differ(n):
    found = [permute(np.arange(n), n, key) for key in range(20)]
    assert all((np.sort(p) == np.arange(n)).all() for p in found)
    if n >= 15:
        assert len({p.tobytes() for p in found}) == 20


def test_permutations_look_random():
    """Means over 400 keys of a permutation of 500 numbers."""
    found = np.stack([permute(np.arange(500), 500, key) for key in range(400)])
    # Each number is at each place: the mean is within five standard errors.
    assert np.abs(found.mean(axis=0) - 249.5).max() < 5 * 144.3 / 20
    # Neighbors are far apart, and on average one number stays in its place.
    assert abs(np.abs(np.diff(found, axis=1)).mean() - 501 / 3) < 2
    assert 0.5 < (found == np.arange(500)).sum(axis=1).mean() < 1.5


@given(
    block=st.integers(1, 40),
    n=st.integers(2, 900),
    seed=st.integers(0, 2**53),
    epoch=st.integers(0, 5),
)
def test_epoch_visits_every_window_once_inside_of_the_split(block, n, seed, epoch):
    if n < 2 * block:
        with pytest.raises(UserError, match=f"at least {2 * block} tokens"):
            windows_per_epoch(n, block)
        return
    windows = (n - block) // block
    positions = np.arange(epoch * windows, (epoch + 1) * windows)
    offsets = sample_offsets(positions, n, block, seed)
    phase = offsets.min()
    assert phase < block
    assert sorted(offsets) == [phase + block * i for i in range(windows)]
    assert offsets.max() + block + 1 <= n


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [(15, 1, "16 tokens of train"), (16, 1, "val has 1 token"), (16, 0, "val has 0 token")],
)
def test_split_that_is_too_small_is_named(train, val, says):
    with pytest.raises(UserError, match=says):
        check_tokens(train, val, block_size=8)


def test_epochs_and_seeds_differ_in_phase_and_order():
    windows = windows_per_epoch(64_000, 64)
    epochs = sample_offsets(np.arange(8 * windows), 64_000, 64, 1).reshape(8, windows)
    assert len({int(offsets.min()) for offsets in epochs}) > 5
    assert len({tuple((offsets // 64)[:10]) for offsets in epochs}) == 8
    other_seed = sample_offsets(np.arange(windows), 64_000, 64, 2)
    assert (epochs[0] != other_seed).any()


def test_order_never_changes():
    """Another order would change the samples of every run that is resumed or replayed."""
    positions = np.array([0, 1, 292, 293, 294, 10**6])
    expected = [197206, 74326, 276054, 105243, 95003, 136173]
    assert sample_offsets(positions, 301_966, 1024, 1337).tolist() == expected
    assert permute(np.arange(10), 10, 7).tolist() == [6, 5, 3, 7, 9, 1, 4, 0, 2, 8]


def test_offset_of_a_position_does_not_depend_on_the_others():
    positions = np.array([[5, 700], [123_456, 0]])
    together = sample_offsets(positions, 10_007, 64, 9)
    for place, offset in np.ndenumerate(together):
        assert sample_offsets(positions[place][None], 10_007, 64, 9) == offset
