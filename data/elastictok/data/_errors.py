"""What can go wrong with a file, as one exception and one warning."""

import os
from pathlib import Path


class MediaError(ValueError):
    """A file or folder cannot be used. Names it and says why, and what to do where that is known.

    **Arguments:**

    - `path`: the file or folder, as the caller wrote it.
    - `reason`: one sentence without the path.
    """

    path: Path
    reason: str

    def __init__(self, path: str | os.PathLike[str], reason: str):
        # Both go to `args`, so that the exception survives pickling on its way out of a worker.
        self.args = (str(path), reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class MediaWarning(UserWarning):
    """A file was skipped or only partly used; the text names it and says why."""
