"""The snippets of the package's README and of the guide run."""

import re
from pathlib import Path

import pytest

from elastictok.data import write_clip, write_picture

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["data/README.md", "docs/data.md"])
def test_snippets(document, tmp_path, make, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    write_picture(tmp_path / "photos" / "a.png", make.corners(80, 100))
    write_clip(tmp_path / "photos" / "clip.mp4", make.numbered(20), 8)
    monkeypatch.chdir(tmp_path)
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
