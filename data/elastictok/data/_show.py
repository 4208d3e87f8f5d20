"""What is in a built data set, in numbers and in pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from elastictok.data._built import INDEX, BuiltDataset, Records
from elastictok.data._clip import read_clip
from elastictok.data._crop import WorkingSize, largest_window, resize
from elastictok.data._errors import MediaError
from elastictok.data._picture import read_picture
from elastictok.data._write import write_picture

_TILE = 96
_COLUMNS = 10
_PICTURES = 40
_CLIPS = 8
_GAP = 4
_HEADING = 18
_READ_AT_ONCE = 2**20
_SHARES = (0, 5, 25, 50, 75, 95, 100)


def describe_data(folder: str | os.PathLike[str]) -> str:
    """Counts, bytes, sizes, rates, durations, licences and what was rejected, as text.

    Counts and sums are of all records. Of more than a million, the shares are those of a million,
    evenly chosen.

    **Raises:** `MediaError` if it is no complete data set.
    """
    dataset = BuiltDataset(Path(folder))
    about = dataset.description
    lines = [f"{folder}: built by elastictok, version {about['version']}"]
    encoding = about["settings"]["encoding"]
    changed = [f"{name} {value:g}" for name, value in encoding.items() if value is not None]
    lines.append(
        f"  encoded anew above: {', '.join(changed)}" if changed else "  files as they were"
    )
    for kind, records in (("pictures", dataset.pictures), ("clips", dataset.clips)):
        lines += _describe(kind, records, about["kinds"][kind])
    lines.append(f"  rejected: {about['rejected']} files (rejected.tsv)")
    if about["damaged"]:
        lines.append(f"  damaged: {about['damaged']} clips lack frames (damaged.tsv)")
    return "\n".join(lines)


def _describe(kind: str, records: Records, about: dict) -> list[str]:
    if not len(records):
        return [f"{kind}: none"]
    sizes = f"{about['bytes'] / 1e6:.1f} MB in {len(about['shards'])} shards"
    lines = [f"{kind}: {len(records)}, {sizes}"]
    index = records.index
    columns = {name: _column(index, name) for name in ("height", "width", "bytes")}
    short = np.minimum(columns["height"], columns["width"])
    aspect = columns["width"] / columns["height"]
    table = [
        ("short side, pixels", short, ".0f"),
        ("width / height", aspect, ".2f"),
        ("kilobytes", columns["bytes"] / 1e3, ".1f"),
    ]
    if kind == "clips":
        hours = _total(index, "duration") / 3600
        lines[0] += f", {hours:.2f} hours, {_total(index, 'frames'):.0f} frames"
        table += [
            ("seconds", _column(index, "duration"), ".2f"),
            ("frames per second", _column(index, "fps"), ".2f"),
        ]
    head = "".join(f"{_share_name(share):>9}" for share in _SHARES)
    lines.append(f"  {'':20}{head}")
    for name, values, form in table:
        cells = "".join(f"{value:>9{form}}" for value in np.percentile(values, _SHARES))
        lines.append(f"  {name:20}{cells}")
    named = [(name or "not given", count) for name, count in about["licences"].items()]
    shown = ", ".join(f"{name} ({count})" for name, count in named[:5])
    more = f", and {len(named) - 5} more" if len(named) > 5 else ""
    lines.append(f"  licences: {shown}{more}")
    return lines


def _share_name(share: int) -> str:
    return {0: "least", 50: "median", 100: "most"}.get(share, f"{share} %")


def _column(index: np.ndarray, name: str) -> np.ndarray:
    """A column of the index, at most a million values of it, evenly chosen."""
    step = -(-len(index) // _READ_AT_ONCE)
    assert index.dtype == INDEX
    return np.asarray(index[name][::step]).astype(np.float64)


def _total(index: np.ndarray, name: str) -> float:
    starts = range(0, len(index), _READ_AT_ONCE)
    return float(sum(index[name][i : i + _READ_AT_ONCE].sum(dtype=np.float64) for i in starts))


def contact_sheet(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Writes a picture of pictures: up to forty of them, and up to eight clips as rows of ten
    frames, evenly chosen from the data set.

    **Raises:** `MediaError` if it is no complete data set, holds nothing, or cannot be written.
    """
    dataset = BuiltDataset(Path(folder))
    parts: list[Image.Image] = []
    pictures = [_tile_of_picture(dataset.pictures, i) for i in _evenly(dataset.pictures, _PICTURES)]
    if pictures:
        heading = f"{len(pictures)} of {len(dataset.pictures)} pictures"
        rows = [pictures[i : i + _COLUMNS] for i in range(0, len(pictures), _COLUMNS)]
        parts.append(_grid(heading, rows))
    clips = [_row_of_clip(dataset.clips, i) for i in _evenly(dataset.clips, _CLIPS)]
    if clips:
        heading = f"{len(clips)} of {len(dataset.clips)} clips, {_COLUMNS} frames from each"
        parts.append(_grid(heading, clips))
    if not parts:
        raise MediaError(folder, "the data set is empty; see its rejected.tsv")
    height = sum(part.height for part in parts)
    sheet = Image.new("RGB", (parts[0].width, height), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    write_picture(path, np.asarray(sheet))


def _evenly(records: Records, most: int) -> list[int]:
    if len(records) <= most:
        return list(range(len(records)))
    return [int(i) for i in np.linspace(0, len(records) - 1, most).round()]


def _tile_of_picture(records: Records, index: int) -> UInt8[np.ndarray, "height width 3"]:
    return _tile(read_picture(records.stored(index), working=_WORKING))


def _row_of_clip(records: Records, index: int) -> list[UInt8[np.ndarray, "height width 3"]]:
    clip = read_clip(records.stored(index), working=_WORKING)
    chosen = np.linspace(0, len(clip.frames) - 1, _COLUMNS).round().astype(int)
    return [_tile(clip.frames[i]) for i in chosen]


_WORKING = WorkingSize(((_TILE, _TILE),), 1.0)


def _tile(
    frame: UInt8[np.ndarray, "height width 3"],
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    """The middle of a frame as a square."""
    height, width, _ = frame.shape
    high, wide = largest_window(height, width, (_TILE, _TILE))
    top, left = (height - high) // 2, (width - wide) // 2
    return resize(frame[top : top + high, left : left + wide], (_TILE, _TILE))


def _grid(
    heading: str, rows: Sequence[Sequence[UInt8[np.ndarray, "height width 3"]]]
) -> Image.Image:
    step = _TILE + _GAP
    size = (_COLUMNS * step + _GAP, len(rows) * step + _GAP + _HEADING)
    part = Image.new("RGB", size, "white")
    ImageDraw.Draw(part).text((_GAP, _GAP), heading, fill="black")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            part.paste(Image.fromarray(tile), (_GAP + j * step, _HEADING + _GAP + i * step))
    return part
