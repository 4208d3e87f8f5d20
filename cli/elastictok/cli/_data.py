"""`elastictok data build` and `data show`, and how data is named on the command line."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from elastictok.data import Built, Progress, build, build_with_beam, contact_sheet, describe_data

from ._commands import DataBuild, DataShow

Folder = str | os.PathLike[str]


def build_data(command: DataBuild) -> None:
    """Builds, tells how far it is, and says what there is in the end."""
    shard = parse_shard(command.shard)
    megabytes = command.shard_megabytes
    settings = {
        "resolution": command.resolution,
        "fps": command.fps,
        "source": command.source,
        "licence": command.licence,
        "table": command.table,
        "shard_bytes": None if megabytes is None else megabytes * 10**6,
    }
    if command.runner is None:
        if command.runner_options:
            raise ValueError("--runner-options are for a --runner; name one")
        teller = Teller()
        try:
            built = build(
                command.folders,
                command.out,
                workers=command.workers,
                shard=shard,
                progress=teller,
                **settings,
            )
        except KeyboardInterrupt:
            teller.end()
            print("stopped; run the same command to go on", file=sys.stderr)
            raise
        teller.end()
    else:
        if command.workers or shard != (0, 1):
            raise ValueError("--runner divides the work itself; leave out --workers and --shard")
        built = build_with_beam(
            command.folders,
            command.out,
            runner=command.runner,
            options=command.runner_options,
            **settings,
        )
    print(built)
    _say_next(built)


def show_data(command: DataShow) -> None:
    """Prints what is in a data set, and draws the sheet."""
    print(describe_data(command.data))
    sheet = command.data / "contact-sheet.png" if command.sheet is None else command.sheet
    contact_sheet(command.data, sheet)
    print(f"pictures and clips from it: {sheet}")


def weighted(data: Sequence[str]) -> list[Folder] | dict[Folder, float]:
    """Folders as they are given on the command line, with weights if they have them.

    **Raises:** `ValueError` for a weight that is none, or where some have one and others not.
    """
    pairs = [_weight(text) for text in data]
    with_weight = [folder for folder, weight in pairs if weight is not None]
    if not with_weight:
        return [folder for folder, _ in pairs]
    if len(with_weight) < len(pairs):
        without = next(folder for folder, weight in pairs if weight is None)
        raise ValueError(
            f"{with_weight[0]} has a weight and {without} has none; give all of them one, "
            f"as in {without}:0.5, or none"
        )
    if len(set(with_weight)) < len(pairs):
        raise ValueError("a folder is given twice; give it once, with the sum of the weights")
    return {folder: weight for folder, weight in pairs if weight is not None}


def _weight(text: str) -> tuple[Path, float | None]:
    folder, colon, weight = text.rpartition(":")
    if not colon or os.path.lexists(text):
        return Path(text), None
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ValueError(
            f"{text}: no such file or folder, and {weight} is no weight; write FOLDER or FOLDER:0.5"
        ) from None


def parse_shard(text: str) -> tuple[int, int]:
    """The I and N of I/N.

    **Raises:** `ValueError` for anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--shard is {text}; it must be I/N with I from 0 to N - 1, such as 0/4 to 3/4"
        )
    return int(match[1]), int(match[2])


def _say_next(built: Built) -> None:
    if built.complete and sum(built.records.values()):
        print(f"elastictok data show {built.out}")
        print(f"elastictok train small --data {built.out} --out RUN")


class Teller:
    """Progress for people: one line that changes on a terminal, a line every ten seconds else."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._said = 0.0
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        if not self._live and progress.seconds - self._said < 10:
            return
        self._said = progress.seconds
        text = self._text(progress)
        if self._live:
            print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the line that changes."""
        if self._live and self._width:
            print(file=sys.stderr)

    def _text(self, progress: Progress) -> str:
        share = progress.bytes / progress.all_bytes if progress.all_bytes else 1.0
        speed = progress.bytes / max(progress.seconds, 1e-9) / 1e6
        left = progress.seconds_left
        return (
            f"{progress.files} of {progress.all_files} files ({share:.0%}), {speed:.0f} MB/s, "
            f"{progress.files_per_second:.0f} files/s, {progress.rejected} rejected, "
            f"{'?' if left is None else _duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
