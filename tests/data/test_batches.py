"""Windows: a permutation that never changes, every target evaluated once, and reading that equals one flat array."""

import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import batches as module
from orchestrator.data import dataset as dataset_module
from orchestrator.data import shards
from orchestrator.data.batches import Batches, EvalBatches, Prefetcher, TokenStream
from orchestrator.data.dataset import load_manifest, write_manifest
from orchestrator.data.order import permute, sample_offsets, windows_per_epoch
from orchestrator.errors import UserError
from orchestrator.files import file_sha256

REPO = Path(__file__).resolve().parent.parent.parent
GOLDEN = [197206, 74326, 276054, 105243, 95003, 136173]
GOLDEN_PERMUTATION = [6, 5, 3, 7, 9, 1, 4, 0, 2, 8]


class Flat:
    """A stream whose token i is i."""

    directory, split = "here", "val"

    def __init__(self, tokens: int):
        self.tokens, self.array = tokens, np.arange(tokens, dtype=np.uint32)

    def read(self, offset: int, length: int) -> np.ndarray:
        assert 0 <= offset <= offset + length <= self.tokens
        return self.array[offset : offset + length]


# ---- the order ----
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 100, 1023, 1025, 5000])
def test_permutations_are_permutations_and_differ(n):
    found = [permute(np.arange(n), n, key) for key in range(20)]
    assert all((np.sort(p) == np.arange(n)).all() for p in found)
    if n >= 15:
        assert len({p.tobytes() for p in found}) == 20


def test_permutations_look_random():
    """Means over 400 keys of a permutation of 500: each index is everywhere, and neighbours part."""
    found = np.stack([permute(np.arange(500), 500, key) for key in range(400)])
    assert np.abs(found.mean(axis=0) - 249.5).max() < 5 * 144.3 / 20  # five standard errors
    assert abs(np.abs(np.diff(found, axis=1)).mean() - 501 / 3) < 2
    assert 0.5 < (found == np.arange(500)).sum(axis=1).mean() < 1.5  # fixed points: one, on average


@settings(deadline=None, max_examples=60)
@given(
    block=st.integers(1, 40),
    n=st.integers(2, 900),
    seed=st.integers(0, 2**53),
    epoch=st.integers(0, 5),
)
def test_an_epoch_visits_every_window_once_and_stays_inside(block, n, seed, epoch):
    if n < 2 * block:
        with pytest.raises(UserError, match=f"at least {2 * block} tokens"):
            sample_offsets(np.arange(1), n, block, seed)
        return
    windows = (n - block) // block
    offsets = sample_offsets(np.arange(epoch * windows, (epoch + 1) * windows), n, block, seed)
    phase = offsets.min()
    assert phase < block
    assert sorted(offsets) == [phase + block * i for i in range(windows)]
    assert offsets.max() + block + 1 <= n


