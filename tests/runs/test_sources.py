"""Facts about the sources of a run, and removal of secrets from values and texts."""

import subprocess

import pytest

from orchestrator.redact import REDACTED, redact, redact_text
from orchestrator.runs.sources import UNKNOWN, source_facts, source_tags, sources_sha256


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with one source file, not under version control."""
    monkeypatch.delenv("ESPALIER_GIT_COMMIT", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gpt.py").write_text("x = 1\n")
    return tmp_path


def commit(folder):
    def git(*words):
        command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return git("rev-parse", "HEAD")


def test_checkout_has_its_commit_and_is_dirty_after_a_change(checkout):
    head = commit(checkout)
    assert source_facts(checkout) == {
        "commit": head,
        "dirty": False,
        "sources_sha256": sources_sha256(checkout),
    }
    (checkout / "model" / "new.py").touch()
    assert source_facts(checkout)["dirty"] is True


def test_copy_without_a_repository_has_only_a_hash(checkout):
    facts = source_facts(checkout)
    assert (facts["commit"], facts["dirty"]) == (UNKNOWN, None)
    assert "source.dirty" not in source_tags(facts)
    before = facts["sources_sha256"]
    (checkout / "notes.py").write_text("elsewhere")
    assert sources_sha256(checkout) == before
    (checkout / "model" / "gpt.py").rename(checkout / "model" / "gqt.py")
    assert sources_sha256(checkout) != before


def test_commit_from_the_environment_takes_precedence(checkout, monkeypatch):
    commit(checkout)
    monkeypatch.setenv("ESPALIER_GIT_COMMIT", "abc")
    monkeypatch.setenv("ESPALIER_GIT_DIRTY", "1")
    tags = source_tags(source_facts(checkout), ray_job_id="7")
    assert tags["mlflow.source.git.commit"] == "abc"
    assert tags["source.dirty"] == "true"
    assert tags["mlflow.source.type"] == "JOB"
    assert tags["ray.job_id"] == "7"


def test_commit_of_a_repository_around_a_copy_is_not_used(checkout):
    copy = checkout / "elsewhere"
    copy.mkdir()
    commit(checkout)
    (copy / "model").mkdir()
    (copy / "model" / "gpt.py").touch()
    assert source_facts(copy)["commit"] == UNKNOWN


@pytest.mark.parametrize(
    "key", ["token", "api_key", "HF_TOKEN", "aws.secretAccessKey", "db-password", "mySecret"]
)
def test_values_of_keys_that_name_secrets_are_removed(key):
    assert redact({key: "s3cr3t"}) == {key: REDACTED}
    assert redact({"section": [{key: 5}]}) == {"section": [{key: REDACTED}]}


@pytest.mark.parametrize(
    "key", ["train.eval_tokens", "data.tokenizer", "derived.tokens_per_step", "monkey"]
)
def test_values_of_other_keys_stay(key):
    assert redact({key: "gpt2"}) == {key: "gpt2"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "https://me:pw@host/x#sha256=" + "a" * 64,
            f"https://{REDACTED}@host/x#sha256=" + "a" * 64,
        ),
        ("https://ghp_0123456789abcdefghij@github.com/a/b", f"https://{REDACTED}@github.com/a/b"),
        ("see hf_abcdefghijklmnopqrstuvwx.", f"see {REDACTED}."),
        ("AKIAABCDEFGHIJKLMNOP", REDACTED),
        ("https://host/x.txt?token=abc123&v=1#a", f"https://host/x.txt?token={REDACTED}&v=1#a"),
        ("s3://b/x?region=eu&token=abc123", f"s3://b/x?region=eu&token={REDACTED}"),
        ("Authorization: Bearer abcdef0123456789", f"Authorization: Bearer {REDACTED}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", REDACTED),
        ("api_key: 'very secret'\nmax_lr: 0.1", f"api_key: {REDACTED}\nmax_lr: 0.1"),
        (
            "tokenizer: gpt2\ntracking:\n  uri: sqlite:////a/b.db",
            "tokenizer: gpt2\ntracking:\n  uri: sqlite:////a/b.db",
        ),
    ],
)
def test_secrets_in_a_text_are_removed(text, shown):
    assert redact_text(text) == shown


def test_values_of_secret_environment_variables_are_removed(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("SHORT_KEY", "gpt2")
    assert redact({"data.corpus": "/x/correct horse/y", "data.tokenizer": "gpt2"}) == {
        "data.corpus": f"/x/{REDACTED}/y",
        "data.tokenizer": "gpt2",
    }
