"""Token shards: their layout, reading them as one stream, and finding a changed byte."""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import dataset as dataset_module
from orchestrator.data import shards
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import Shard, Split, load_manifest, write_manifest
from orchestrator.errors import UserError
from orchestrator.files import file_sha256


@pytest.fixture
def write_dataset(tmp_path, monkeypatch):
    """`write_dataset(ids)` writes shards of three row groups of one row; returns the folder."""
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 1)

    def write(ids: np.ndarray) -> Path:
        found = []
        for number, first in enumerate(range(0, len(ids), 3 * 1024)):
            part = ids[first : first + 3 * 1024]
            padded = np.concatenate([part, np.zeros(-len(part) % 1024, ids.dtype)])
            path = tmp_path / f"train-{number:05d}.parquet"
            rows = shards.write_shard(path, ids.dtype, np.split(padded, len(padded) // 1024))
            found.append(Shard(path.name, rows, len(part), file_sha256(path)))
        split = asdict(Split(len(ids), 1, len(ids), "", tuple(found)))
        content = {
            "dtype": ids.dtype.name,
            "settings": {},
            "sources": [],
            "splits": {"train": split},
            "tokenizer": {"name": "byte", "n_vocab": 257},
        }
        write_manifest(tmp_path, content)
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_read_as_one_stream(write_dataset, dtype):
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 14_500, dtype=dtype)
    stream = TokenStream(write_dataset(ids), "train")
    assert stream.tokens == 14_500
    edges = [0, 1, 1023, 1024, 1025, 3071, 3072, 3073, 9216, 14_336, 14_499, 14_500]
    for start in edges:
        for end in edges:
            if start <= end:
                assert stream.read(start, end - start).tobytes() == ids[start:end].tobytes()
    for start, length in ((14_499, 2), (-1, 2), (14_501, 0)):
        with pytest.raises(IndexError):
            stream.read(start, length)


def test_shard_is_ordinary_parquet(write_dataset):
    ids = np.arange(14_500, dtype=np.uint16)
    table = pq.read_table(write_dataset(ids) / "train-00000.parquet")
    assert table.schema.field("tokens").type == pa.binary(2048)
    assert not table.schema.field("tokens").nullable
    assert b"".join(table["tokens"].to_pylist()) == ids[:3072].tobytes()


def test_row_group_of_full_size_is_one_page(tmp_path):
    """pyarrow's defaults would make several pages of more than 20,000 rows or 1 MiB."""
    ids = np.arange(21_000 * 1024, dtype=np.uint32).astype(np.uint16)
    shards.write_shard(tmp_path / "s.parquet", ids.dtype, [ids])
    [row_group] = shards.map_shard(tmp_path / "s.parquet")
    assert (row_group == ids).all()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"data_page_size": 4096},
        {"write_statistics": True},
        {"max_rows_per_page": 1},
    ],
)
def test_another_layout_is_refused(tmp_path, options):
    ids = np.arange(30 * 1024, dtype=np.uint16)
    path = tmp_path / "s.parquet"
    shards.write_shard(path, ids.dtype, [ids])
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pq.read_table(path), path, write_batch_size=1, **{**plain, **options})
    with pytest.raises(UserError, match="prepare the tokens again"):
        shards.map_shard(path)


def test_changed_bit_names_its_shard(write_dataset):
    folder = write_dataset(np.arange(14_500, dtype=np.uint16))
    TokenStream(folder, "train")
    path = folder / "train-00003.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # the first failure leaves no stamp
        with pytest.raises(UserError, match=r"train-00003\.parquet.*SHA-256"):
            TokenStream(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00003\.parquet.*missing"):
        TokenStream(folder, "train")


def test_shard_is_verified_once_per_node(write_dataset, monkeypatch):
    folder = write_dataset(np.arange(14_500, dtype=np.uint16))
    TokenStream(folder, "train")
    monkeypatch.setattr(dataset_module, "file_sha256", lambda _: pytest.fail("hashed again"))
    TokenStream(folder, "train")


@pytest.mark.parametrize(
    "planted", ["by another user", "writable for all", "a link", "a dangling link"]
)
def test_stamps_count_only_in_a_folder_of_this_user(write_dataset, tmp_path, monkeypatch, planted):
    folder = write_dataset(np.arange(2000, dtype=np.uint16))
    stamps = tmp_path / "tmp" / f"espalier-verified-{os.getuid()}"
    stamps.parent.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(stamps.parent))
    if planted.endswith("link"):
        stamps.symlink_to(tmp_path / "nowhere" if planted == "a dangling link" else tmp_path)
    else:
        TokenStream(folder, "train")  # which creates it
        stamps.chmod(0o777 if planted == "writable for all" else 0o700)
    if planted == "by another user":
        if os.getuid() != 0:
            pytest.skip("needs root to give a folder away")
        os.chown(stamps, 12345, 12345)
    with pytest.raises(
        UserError, match=f"{stamps}: must be .* only you can write to .* set TMPDIR"
    ):
        TokenStream(folder, "train")


def test_folder_without_a_dataset_is_refused(tmp_path, write_dataset):
    with pytest.raises(UserError, match=r"prepare\.py"):
        TokenStream(tmp_path, "train")
    folder = write_dataset(np.arange(2000, dtype=np.uint16))
    with pytest.raises(UserError, match="no split 'test'"):
        TokenStream(folder, "test")
    for content, says in (
        ("{", "cannot be read"),
        ('{"format_version": 99}', "format 99"),
        ("[]", "cannot be read"),
    ):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=says):
            load_manifest(folder)
