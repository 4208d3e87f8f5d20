"""One page that shows what a tokenizer does: it needs no network, no script and no other file."""

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ._charts import Chart, render_chart
from ._files import write_atomic
from ._tables import Table

# A filmstrip shows at most so many frames, evenly chosen: a whole clip on one screen. Each is
# stored and shown at most 96 pixels high, and never shown lower than 44.
_MOST_CELLS = 24
_CELL = 96
_SMALLEST_CELL = 44
# Pictures up to this height are enlarged without smoothing: their pixels are what is shown.
_SMALL = 160


@final
@dataclass(frozen=True, eq=False)
class Shot:
    """A picture and the line under it; `details` are fainter lines under that."""

    caption: str
    pixels: UInt8[np.ndarray, "height width 3"]
    details: tuple[str, ...] = ()


@final
@dataclass(frozen=True, eq=False)
class PictureSection:
    """A picture's truth beside its reconstructions, in one row."""

    name: str
    truth: UInt8[np.ndarray, "height width 3"]
    shots: tuple[Shot, ...]


@final
@dataclass(frozen=True)
class Video:
    """An mp4 file's content, and the line under it that says what is to be seen."""

    mp4: bytes
    caption: str


@final
@dataclass(frozen=True, eq=False)
class ClipSection:
    """A clip as filmstrips of truth and reconstruction over a bar of tokens for each block.

    **Fields:**

    - `name`: of the clip.
    - `truth`, `reconstruction`: equal shapes.
    - `lengths`: tokens used by each block; `longest`: the most a block can use.
    - `frames_per_block`: the last block may have fewer frames in the clip.
    - `met`: for each block, whether it meets the criterion; empty if there is none.
    - `caption`: states the criterion and its threshold, among others.
    - `cuts`: indices of the first frame after each cut of the scene.
    - `video`: to play under it, if there is one.
    """

    name: str
    truth: UInt8[np.ndarray, "frames height width 3"]
    reconstruction: UInt8[np.ndarray, "frames height width 3"]
    lengths: tuple[int, ...]
    longest: int
    frames_per_block: int
    met: tuple[bool, ...] = ()
    caption: str = ""
    cuts: tuple[int, ...] = ()
    video: Video | None = None

    def __post_init__(self):
        frames = len(self.truth)
        if self.truth.shape != self.reconstruction.shape:
            raise ValueError(
                f"{self.name!r}: truth is {self.truth.shape}, the reconstruction "
                f"{self.reconstruction.shape}; compare with Tokenizer.fit(frames)"
            )
        blocks = math.ceil(frames / self.frames_per_block)
        if len(self.lengths) != blocks:
            raise ValueError(
                f"{self.name!r}: {frames} frames are {blocks} blocks of {self.frames_per_block}, "
                f"but there are {len(self.lengths)} lengths"
            )
        if self.met and len(self.met) != blocks:
            raise ValueError(f"{self.name!r}: {blocks} blocks, but {len(self.met)} values of met")
        for cut in self.cuts:
            if not 0 <= cut < frames:
                raise ValueError(f"{self.name!r}: a cut at frame {cut} of a clip of {frames}")


@final
@dataclass(frozen=True, eq=False)
class Report:
    """What `write_report` lays out, in this order. Text is escaped: any file name may occur."""

    title: str
    lead: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[PictureSection, ...] = ()
    clips: tuple[ClipSection, ...] = ()
    notes: tuple[str, ...] = ()


def _data_uri(kind: str, body: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(body).decode('ascii')}"


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


@final
@dataclass(frozen=True)
class _Bar:
    """A block under the filmstrip; positions are per cent of the strip's width and height."""

    left: float
    width: float
    height: float
    label: str
    title: str
    missed: bool


@final
@dataclass(frozen=True)
class _Strip:
    """A clip section made ready for the template."""

    section: ClipSection
    truth: str
    reconstruction: str
    narrowest: int
    widest: int
    stride: int
    bars: tuple[_Bar, ...]
    cuts: tuple[tuple[int, float], ...]
    summary: str
    video: str | None


