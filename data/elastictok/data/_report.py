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
class Used:
    """What was read of one component of the data.

    **Arguments:**

    - `name`: what it is called.
    - `items`: how many different files were used.
    - `documents`: how often, all in all; each use of a file is one document, or several where a
        clip goes on from one to the next.
    - `blocks`: how many blocks these filled.
    """

    name: str
    items: int
    documents: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read so far. `print` it.

    **Arguments:**

    - `components`: pictures, clips, or whatever the data was mixed of.
    - `tail_frames`: frames of clips that were left over because they fill no block, summed over
        documents. Another draw from the same clip leaves over others.
    - `skipped`: files that cannot be used.
    - `damaged`: clips that hold fewer frames than they promise.
    """

    components: tuple[Used, ...] = ()
    tail_frames: int = 0
    skipped: tuple[Skipped, ...] = ()
    damaged: tuple[Damaged, ...] = ()

    def __getitem__(self, name: str) -> Used:
        """A component by its name; one of nothing if there is none of that name."""
        return next((used for used in self.components if used.name == name), Used(name, 0, 0, 0))

    @property
    def used(self) -> int:
        """How many different files were used."""
        return sum(used.items for used in self.components)

    @property
    def documents(self) -> int:
        """How many documents were read."""
        return sum(used.documents for used in self.components)

    def __str__(self) -> str:
        blocks = sum(used.blocks for used in self.components)
        lines = [
            f"used {self.used} files in {self.documents} documents; {self.tail_frames} frames "
            f"left over; {len(self.skipped)} files skipped, {len(self.damaged)} damaged"
        ]
        for used in self.components:
            share = f", {used.blocks / blocks:.1%} of the blocks" if blocks else ""
            lines.append(f"  {used.name}: {used.items} in {used.documents} documents{share}")
        lines += [f"  skipped {item.name}: {item.reason}" for item in self.skipped]
        lines += [f"  damaged {item.name}: {item.missing} frames missing" for item in self.damaged]
        return "\n".join(lines)
