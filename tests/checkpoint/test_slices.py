"""Slices of tensors that several ranks write make the tensors again, bit for bit."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint import store, tensor_file
from orchestrator.checkpoint.format import FORMAT_IN_PARTS, part_name
from orchestrator.checkpoint.tensor_file import Slice, TensorFile, own_share
from orchestrator.checkpoint.tensor_read import assemble
from orchestrator.errors import UserError
from tests.helpers.checkpoints import commit
from tests.helpers.facts import FACTS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def files_of(tensors, ranks: int) -> list[bytes]:
    return [bytes(one_file(own_share(tensors, rank, ranks)).data) for rank in range(ranks)]


def one_file(content) -> TensorFile:
    return tensor_file.fill({}, {"": content})[""]


def read(files: list[bytes]) -> dict[str, torch.Tensor]:
    contents = ([torch.frombuffer(bytearray(file), dtype=torch.uint8)] for file in files)
    return assemble(Path("run"), contents, "cpu")


@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=5), st.integers(1, 9))
def test_shares_of_all_ranks_are_the_tensors(kinds, ranks):
    tensors = {
        f"t{i}": torch.randint(0, 200, shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    shares = [own_share(tensors, rank, ranks) for rank in range(ranks)]
    sizes = [sum(part.numbers.nbytes for part in share.values()) for share in shares]
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes) - min(sizes) <= 16
    found = read(files_of(tensors, ranks))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_slices_that_only_one_rank_holds_are_written_by_it():
    tensors = {"all": torch.arange(8.0)}
    held = [Slice(torch.tensor([1.0, 2.0]), 0, (5,)), Slice(torch.tensor([3.0, 4.0, 5.0]), 2, (5,))]
    shares = [own_share({**tensors, "own": held[rank]}, rank, 2) for rank in range(2)]
    assert [share["own"] is held[rank] for rank, share in enumerate(shares)] == [True, True]
    found = read([bytes(one_file(share).data) for share in shares])
    assert torch.equal(found["own"], torch.arange(1.0, 6.0))
    assert torch.equal(found["all"], tensors["all"])


@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 70), st.integers(0, 70))
def test_wanted_numbers_are_copied_from_files_in_pieces(ranks, step, start, stop):
    tensors = {"a": torch.arange(70.0).view(7, 10), "b": torch.tensor(3.0), "c": torch.ones(5)}
    tensors["none"] = torch.ones(0, 3)
    pieces = []
    for file in files_of(tensors, ranks):
        content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        header = 8 + int.from_bytes(file[:8], "little")
        pieces.append([content[:header], *content[header:].split(8 * step)])
    found = assemble(Path("run"), pieces, "cpu")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    found = assemble(Path("run"), pieces, "cpu", {"a": [range(start, stop)], "b": [range(1)]})
    assert list(found) == (["a", "b"] if start < stop else ["b"])
    assert found["b"].tolist() == [3.0]
    if start < stop:
        assert found["a"].tolist() == list(range(start, stop))
        with pytest.raises(UserError, match="run: a part of a is missing"):
            assemble(Path("run"), pieces, "cpu", {"a": [range(start, 71)]})


@given(st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_several_slices_of_a_tensor_in_one_file_make_it_again(borders):
    tensor = torch.arange(60.0).view(6, 10)
    cuts = [0, *sorted(borders), 60]
    files = []
    for rank in range(2):
        # Every second slice, and a tensor whose name could be that of a slice.
        content = {
            f"a/{start}": Slice(tensor.view(-1)[start:stop], start, (6, 10), "a")
            for start, stop in itertools.pairwise(cuts)
            if cuts.index(start) % 2 == rank
        }
        files.append(bytes(one_file({**content, f"b/{rank}": torch.ones(2)}).data))
    found = read(files)
    assert set(found) == {"a", "b/0", "b/1"}
    assert torch.equal(found["a"], tensor)
    contents = ([torch.frombuffer(bytearray(file), dtype=torch.uint8)] for file in files)
    ranges = [range(*sorted(borders[:2])), range(*sorted(borders[2:]))]
    wanted = assemble(Path("run"), contents, "cpu", {"a": ranges})
    numbers = [float(number) for part in ranges for number in part]
    assert (wanted["a"].tolist() if numbers else []) == numbers


def test_tensor_of_which_a_part_is_missing_is_refused():
    files = files_of({"a": torch.ones(3), "weight": torch.ones(50)}, 4)
    with pytest.raises(UserError, match="run: a part of weight is missing"):
        read(files[:3])


def commit_in_parts(directory: Path, tensors, ranks: int) -> Path:
    temporary = store.begin(directory, 1, 0)
    names = [part_name("model", rank, ranks) + ".safetensors" for rank in range(ranks)]
    entries = store.write(temporary, dict(zip(names, files_of(tensors, ranks), strict=True)))
    return store.finish(temporary, 1, entries, FACTS, FORMAT_IN_PARTS)


@pytest.mark.parametrize("ranks", [1, 3, 40])
def test_stored_weights_have_one_hash_in_both_formats(tmp_path, ranks):
    whole = commit(tmp_path / "whole", 1)
    tensors = store.load_tensors(whole, "model")
    parts = commit_in_parts(tmp_path / "parts", tensors, ranks)
    assert store.verify(parts)["format"] == 2
    assert store.stored_weights_sha256(parts) == store.stored_weights_sha256(whole)
    loaded = store.load_tensors(parts, "model")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
