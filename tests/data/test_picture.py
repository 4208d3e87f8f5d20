"""Pictures: every mode and orientation against plain NumPy, and bytes that mean nothing."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elastictok.data import MAX_PIXELS, Clip, MediaError, WorkingSize, read_media
from elastictok.data._picture import read_picture

# EXIF 2.32, 4.6.5.A: what has to be done to the stored rows and columns to see them upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
NOISE = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)


def store(path, image, **options):
    image.save(path, **options)
    return read_media(path).frames[0]


def close(left, right, tolerance):
    assert left.shape == right.shape
    assert np.abs(left.astype(int) - right.astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_orientation(orientation, suffix, tmp_path, make):
    stored = make.corners(32, 48)
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    frame = store(tmp_path / f"a.{suffix}", image, exif=exif, **options.get(suffix, {}))
    expected = UPRIGHT[orientation](stored)
    close(frame, expected, 8 if suffix == "jpg" else 0)
    # The same when it is read small, which is a way of its own through Pillow for JPEG.
    small = read_picture(tmp_path / f"a.{suffix}", working=WorkingSize(((8, 6),), 1.0))
    factor = 6 / 32 if orientation > 4 else 8 / 32
    assert small.shape[:2] == tuple(round(side * factor) for side in expected.shape[:2])
    high, wide = small.shape[:2]
    for top in (False, True):
        for left in (False, True):
            row, column = (1 if top else high - 2), (1 if left else wide - 2)
            there = small[row, column].astype(int)
            here = expected[0 if top else -1, 0 if left else -1].astype(int)
            assert np.abs(there - here).max() < 60


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientation_that_means_nothing_is_ignored(orientation, tmp_path):
    image = Image.fromarray(NOISE)
    exif = image.getexif()
    exif[0x0112] = orientation
    assert (store(tmp_path / "a.png", image, exif=exif) == NOISE).all()


def test_alpha_is_laid_on_white(tmp_path):
    alpha = np.random.default_rng(1).integers(0, 256, (6, 10, 1)).astype(np.uint8)
    mixed = (NOISE.astype(float) * alpha + 255.0 * (255 - alpha)) / 255
    frame = store(tmp_path / "a.png", Image.fromarray(np.concatenate([NOISE, alpha], 2)))
    close(frame, mixed, 1)
    grey = NOISE[..., :1]
    frame = store(tmp_path / "b.png", Image.fromarray(np.concatenate([grey, alpha], 2), "LA"))
    close(frame, (grey.astype(float) * alpha + 255.0 * (255 - alpha)) / 255 * np.ones(3), 1)


def test_palette_with_and_without_a_transparent_colour(tmp_path):
    index = np.random.default_rng(2).integers(0, 4, (6, 10)).astype(np.uint8)
    colours = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30], [200, 100, 50]], np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    assert (store(tmp_path / "a.png", image) == colours[index]).all()
    white = np.where(index[..., None] == 2, 255, colours[index])
    assert (store(tmp_path / "b.png", image, transparency=2) == white).all()
    half = np.where(index[..., None] == 1, (colours[index] * 128.0 + 255 * 127) / 255, white)
    alphas = bytes([255, 128, 0, 255])
    close(store(tmp_path / "c.png", image, transparency=alphas), half, 1)


def test_grey_bits_and_keyed_colours(tmp_path):
    grey = NOISE[..., 0]
    assert (store(tmp_path / "a.png", Image.fromarray(grey)) == grey[..., None]).all()
    bits = Image.fromarray(grey > 127)
    assert (store(tmp_path / "b.png", bits) == np.where(grey > 127, 255, 0)[..., None]).all()
    key = tuple(int(v) for v in NOISE[2, 3])
    expected = np.where((key == NOISE).all(2, keepdims=True), 255, NOISE)
    assert (store(tmp_path / "c.png", Image.fromarray(NOISE), transparency=key) == expected).all()
    expected = np.where(grey == grey[0, 0], 255, grey)[..., None]
    frame = store(tmp_path / "d.png", Image.fromarray(grey), transparency=int(grey[0, 0]))
    assert (frame == expected).all()


def test_sixteen_bits(tmp_path, make):
    deep = np.random.default_rng(3).integers(0, 65536, (6, 10)).astype(np.uint16)
    deep[0, :3] = 0, 65535, 257
    expected = np.floor(deep.astype(float) * 255 / 65535 + 0.5)[..., None]
    assert (store(tmp_path / "a.png", Image.fromarray(deep)) == expected).all()
    keyed = np.where(deep[..., None] == 257, 255, expected)
    frame = store(tmp_path / "b.png", Image.fromarray(deep), transparency=257)
    assert (frame == keyed).all()


def png16(rows, key=None):
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = rows.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))]
    if key is not None:
        parts.append(chunk(b"tRNS", struct.pack(">HHH", *key)))
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bits_of_colour(tmp_path):
    deep = NOISE.astype(np.uint16) * 256 + 7
    (tmp_path / "a.png").write_bytes(png16(deep))
    close(read_media(tmp_path / "a.png").frames[0], NOISE, 1)
    key = tuple(int(v) for v in deep[2, 3])
    (tmp_path / "b.png").write_bytes(png16(deep, key))
    frame = read_media(tmp_path / "b.png").frames[0]
    assert (frame[2, 3] == 255).all()
    close(np.delete(frame.reshape(-1, 3), 23, 0), np.delete(NOISE.reshape(-1, 3), 23, 0), 1)


def test_cmyk(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:8, :, 1] = cmyk[:8, :, 2] = 255  # magenta and yellow make red
    cmyk[8:, :, 3] = 128  # half black
    frame = store(tmp_path / "a.jpg", Image.fromarray(cmyk, "CMYK"), quality=100)
    close(frame[2:6], np.broadcast_to(np.array([255, 0, 0], np.uint8), (4, 16, 3)), 6)
    close(frame[10:14], np.full((4, 16, 3), 127, np.uint8), 6)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_first_frame_of_an_animated_picture(suffix, tmp_path):
    other = Image.fromarray(255 - NOISE)
    options = {"save_all": True, "append_images": [other], "lossless": True}
    frame = store(tmp_path / f"a.{suffix}", Image.fromarray(NOISE), **options)
    assert (frame == NOISE).all()


@pytest.mark.parametrize("size", [(1, 1), (16000, 1), (1, 16000), (3, 5)])
def test_extreme_sizes(size, tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (*size, 3)).astype(np.uint8)
    assert (store(tmp_path / "a.png", Image.fromarray(pixels)) == pixels).all()


def test_a_phone_picture_of_several_images(tmp_path):
    """MPO: the first is the picture, the others are what the camera wanted to keep beside it."""
    image = Image.fromarray(np.full((16, 24, 3), 90, np.uint8))
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    frame = read_media(tmp_path / "a.jpg").frames[0]
    assert frame.shape == (16, 24, 3)
    close(frame, np.full((16, 24, 3), 90, np.uint8), 2)


def test_the_content_counts_not_the_suffix(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.JPG")
    assert (read_media(tmp_path / "a.JPG").frames[0] == NOISE).all()


def test_pixel_limit(tmp_path):
    Image.new("1", (100, 50)).save(tmp_path / "a.png")
    assert read_media(tmp_path / "a.png", max_pixels=5000).frames.shape == (1, 50, 100, 3)
    with pytest.raises(MediaError, match=r"100 x 50 .* limit of 4999.*max_pixels"):
        read_media(tmp_path / "a.png", max_pixels=4999)


def test_bombs_are_refused_by_default(tmp_path):
    """A few kilobytes that would unpack to gigabytes."""
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(MediaError, match="max_pixels"):
            read_media(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a picture"), (b"a letter", "not a picture"), (None, "no such file")],
)
def test_reasons(content, reason, tmp_path):
    path = tmp_path / "some picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=reason) as caught:
        read_media(path)
    assert str(path) in str(caught.value)
    assert caught.value.path == path


def test_unknown_suffix(tmp_path):
    with pytest.raises(MediaError, match=r"suffix.*\.png"):
        read_media(tmp_path / "a.tiff")


def test_truncation_names_itself(tmp_path, make):
    Image.fromarray(make.corners(64, 64)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"(?i)truncated"):
        read_media(tmp_path / "a.jpg")


def samples():
    image = Image.fromarray(NOISE)
    exif = image.getexif()
    exif[0x0112] = 6
    palette = image.quantize(8)
    result = []
    for kind, source, options in [
        ("png", image, {"exif": exif}),
        ("png", palette, {"transparency": 3}),
        ("jpg", image, {"exif": exif}),
        ("webp", image, {}),
        ("bmp", image, {}),
    ]:
        buffer = io.BytesIO()
        source.save(buffer, {"jpg": "jpeg"}.get(kind, kind), **options)
        result.append((kind, buffer.getvalue()))
    return result


@given(
    sample=st.sampled_from(samples()),
    cut=st.floats(0, 1),
    spot=st.floats(0, 1),
    noise=st.binary(max_size=12),
    working=st.sampled_from([None, WorkingSize(((3, 3),), 1.0)]),
)
def test_damaged_bytes_give_a_picture_or_an_error(
    sample, cut, spot, noise, working, tmp_path_factory
):
    suffix, data = sample
    data = data[: 1 + round(cut * (len(data) - 1))]
    at = round(spot * len(data))
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    try:
        clip = Clip(read_picture(path, working=working)[None], None, path)
    except MediaError as error:
        assert error.path == path
        assert error.reason
    else:
        assert clip.picture


@given(data=st.binary(max_size=200), suffix=st.sampled_from(["png", "jpg", "bmp", "webp"]))
def test_random_bytes_are_an_error(data, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"random.{suffix}"
    path.write_bytes(data)
    with pytest.raises(MediaError):
        read_media(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_reading_small_is_like_reading_and_scaling_down(suffix, tmp_path):
    rows, columns = np.mgrid[:300, :420]
    wave = 127 + 90 * np.sin(rows / 23) * np.cos(columns / 31)
    pixels = np.stack([wave, wave[::-1], 255 - wave], -1).astype(np.uint8)
    options = {"quality": 98, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    small = read_picture(tmp_path / f"a.{suffix}", working=WorkingSize(((30, 30),), 1.0))
    assert small.shape == (30, 42, 3)
    means = pixels.reshape(30, 10, 42, 10, 3).mean((1, 3))
    assert np.abs(small - means).mean() < 2
    half = read_picture(tmp_path / f"a.{suffix}", working=WorkingSize(((150, 150),), 1.0))
    assert half.shape == (150, 210, 3)
    means = pixels.reshape(150, 2, 210, 2, 3).mean((1, 3))
    assert np.abs(half - means).mean() < 1
    kept = read_picture(tmp_path / f"a.{suffix}", working=WorkingSize(((300, 300),), 1.0))
    assert kept.shape == (300, 420, 3)
