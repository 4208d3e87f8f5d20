"""Pictures of what tokenizers give back, and the page that shows them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from elastictok.eval import psnr_per_frame

_SCALE = 2  # of a pixel
_GAP = 6
_LINE = 16  # of text, in pixels
_COLOURS = 256
_PAPER, _INK = (255, 255, 255), (40, 40, 40)

Frame = UInt8[np.ndarray, "height width 3"]
Sheet = UInt8[np.ndarray, "sheet_height sheet_width 3"]


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A tokenizer on the page.

    - `about`, `source`: of its preset.
    - `facts`: what it is and how it was trained, in a line.
    - `sheet`: its picture, relative to the page.
    """

    name: str
    about: str
    source: str
    facts: str
    sheet: str


def draw_sheet(headings: Sequence[str], rows: Sequence[Sequence[Frame]]) -> Sheet:
    """Frames in rows under headings; beneath all but the first of each row, its PSNR to the first.

    **Arguments:**

    - `headings`: of the columns.
    - `rows`: all frames of equal size, as many in each as there are headings.
    """
    height, width = rows[0][0].shape[:2]
    across, down = _SCALE * width + _GAP, _SCALE * height + _LINE + _GAP
    size = (_GAP + len(headings) * across, _GAP + _LINE + len(rows) * down)
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def write(text: str, column: int, top: int) -> None:
        middle = _GAP + column * across + _SCALE * width // 2
        draw.text((middle, top), text, fill=_INK, font=font, anchor="ma")

    for column, heading in enumerate(headings):
        write(heading, column, _GAP // 2)
    for number, (truth, *others) in enumerate(rows):
        top = _GAP + _LINE + number * down
        for column, frame in enumerate((truth, *others)):
            # Enlarged without smoothing: its pixels are what is shown.
            cell = Image.fromarray(frame).resize(
                (_SCALE * width, _SCALE * height), Image.Resampling.NEAREST
            )
            sheet.paste(cell, (_GAP + column * across, top))
            if column:
                (quality,) = psnr_per_frame(truth[None], frame[None])
                write(f"{quality:.1f} dB", column, top + _SCALE * height + 1)
    return np.asarray(sheet)


def write_sheet(path: Path, sheet: Sheet) -> None:
    """As a PNG of 256 colours, well chosen, which is a third of the size; folders are made as
    needed. The file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    few = Image.fromarray(sheet).quantize(_COLOURS, kmeans=1, dither=Image.Dither.NONE)
    scratch = path.with_suffix(".part")
    few.save(scratch, format="PNG", optimize=True)
    os.replace(scratch, path)


def gallery_page(title: str, lead: Sequence[str], exhibits: Sequence[Exhibit]) -> str:
    """The page as Markdown.

    **Arguments:**

    - `lead`: paragraphs before the first picture.
    """
    parts = [f"# {title}", *lead]
    for each in exhibits:
        source = f" ({each.source})" if each.source else ""
        parts += [
            f"## {each.name}",
            f"{each.about}{source}",
            each.facts,
            f"![{each.name}: originals and reconstructions at three lengths]({each.sheet})",
        ]
    return "\n\n".join(parts) + "\n"