def _film(frames: np.ndarray) -> np.ndarray:
    """Frames side by side in one picture, made smaller where they are high."""
    height, width = frames.shape[1:3]
    if height <= _CELL:
        return np.concatenate(list(frames), axis=1)
    size = (max(1, round(width * _CELL / height)), _CELL)
    cells = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    return np.concatenate([np.asarray(cell) for cell in cells], axis=1)


def _bar(section: ClipSection, block: int, shown: int, narrowest: int) -> _Bar:
    start = block * section.frames_per_block
    stop = min(start + section.frames_per_block, len(section.truth))
    length = section.lengths[block]
    missed = bool(section.met) and not section.met[block]
    verdict = f", {'misses' if missed else 'meets'} the threshold" if section.met else ""
    frames = f"frame {start}" if stop - start == 1 else f"frames {start} to {stop - 1}"
    # A digit is about 7 pixels wide; a number that has no room is left out, the title has it.
    roomy = narrowest * (stop - start) / shown >= 7 * len(str(length)) + 4
    return _Bar(
        left=100 * start / shown,
        width=100 * (stop - start) / shown,
        height=100 * length / section.longest,
        label=str(length) if roomy else "",
        title=f"{frames}: {length} of {section.longest} tokens{verdict}",
        missed=missed,
    )


def _strip(section: ClipSection) -> _Strip:
    frames, height, width = section.truth.shape[:3]
    stride = math.ceil(frames / _MOST_CELLS)
    cells = math.ceil(frames / stride)
    narrowest = math.ceil(cells * max(1.0, _SMALLEST_CELL * width / height))
    # Frames that the strip's width stands for: the last cell may stand for a few past the end.
    shown = cells * stride
    lengths = ", ".join(map(str, section.lengths))
    cuts = ", ".join(map(str, section.cuts))
    marked = f" Cuts before frames {cuts}." if section.cuts else ""
    return _Strip(
        section=section,
        truth=_png(_film(section.truth[::stride])),
        reconstruction=_png(_film(section.reconstruction[::stride])),
        narrowest=narrowest,
        widest=math.ceil(cells * max(1.0, _CELL * width / height)),
        stride=stride,
        bars=tuple(_bar(section, block, shown, narrowest) for block in range(len(section.lengths))),
        cuts=tuple((cut, 100 * cut / shown) for cut in section.cuts),
        summary=f"Tokens used by each block, of {section.longest}: {lengths}.{marked}",
        video=None if section.video is None else _data_uri("video/mp4", section.video.mp4),
    )


@final
@dataclass(frozen=True)
class _Image:
    """A picture made ready for the template."""

    caption: str
    details: tuple[str, ...]
    alt: str
    source: str
    small: bool


def _images(section: PictureSection) -> Sequence[_Image]:
    truth = Shot("truth", section.truth)
    return [
        _Image(
            caption=shot.caption,
            details=shot.details,
            alt=f"{section.name}: {shot.caption}",
            source=_png(shot.pixels),
            small=shot.pixels.shape[0] <= _SMALL,
        )
        for shot in (truth, *section.shots)
    ]


def render_report(report: Report) -> str:
    """The report as an HTML page: styles, pictures, charts and videos are all inside it."""
    # Imported late: metrics and tables need neither.
    import jinja2

    template = resources.files("elastictok.eval").joinpath("report.html.j2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template.read_text("utf-8")).render(
        report=report,
        pictures=[(section, _images(section)) for section in report.pictures],
        charts=[(chart, render_chart(chart)) for chart in report.charts],
        strips=[_strip(section) for section in report.clips],
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the report as one HTML file, atomically; folders are made as needed.

    **Arguments:**

    - `report`: what to show.
    - `path`: of the file, usually `report.html`.

    **Returns:** the path.
    """
    target = Path(path)
    write_atomic(target, render_report(report))
    return target
