"""The snippets of the package's README and of the guide run."""

import re
from pathlib import Path

import numpy as np
import pytest

from elastictok.data import TokenRecord, tokenize, write_clip, write_picture

ROOT = Path(__file__).parents[2]


def grey(batch):
    """Records with a block for each frame, and in it one code."""
    return [
        TokenRecord(
            key=key,
            kind="picture" if clip.picture else "clip",
            codes=clip.frames.mean(axis=(1, 2, 3)).astype(np.int32),
            latents=None,
            lengths=np.ones(len(clip.frames), np.int32),
            losses=np.zeros(len(clip.frames)),
            frames=len(clip.frames),
            height=clip.frames.shape[1],
            width=clip.frames.shape[2],
            original_height=clip.frames.shape[1],
            original_width=clip.frames.shape[2],
            tokens_per_block=1,
            frames_per_block=1,
            window=1,
            fps=clip.fps,
            missing=clip.missing,
            codebook_size=256,
            fingerprint="grey",
        )
        for key, clip in batch
    ]


@pytest.mark.parametrize("document", ["data/README.md", "docs/data.md"])
def test_snippets(document, tmp_path, make, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    write_picture(tmp_path / "photos" / "a.png", make.corners(80, 100))
    write_clip(tmp_path / "photos" / "clip.mp4", make.numbered(20), 8)
    monkeypatch.chdir(tmp_path)
    tokenize("photos", "photos-tokens", [grey], settings={"model": "grey"})
    text = (ROOT / document).read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 3
    namespace = {"__name__": "__main__"}
    for snippet in snippets:
        # Compiled, not evaluated from data: this is our own file, and its promises are the test.
        exec(compile(snippet, document, "exec"), namespace)
    assert "used 2 files" in capsys.readouterr().out
    with iter(namespace["dataset"]) as batches:
        assert next(batches).valid.any()
    if document == "data/README.md":
        assert (tmp_path / "first.png").exists()
        assert (tmp_path / "copy.mp4").exists()