def test_epochs_and_seeds_differ_in_phase_and_order():
    windows = windows_per_epoch(64_000, 64)
    epochs = [
        sample_offsets(np.arange(e * windows, (e + 1) * windows), 64_000, 64, 1) for e in range(8)
    ]
    assert len({int(o.min()) for o in epochs}) > 5
    assert len({tuple((o // 64)[:10]) for o in epochs}) == 8
    assert (
        sample_offsets(np.arange(50), 64_000, 64, 1) != sample_offsets(np.arange(50), 64_000, 64, 2)
    ).any()


def test_the_order_is_a_format():
    """Runs are resumed by it: a change here is a change of every run."""
    assert (
        sample_offsets(np.array([0, 1, 292, 293, 294, 10**6]), 301_966, 1024, 1337).tolist()
        == GOLDEN
    )
    assert permute(np.arange(10), 10, 7).tolist() == GOLDEN_PERMUTATION


def test_a_position_alone_is_what_it_is_among_others():
    positions = np.array([[5, 700], [123_456, 0]])
    together = sample_offsets(positions, 10_007, 64, 9)
    assert together.tolist() == [
        [sample_offsets(p[None], 10_007, 64, 9).item() for p in row] for row in positions
    ]


# ---- training batches ----
def test_micro_batches_are_the_samples_of_the_step_in_order():
    batches = Batches(Flat(10_007), 64, 12, 4, 3)
    for step in (0, 1, 37, 400, 2):  # forwards and back: nothing is remembered but what is computed
        offsets = sample_offsets(np.arange(step * 12, step * 12 + 12), 10_007, 64, 3).tolist()
        assert batches.offsets(step).tolist() == offsets
        for m in range(3):
            inputs, targets = batches.micro_batch(step, m)
            assert inputs.dtype == targets.dtype == np.int64
            assert inputs.flags.c_contiguous
            assert targets.flags.c_contiguous
            assert inputs[:, 0].tolist() == offsets[4 * m : 4 * m + 4]
            assert (inputs == inputs[:, :1] + np.arange(64)).all()
            assert (targets == inputs + 1).all()


@pytest.mark.parametrize("ahead", [1, 7, 4096])
def test_offsets_do_not_depend_on_how_far_ahead_they_are_computed(monkeypatch, ahead):
    monkeypatch.setattr(module, "AHEAD", ahead)
    batches = Batches(Flat(5_000), 32, 10, 2, 11)
    expected = sample_offsets(np.arange(2_000), 5_000, 32, 11).reshape(200, 10)
    assert (np.stack([batches.offsets(s) for s in range(200)]) == expected).all()


def test_epochs_count_windows():
    batches = Batches(Flat(1_000), 10, 33, 33, 0)
    assert (batches.windows_per_epoch, batches.epoch(0), batches.epoch(3)) == (99, 0.0, 1.0)


# ---- evaluation ----
@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(2, 300),
    block=st.integers(1, 40),
    rows=st.integers(1, 7),
    limit=st.none() | st.integers(2, 400),
)
def test_every_target_is_evaluated_once(n, block, rows, limit):
    batches = EvalBatches(Flat(n), block, rows, limit)
    found = [batches[i] for i in range(len(batches))]
    assert {a.shape for triple in found for a in triple[:2]} == {(rows, block)}
    targets = np.concatenate([t[t >= 0] for _, t, _ in found])
    assert targets.tolist() == list(range(1, min(n, limit or n)))
    inputs = np.concatenate([x[t >= 0] for x, t, _ in found])
    assert (inputs == targets - 1).all()
    ids = np.concatenate([ids for _, _, ids in found])
    real = np.concatenate([(t >= 0).any(axis=1) for _, t, _ in found])
    assert (real == (ids >= 0)).all()
    assert ids[real].tolist() == list(range(real.sum()))
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_evaluation_needs_a_target(tokens):
    with pytest.raises(UserError, match="val has"):
        EvalBatches(Flat(tokens), 8, 2)


# ---- shards ----
@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Five shards of three row groups, 14,500 tokens: `write(ids)` makes it, returns the folder."""
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 1)

    def write(ids: np.ndarray) -> Path:
        entries = []
        for number, first in enumerate(range(0, len(ids), 3 * 1024)):
            part = ids[first : first + 3 * 1024]
            padded = np.concatenate([part, np.zeros(-len(part) % 1024, ids.dtype)])
            path = tmp_path / f"train-{number:05d}.parquet"
            rows = shards.write_shard(path, ids.dtype, np.split(padded, len(padded) // 1024))
            entries.append(
                {"name": path.name, "rows": rows, "tokens": len(part), "sha256": file_sha256(path)}
            )
        split = {
            "tokens": len(ids),
            "documents": 1,
            "bytes": len(ids),
            "stream_sha256": "",
            "shards": entries,
        }
        write_manifest(
            tmp_path,
            {
                "dtype": ids.dtype.name,
                "settings": {},
                "sources": [],
                "splits": {"train": split},
                "tokenizer": {"name": "byte", "n_vocab": 257},
            },
        )
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_reading_shards_is_reading_one_array(dataset, dtype):
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 14_500, dtype=dtype)
    stream = TokenStream(dataset(ids), "train")
    assert stream.tokens == 14_500
    edges = [0, 1, 1023, 1024, 1025, 3071, 3072, 3073, 9216, 14_336, 14_499, 14_500]
    for a in edges:
        for b in edges:
            if a <= b:
                assert stream.read(a, b - a).tobytes() == ids[a:b].tobytes(), (a, b)
    for a, length in ((14_499, 2), (-1, 2), (14_501, 0)):
        with pytest.raises(IndexError):
            stream.read(a, length)


def test_a_shard_is_ordinary_parquet(dataset):
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = np.arange(14_500, dtype=np.uint16)
    table = pq.read_table(dataset(ids) / "train-00000.parquet")
    assert table.schema.field("tokens").type == pa.binary(2048)
    assert not table.schema.field("tokens").nullable
    assert b"".join(table["tokens"].to_pylist()) == ids[:3072].tobytes()


def test_a_row_group_of_full_size_is_one_page(tmp_path):
    """Beyond 20,000 rows or 1 MiB, pyarrow's defaults would make several."""
    ids = np.arange(21_000 * 1024, dtype=np.uint32).astype(np.uint16)
    shards.write_shard(tmp_path / "s.parquet", ids.dtype, [ids])
    [piece] = shards.map_shard(tmp_path / "s.parquet")
    assert (piece == ids).all()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"data_page_size": 4096},
        {"write_statistics": True, "compression": "zstd"},
        {"max_rows_per_page": 1},
    ],
)
def test_a_shard_that_was_written_otherwise_is_refused_and_not_guessed_at(dataset, options):
    import pyarrow.parquet as pq

    path = dataset(np.arange(3072, dtype=np.uint16)) / "train-00000.parquet"
    rewritten = {
        "compression": "none",
        "use_dictionary": False,
        "write_statistics": False,
        **options,
    }
    pq.write_table(pq.read_table(path), path, write_batch_size=1, **rewritten)
    with pytest.raises(UserError, match="prepare the tokens again"):
        shards.map_shard(path)


