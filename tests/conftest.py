"""Fixtures of all tests: a Ray head for the whole session, a small corpus, an empty run folder.

The Ray head is started as the head of a cluster is, with token authentication.
"""

import atexit
import functools
import os
import random
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
os.environ["RAY_AUTH_MODE"] = "token"  # Ray reads these when it is imported
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# As cluster/layout.py sets it for workers: threads that spin take the CPU from each other.
os.environ["GOMP_SPINCOUNT"] = "1000"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("ESPALIER_STORAGE", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

# The hashes of the tests' files go to a folder of this session; timings of steps stay.
_caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier"
_timings = _caches / "calibration"
_timings.mkdir(parents=True, exist_ok=True)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="espalier-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
Path(os.environ["XDG_CACHE_HOME"], "espalier").mkdir()
Path(os.environ["XDG_CACHE_HOME"], "espalier", "calibration").symlink_to(_timings)
# Tests send Ctrl-C to their processes, which would inherit that a background shell ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings  # noqa: E402

from tests.helpers import cluster  # noqa: E402 - after what Ray reads

pytest_plugins = ["tests.helpers.fixtures", "tests.helpers.bucket"]

# `make test` tries few examples of each property, `make test-slow` many. No deadline: the machines
# are shared, and a test must not fail because of a slow moment.
settings.register_profile("few", max_examples=20, deadline=None)
settings.register_profile("many", max_examples=500, deadline=None)
settings.load_profile("few")


# The files without a cluster that take longest, the first one most.
LONGEST = (
    "sweep/test_exact.py",
    "track/test_faults.py",
    "security/test_small_run.py",
    "mirror/test_runs.py",
    "workers/test_fitting.py",
    "track/test_kills.py",
    "track/test_sweep.py",
    "faults/test_faults.py",
    "jobs/test_damaged_files.py",
)


@functools.cache
def is_on_cluster(file: str) -> bool:
    """Return whether a file, such as tests/sweep/test_tune.py, uses the cluster of `ray_head`."""
    text = (REPO / file).read_text("utf-8")
    return "ray_head" in text or "ray_cluster" in text


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Give each process whole files, and all files on the cluster to one: it starts one head."""
    from xdist.scheduler import LoadFileScheduling

    class OneHead(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "cluster" if is_on_cluster(file) else file

    return OneHead(config, log)


def pytest_collection_modifyitems(items):
    """Run the files on the cluster first, then the longest ones.

    Two processes that share the tests then end at about the same time.
    """
    rank = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    assert all((REPO / file).is_file() for file in rank), "a file of LONGEST was renamed"

    def place(item):
        file = item.path.relative_to(REPO).as_posix()
        return not is_on_cluster(file), rank.get(file, len(rank))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def short_samples():
    """Let runs in this process write samples of a few tokens: they took a fifth of small runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.train.evaluate.SAMPLE_TOKENS", 4)
        yield


@pytest.fixture
def folder(tmp_path):
    """An empty folder of a run."""
    from orchestrator.runs.folder import RunFolder

    return RunFolder(tmp_path)


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory):
    """A Ray head with four logical CPUs and token authentication.

    `.env` is the environment of a client; `.dashboard` is the address of the dashboard.
    """
    with cluster.head(tmp_path_factory.mktemp("head"), cpus=4) as head:
        yield head


@pytest.fixture(scope="session")
def ray_cluster(ray_head):
    """Ray, with this process connected to `ray_head`."""
    import ray

    ray.init(address=ray_head.env["RAY_ADDRESS"], log_to_driver=False, logging_level="WARNING")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """60 kB of sentences from a small grammar: a small model can learn something from them."""
    draw = random.Random(0)
    words = ["the cat", "a dog", "one bird", "sees", "hears", "follows", "the moon", "a river"]
    words += ["no one", "and", "or", "but"]
    text = " ".join(draw.choice(words) + draw.choice(["", "", "", ",", ".\n"]) for _ in range(8000))
    file = tmp_path_factory.mktemp("corpus") / "tiny.txt"
    file.write_text(text, "utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_dataset(tiny_corpus, tmp_path_factory) -> Path:
    """`tiny_corpus` with the character tokenizer, prepared without Ray: the bytes are the same."""
    from orchestrator.config.experiment import load_experiment
    from orchestrator.data.prepare import prepare
    from tests.helpers.here import here

    directory = tmp_path_factory.mktemp("tokens") / "tiny"
    experiment = load_experiment(None, [f"data.corpus={tiny_corpus}", "data.tokenizer=char"])
    with here():
        prepare(experiment.data, directory)
    return directory


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """tinyshakespeare.txt; the test is skipped on a machine without it."""
    folder = os.environ.get("ESPALIER_TEST_DATA")
    if not folder or not (Path(folder) / "tinyshakespeare.txt").is_file():
        pytest.skip("no tinyshakespeare.txt in the folder ESPALIER_TEST_DATA")
    return Path(folder) / "tinyshakespeare.txt"


@pytest.fixture(scope="session")
def gpt2_ranks() -> str:
    """Folder of tiktoken's cache with the GPT-2 tokenizer; without it the test is skipped."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: the tokenizer would be downloaded")
    return folder
