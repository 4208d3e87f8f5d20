"""Pictures, through Pillow; JPEG through simplejpeg where that is installed."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

from elastictok.data._errors import MediaError
from elastictok.data._stored import Stored, read_bytes, readable

MAX_PIXELS = 1024**3 // 12
"""Largest picture, or frame of a clip, that is decoded unless asked otherwise: 89 megapixels,
268 MB as three bytes per pixel. It is Pillow's own limit for warning of decompression bombs."""

# Only these parsers are tried, whatever the suffix says: fewer ways in for hostile files.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(
    stored: Stored,
    *,
    max_pixels: int = MAX_PIXELS,
    working: Callable[[int, int], tuple[int, int]] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads a picture: upright, three channels, 8 bits.

    **Arguments:**

    - `stored`: the file or its bytes; of an animated one, the first frame.
    - `max_pixels`: larger pictures are refused before they are decoded.
    - `working`: if given, says to which height and width a picture of a height and width is scaled
        down, which is cheaper than decoding JPEG in full.

    **Raises:** `MediaError`.
    """
    try:
        with readable(stored) as encoded, Image.open(encoded, formats=_FORMATS) as image:
            return _pixels(image, stored, max_pixels, working)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        reason = "not a picture in a format that is read (BMP, JPEG, PNG, WebP)"
        raise MediaError(str(stored), reason) from error
    # Pillow's parsers let all kinds of exceptions through when the bytes are damaged.
    except Exception as error:
        raise MediaError(str(stored), describe(error)) from error


def _pixels(
    image: Image.Image,
    stored: Stored,
    max_pixels: int,
    working: Callable[[int, int], tuple[int, int]] | None,
) -> UInt8[np.ndarray, "height width 3"]:
    width, height = image.size
    if width * height > max_pixels:
        reason = f"{width} x {height} pixels, above the limit of {max_pixels}; raise max_pixels"
        raise MediaError(str(stored), reason)
    box = (0.0, 0.0, float(width), float(height))
    if working is not None and image.format in ("JPEG", "MPO"):
        # Lets libjpeg leave out frequencies that the scaling below would drop anyway. The size is
        # then a rounded fraction of the file's, of which `box` is the part that is not padding.
        high, wide = _stored_size(width, height, _orientation(image), working)
        drafted = image.draft(image.mode, (wide, high))
        if drafted is not None:
            box = drafted[1]
    pixels = _fast_jpeg(image, stored) if image.size == (width, height) else None
    result = image
    if pixels is None:
        image.load()
        result = _three_channels(image)
    # PNG may hold its orientation behind the pixels, so it is asked for after loading.
    orientation = _orientation(image)
    high, wide = height, width
    if working is not None:
        high, wide = _stored_size(width, height, orientation, working)
    if pixels is not None:
        if (high, wide) == (height, width) and orientation == 1:
            return pixels
        result = Image.fromarray(pixels)
    if (wide, high) != result.size:
        result = result.resize((wide, high), Image.Resampling.BICUBIC, box)
    if orientation in _UPRIGHT:
        result = result.transpose(_UPRIGHT[orientation])
    return np.array(result)


def _fast_jpeg(image: Image.Image, stored: Stored) -> UInt8[np.ndarray, "height width 3"] | None:
    """The same pixels as Pillow's in half the time; `None` where Pillow has to do it.

    What simplejpeg refuses is left to Pillow, so that which files can be used does not depend on
    what is installed.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(read_bytes(stored), "RGB")
    except ValueError:
        return None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it means nothing."""
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in _UPRIGHT else 1


def _stored_size(
    width: int, height: int, orientation: int, working: Callable[[int, int], tuple[int, int]]
) -> tuple[int, int]:
    """Height and width to scale to before the picture is turned upright."""
    if orientation < 5:
        return working(height, width)
    wide, high = working(width, height)
    return high, wide


def _three_channels(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_grey16(image)
    if image.has_transparency_data:
        _halve_depth_of_key(image)
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _from_grey16(image: Image.Image) -> Image.Image:
    """Sixteen bits of grey to eight, rounded; Pillow's own conversion cuts off at 255."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    key = image.info.get("transparency")
    if key is not None:
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _halve_depth_of_key(image: Image.Image) -> None:
    """Pillow reduces 16-bit colours to 8 bits, but not the one that a PNG calls transparent."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def describe(error: Exception) -> str:
    """An exception of a parser as a reason that a reader can place."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    text = (str(error).splitlines() or [""])[0]
    if not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    return f"cannot be decoded ({text})"