def test_one_changed_bit_names_its_shard_and_is_found_once_verified(dataset):
    folder = dataset(np.arange(14_500, dtype=np.uint16))
    TokenStream(folder, "train")
    path = folder / "train-00003.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # a failure leaves no stamp
        with pytest.raises(UserError, match=r"train-00003\.parquet.*SHA-256"):
            TokenStream(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00003\.parquet.*missing"):
        TokenStream(folder, "train")


def test_a_shard_is_verified_once_per_node(dataset, monkeypatch):
    folder = dataset(np.arange(14_500, dtype=np.uint16))
    TokenStream(folder, "train")
    monkeypatch.setattr(dataset_module, "file_sha256", lambda *_: pytest.fail("hashed again"))
    TokenStream(folder, "train")


@pytest.mark.parametrize(
    "planted", ["by another user", "writable for all", "a link", "a dangling link"]
)
def test_stamps_of_others_vouch_for_nothing(dataset, tmp_path, monkeypatch, planted):
    folder, mine = (
        dataset(np.arange(2000, dtype=np.uint16)),
        tmp_path / "tmp" / f"espalier-verified-{os.getuid()}",
    )
    mine.parent.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(mine.parent))
    if planted.endswith("link"):
        mine.symlink_to(tmp_path / "nowhere" if planted == "a dangling link" else tmp_path)
    else:
        TokenStream(folder, "train")  # which makes it
        mine.chmod(0o777 if planted == "writable for all" else 0o700)
    if planted == "by another user":
        if os.getuid():
            pytest.skip("needs root to give a folder away")
        os.chown(mine, 12345, 12345)
    with pytest.raises(UserError, match=f"{mine}: not a folder of yours alone .* set TMPDIR"):
        TokenStream(folder, "train")


def test_what_is_no_dataset_is_explained(tmp_path, dataset):
    with pytest.raises(UserError, match=r"prepare\.py"):
        TokenStream(tmp_path, "train")
    folder = dataset(np.arange(2000, dtype=np.uint16))
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


def test_trainers_read_without_ray_pydantic_or_tiktoken():
    code = (
        "import sys\nfor name in ('ray', 'pydantic', 'tiktoken', 'torch', 'mlflow'): sys.modules[name] = None\n"
        "import orchestrator.data.batches, orchestrator.data.dataset"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


# ---- reading ahead ----
def test_a_prefetcher_is_map():
    with Prefetcher(lambda i: i * i, range(100), depth=3) as squares:
        assert list(squares) == [i * i for i in range(100)]
        assert list(squares) == []


@pytest.mark.parametrize("where", ["fetch", "items"])
def test_an_exception_comes_where_the_result_would_have(where):
    def items():
        yield from range(3)
        raise KeyError("three")

    def fetch(i):
        if where == "fetch" and i == 3:
            raise KeyError("three")
        return i

    prefetcher, seen = Prefetcher(fetch, range(9) if where == "fetch" else items()), []
    with pytest.raises(KeyError, match="three"):
        seen.extend(prefetcher)
    assert seen == [0, 1, 2]
    assert list(prefetcher) == []


def test_it_keeps_depth_results_ready_and_no_more():
    fetched = []
    with Prefetcher(lambda i: fetched.append(i), range(1000), depth=2) as prefetcher:
        next(prefetcher)
        time.sleep(0.3)
        assert 3 <= len(fetched) <= 4  # one taken, two ready, one in the thread's hand


@pytest.mark.parametrize("end", ["close", "abandon", "exhaust"])
def test_the_thread_ends(end):
    prefetcher = Prefetcher(lambda i: i, range(3 if end == "exhaust" else 10**9))
    [thread] = [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    next(iter(prefetcher))
    started = time.monotonic()
    if end == "close":
        prefetcher.close()
        prefetcher.close()
    elif end == "exhaust":
        list(prefetcher)
    else:
        del prefetcher
        gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert time.monotonic() - started < 3
    assert thread not in threading.enumerate()
