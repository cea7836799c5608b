"""Facts about the sources of a run, and removal of secrets from values and texts."""

import subprocess

import pytest

from orchestrator.code_hashes import sources_sha256
from orchestrator.redact import REDACTED, has_password, hide_passwords, redact, redact_text
from orchestrator.runs.sources import UNKNOWN, source_facts, source_tags


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


def test_numbers_and_texts_of_fields_stay():
    fields = {
        "derived.flops_per_token": 12345678,
        "train.eval_tokens": "12345678",
        "data.tokenizer": "gpt2",
        "key": [{"token": 5}],
        "name": "sk-learn-comparison-of-things",
    }
    assert redact(fields) == fields


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
        ("https://host/x?sv=2&sig=abc&se=3", f"https://host/x?sv=2&sig={REDACTED}&se=3"),
        ("https://host/x?X-Amz-Signature=abc", f"https://host/x?X-Amz-Signature={REDACTED}"),
        ("Authorization: Bearer abcdef0123456789", f"Authorization: Bearer {REDACTED}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", REDACTED),
        ("api_key: 'very secret'\nmax_lr: 0.1", f"api_key: {REDACTED}\nmax_lr: 0.1"),
        ("https://me:p@ss@host/x", f"https://{REDACTED}@host/x"),
        ("sorted(names, key=len)", "sorted(names, key=len)"),
        ("flops_per_token=512, password=512", "flops_per_token=512, password=512"),
        ("password=hunter2", f"password={REDACTED}"),
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


def test_current_directory_and_paths_that_exist_are_not_secrets(monkeypatch, tmp_path):
    place = tmp_path / "my-secret-place"
    place.mkdir()
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("OLDPWD", str(tmp_path))
    monkeypatch.setenv("CREDENTIALS", str(place))
    monkeypatch.setenv("SIZE_SECRET", "12345678")
    monkeypatch.setenv("PLACE_PASSWORD", "my-secret-place")
    shown = {"uri": f"sqlite:///{tmp_path}/t.db", "steps": "12345678"}
    assert redact(shown) == shown
    assert redact_text(str(place)) == str(place)
    assert redact_text("in my-secret-place") == f"in {REDACTED}"


@pytest.mark.parametrize(
    ("address", "is_secret"),
    [
        ("https://host/x.txt?v=1#sha256=ab", False),
        ("https://$USER:$TOKEN@host/x?token=${TOKEN}", False),
        (f"https://{REDACTED}@host/x?token={REDACTED}", False),  # of an earlier version
        ("https://me:pw@host/x", True),
        ("https://ghp_1@host/x", True),
        ("https://me:$TOKEN@host/x?api_key=abc", True),
        ("/a/path@home", False),
    ],
)
def test_password_in_an_address_is_found(address, is_secret):
    assert has_password(address) == is_secret
    assert hide_passwords(hide_passwords(address)) == hide_passwords(address)
