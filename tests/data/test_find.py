"""Finding files: what counts, in which order, and what is said when nothing does."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictok.data import CLIPS, PICTURES, MediaError, find_media

PICTURE_NAMES = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp"]
CLIP_NAMES = ["f.mp4", "g.WEBM", "h.avi", "i.mov", "j.mkv", "k.gif", "l.m4v"]
OTHER_NAMES = ["m.txt", "n", ".o.jpg", "p.jpg.tmp", "q.tiff", "png", "z.mp3"]
NAMES = st.sampled_from(PICTURE_NAMES + CLIP_NAMES + OTHER_NAMES)
FOLDERS = st.lists(st.sampled_from(["x", "y", "x.jpg", ".hidden", "Z"]), max_size=3)
TREES = st.lists(st.tuples(FOLDERS, NAMES), min_size=1, max_size=12)


def plant(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_finds_what_a_plain_loop_finds(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    expected = {"pictures": set(), "clips": set()}
    for folders, name in tree:
        below = "/".join([*folders, name])
        if (root / below).is_dir() or any(
            (root / Path(below).parents[i]).is_file() for i in range(len(folders))
        ):
            continue
        plant(root, below)
        if any(part.startswith(".") for part in below.split("/")):
            continue
        if name in PICTURE_NAMES:
            expected["pictures"].add(below)
        elif name in CLIP_NAMES:
            expected["clips"].add(below)
    if not expected["pictures"] | expected["clips"]:
        with pytest.raises(MediaError, match="no picture or clip"):
            find_media([root])
        return
    found = find_media([root])
    for kind, names in expected.items():
        paths = [path.relative_to(root).as_posix() for path in getattr(found, kind)]
        assert paths == sorted(names)
    assert found.paths == found.pictures + found.clips


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    plant(tmp_path, "b/1.jpg", "a/2.jpg", "a/1.mp4", "3.jpg", "c/d/e/0.png")
    first = find_media(tmp_path)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    assert find_media(tmp_path) == first
    assert [p.name for p in first.pictures] == ["3.jpg", "2.jpg", "1.jpg", "0.png"]


def test_folders_keep_their_order_and_shared_files_come_once(tmp_path):
    plant(tmp_path, "b/1.jpg", "a/2.jpg", "a/in/3.jpg")
    found = find_media([tmp_path / "b", tmp_path / "a" / "in", tmp_path / "a"])
    assert [p.name for p in found.pictures] == ["1.jpg", "3.jpg", "2.jpg"]


def test_single_files_and_a_single_string(tmp_path):
    plant(tmp_path, "1.JPG", "2.mp4", ".3.png")
    assert find_media(str(tmp_path / "1.JPG")).pictures == (tmp_path / "1.JPG",)
    # What is named outright is meant, hidden or not.
    found = find_media([tmp_path / "2.mp4", tmp_path / ".3.png"])
    assert found.clips == (tmp_path / "2.mp4",)
    assert found.pictures == (tmp_path / ".3.png",)


def test_links_are_followed_once(tmp_path):
    plant(tmp_path, "data/1.jpg")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "root").symlink_to(tmp_path / "data", target_is_directory=True)
    found = find_media(tmp_path / "root")
    assert [p.name for p in found.pictures] == ["1.jpg", "gone.jpg"]


def test_pipes_are_no_files(tmp_path):
    plant(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")
    assert find_media(tmp_path).pictures == (tmp_path / "1.jpg",)


def test_errors_name_the_path_what_was_looked_for_and_what_is_there(tmp_path):
    plant(tmp_path, "full/1.jpg", "empty/notes.txt")
    with pytest.raises(MediaError) as caught:
        find_media([tmp_path / "full", tmp_path / "empty"])
    for part in (str(tmp_path / "empty"), *PICTURES, *CLIPS, "notes.txt"):
        assert part in str(caught.value)
    with pytest.raises(MediaError, match="no such file or folder"):
        find_media(tmp_path / "missing")
    with pytest.raises(MediaError, match="neither a folder nor a picture"):
        find_media(tmp_path / "empty" / "notes.txt")
    with pytest.raises(ValueError, match="at least one folder"):
        find_media([])


def test_a_folder_that_cannot_be_listed_is_an_error_not_a_silent_loss(tmp_path, monkeypatch):
    plant(tmp_path, "1.jpg", "locked/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(MediaError, match=r"locked.*Permission denied"):
        find_media(tmp_path)
