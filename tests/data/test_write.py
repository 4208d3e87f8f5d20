"""Writing: whole or not at all, and the same every time."""

import os

import numpy as np
import pytest

from elastictok.data import Clip, MediaError, read_media, write_clip, write_picture

NOISE = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "PNG"])
def test_pictures_without_loss(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write_picture(path, NOISE)
    clip = read_media(path)
    assert (clip.frames[0] == NOISE).all()
    assert (clip.fps, clip.path, clip.picture) == (None, path, True)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpeg_is_close(suffix, tmp_path, make):
    write_picture(tmp_path / f"a.{suffix}", make.corners(32, 48))
    back = read_media(tmp_path / f"a.{suffix}").frames[0].astype(int)
    assert np.abs(back - make.corners(32, 48)).max() < 12


def test_views_can_be_written(tmp_path, make):
    write_picture(tmp_path / "a.png", NOISE[::-1, ::2])
    assert (read_media(tmp_path / "a.png").frames[0] == NOISE[::-1, ::2]).all()
    write_clip(tmp_path / "a.mp4", make.numbered(9)[::-3, ::2, ::2], 8)
    assert make.numbers(read_media(tmp_path / "a.mp4").frames) == [8, 5, 2]


@pytest.mark.parametrize("fps", [8, 24, 29.97, 30000 / 1001, 0.5, 59.94])
def test_rates_come_back(fps, tmp_path, make):
    write_clip(tmp_path / "a.mp4", make.numbered(3), fps)
    assert read_media(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-6)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi", "mkv"])
def test_the_same_frames_give_the_same_file(suffix, tmp_path):
    rows, columns = np.mgrid[:64, :96]
    frames = [127 + 100 * np.sin(rows / 9 + t) * np.cos(columns / 7 - t) for t in range(8)]
    frames = np.stack(frames)[..., None].repeat(3, 3).astype(np.uint8)
    contents = set()
    for number in range(12):
        # Memory that is not the same every time: x264 looks at some that it was not given.
        held = [np.full(97 + 1000 * number, number, np.uint8) for _ in range(50)]
        write_clip(tmp_path / f"{number}.{suffix}", frames, 8)
        contents.add((tmp_path / f"{number}.{suffix}").read_bytes())
        del held
    assert len(contents) == 1


def test_an_older_file_is_replaced_and_nothing_else_is_left(tmp_path, make):
    write_clip(tmp_path / "a.mp4", make.numbered(3), 8)
    write_clip(tmp_path / "a.mp4", make.numbered(5), 8)
    write_picture(tmp_path / "a.png", NOISE)
    write_picture(tmp_path / "a.png", 255 - NOISE)
    assert len(read_media(tmp_path / "a.mp4").frames) == 5
    assert (read_media(tmp_path / "a.png").frames[0] == 255 - NOISE).all()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.png"]


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_failed_write_leaves_the_older_file(name, tmp_path, make, monkeypatch):
    def write(frames):
        if name == "a.mp4":
            write_clip(tmp_path / name, frames, 8)
        else:
            write_picture(tmp_path / name, frames[0])

    write(make.numbered(3))
    before = (tmp_path / name).read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MediaError, match="No space left"):
        write(make.numbered(5))
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_an_encoder_that_fails_leaves_nothing(suffix, tmp_path, make, monkeypatch):
    from elastictok.data import _write

    written = []

    class Unplugged(RuntimeError):
        pass

    def unplug(frame, format):
        written.extend(os.listdir(tmp_path))
        raise Unplugged

    monkeypatch.setattr(_write.VideoFrame, "from_ndarray", unplug)
    with pytest.raises(Unplugged):
        write_clip(tmp_path / f"a.{suffix}", make.numbered(3), 8)
    assert all(name.startswith(".") for name in written)
    assert not os.listdir(tmp_path)


def test_errors_say_what_would_work(tmp_path, make):
    with pytest.raises(MediaError, match=r"a\.flac.*\.mp4.*\.webm"):
        write_clip(tmp_path / "a.flac", make.numbered(2), 8)
    with pytest.raises(MediaError, match=r"a\.tiff.*\.png"):
        write_picture(tmp_path / "a.tiff", NOISE)
    with pytest.raises(MediaError, match="create it first"):
        write_clip(tmp_path / "no" / "a.mp4", make.numbered(2), 8)
    with pytest.raises(MediaError, match="create it first"):
        write_picture(tmp_path / "no" / "a.png", NOISE)
    with pytest.raises(ValueError, match="fps is 0"):
        write_clip(tmp_path / "a.mp4", make.numbered(2), 0)
    with pytest.raises(ValueError, match="nothing to write"):
        write_clip(tmp_path / "a.mp4", make.numbered(0), 8)
    with pytest.raises(ValueError, match="nothing to write"):
        write_picture(tmp_path / "a.png", NOISE[:0])
    assert not os.listdir(tmp_path)


def test_files_have_the_usual_permissions(tmp_path, make):
    (tmp_path / "plain").touch()
    write_picture(tmp_path / "a.png", NOISE)
    write_clip(tmp_path / "a.mp4", make.numbered(2), 8)
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "a.png", "a.mp4")}
    assert len(modes) == 1


def test_a_picture_is_one_frame_and_has_no_rate(make):
    with pytest.raises(ValueError, match="one frame, not 3"):
        Clip(make.numbered(3), None)
    with pytest.raises(ValueError, match="may be empty"):
        Clip(make.numbered(0), 8.0)
    with pytest.raises(ValueError, match="fps"):
        Clip(make.numbered(3), -8.0)
    assert Clip(make.numbered(1), None).picture
    assert not Clip(make.numbered(1), 8).picture


def test_browsers_can_start_before_they_have_it_all(tmp_path, make):
    write_clip(tmp_path / "a.mp4", make.numbered(30), 8)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
