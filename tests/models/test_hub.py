"""Models by their names on the hub: a folder laid out as its cache, and no network."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from elastictok.models import ModelFileError, load, load_shapes, push, save


class LocalHub:
    """The calls of `HfApi` that `push` makes, on the cache that `load` reads."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.made: dict[str, bool] = {}
        self.commits = 0

    def folder(self, repository: str) -> Path:
        return self.cache / ("models--" + repository.replace("/", "--"))

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made.setdefault(repo_id, private)

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return (self.snapshot(repo_id, revision) / filename).exists()

    def snapshot(self, repository: str, revision: str | None) -> Path:
        reference = self.folder(repository) / "refs" / (revision or "main")
        commit = reference.read_text() if reference.exists() else "0" * 40
        return self.folder(repository) / "snapshots" / commit

    def upload_folder(
        self, *, repo_id, folder_path, revision, commit_message, ignore_patterns, delete_patterns
    ):
        self.commits += 1
        commit = f"{self.commits:040x}"
        files = {
            path.name: path
            for path in self.snapshot(repo_id, revision).glob("*")
            if not any(path.match(pattern) for pattern in delete_patterns)
        }
        files |= {
            path.name: path
            for path in Path(folder_path).iterdir()
            if path.name not in (ignore_patterns or [])
        }
        new = self.folder(repo_id) / "snapshots" / commit
        new.mkdir(parents=True)
        for name, path in files.items():
            # As in the cache: blobs, and links to them in a folder per commit.
            blob = self.folder(repo_id) / "blobs" / f"{commit}-{name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(path, blob)
            (new / name).symlink_to(blob)
        reference = self.folder(repo_id) / "refs" / (revision or "main")
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
        return SimpleNamespace(commit_url=f"{repo_id}/commit/{commit}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> LocalHub:
    found = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return found


def test_what_is_pushed_is_loaded(hub, make_tiny):
    model = make_tiny()
    address = push(model, "hf:someone/tiny", private=True)
    assert hub.made == {"someone/tiny": True}
    assert address.startswith("someone/tiny/commit/")
    assert eqx.tree_equal(load("hf:someone/tiny"), model)
    assert eqx.tree_equal(load(Path("hf:someone/tiny")), model)
    assert load_shapes("hf:someone/tiny").context == model.context


def test_a_push_replaces_the_weights_and_keeps_the_card_that_is_there(hub, make_tiny):
    push(make_tiny(), "hf:someone/tiny")
    card = hub.snapshot("someone/tiny", None) / "README.md"
    assert "library_name: elastictok" in card.read_text()
    card.unlink()
    card.write_text("# Edited on the hub")
    other = make_tiny(dim=32)
    push(other, "hf:someone/tiny")
    snapshot = hub.snapshot("someone/tiny", None)
    assert (snapshot / "README.md").read_text() == "# Edited on the hub"
    assert sorted(p.name for p in snapshot.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert eqx.tree_equal(load("hf:someone/tiny"), other)


def test_branches_and_commits_are_named_after_an_at_sign(hub, make_tiny):
    first, second = make_tiny(), make_tiny(dim=32)
    push(first, "hf:someone/tiny")
    commit = hub.snapshot("someone/tiny", None).name
    push(second, "hf:someone/tiny@wide")
    assert eqx.tree_equal(load("hf:someone/tiny"), first)
    assert eqx.tree_equal(load("hf:someone/tiny@wide"), second)
    assert eqx.tree_equal(load(f"hf:someone/tiny@{commit}"), first)


def test_a_cache_in_several_files_is_loaded_by_a_program_without_network(
    hub, make_tiny, tmp_path, monkeypatch
):
    """The real environment variables, in a process of its own."""
    push(make_tiny(), "hf:someone/tiny")
    snapshot = hub.snapshot("someone/tiny", None)
    save(make_tiny(), tmp_path / "parts", shard_bytes=4000)
    for path in snapshot.iterdir():
        path.unlink()
    for path in (tmp_path / "parts").iterdir():
        (snapshot / path.name).symlink_to(path)
    program = "from elastictok.models import load; print(load('hf:someone/tiny').max_tokens)"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout == "16\n", result.stderr


def test_offline_without_a_copy_says_what_to_do(hub):
    with pytest.raises(ModelFileError, match="hf download someone/absent") as caught:
        load("hf:someone/absent")
    assert str(hub.cache) in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_what_the_hub_refuses_is_named(hub, monkeypatch):
    class Missing(RepositoryNotFoundError):
        def __init__(self):  # the real one wants an answer from the network
            pass

    for error, message in (
        (Missing(), "there is no such repository"),
        (LocalEntryNotFoundError("no"), "is not in the cache"),
        (OSError("disk full"), "could not be fetched: disk full"),
    ):

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ModelFileError, match=message):
            load("hf:someone/tiny")


def test_a_damaged_copy_is_refused(hub, make_tiny):
    push(make_tiny(), "hf:someone/tiny")
    weights = (hub.snapshot("someone/tiny", None) / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelFileError, match="sha256"):
        load("hf:someone/tiny")


@pytest.mark.parametrize(
    "name", ["hf:", "hf:tiny", "hf:a/b/c", "hf:someone/tiny@", "hf:../../etc", "hf:a b/c"]
)
def test_names_that_are_none_are_refused(hub, make_tiny, name):
    for call in (load, lambda name: push(make_tiny(), name)):
        with pytest.raises(ValueError, match="write hf:owner/name"):
            call(name)


def test_saving_to_a_name_says_how_to_push(make_tiny):
    with pytest.raises(ValueError, match=r"push\(model, \.\.\.\)"):
        save(make_tiny(), "hf:someone/tiny")


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelFileError, match=r'pip install "elastictok\[hub\]"'):
        load("hf:someone/tiny")
