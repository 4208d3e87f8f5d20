"""What became of the files, for the end of a run."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that could not be used, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A clip of which at least `missing` frames could not be decoded."""

    name: str
    missing: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read so far. `print` it.

    **Arguments:**

    - `pictures`, `clips`: how many different ones were used.
    - `documents`: how often, all in all; each use of a file is one document.
    - `tail_frames`: frames of clips that were left over because they fill no block, summed over
        documents. Another draw from the same clip leaves over others.
    - `skipped`: files that cannot be used.
    - `damaged`: clips that hold fewer frames than they promise.
    """

    pictures: int = 0
    clips: int = 0
    documents: int = 0
    tail_frames: int = 0
    skipped: tuple[Skipped, ...] = ()
    damaged: tuple[Damaged, ...] = ()

    @property
    def used(self) -> int:
        """How many different files were used."""
        return self.pictures + self.clips

    def __add__(self, other: "Report") -> "Report":
        """Of two sets of files that do not overlap."""
        return Report(
            pictures=self.pictures + other.pictures,
            clips=self.clips + other.clips,
            documents=self.documents + other.documents,
            tail_frames=self.tail_frames + other.tail_frames,
            skipped=self.skipped + other.skipped,
            damaged=self.damaged + other.damaged,
        )

    def __str__(self) -> str:
        lines = [
            f"used {self.pictures} pictures and {self.clips} clips in {self.documents} documents; "
            f"{self.tail_frames} frames left over; "
            f"{len(self.skipped)} files skipped, {len(self.damaged)} damaged"
        ]
        lines += [f"  skipped {item.name}: {item.reason}" for item in self.skipped]
        lines += [f"  damaged {item.name}: {item.missing} frames missing" for item in self.damaged]
        return "\n".join(lines)
