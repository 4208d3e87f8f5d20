"""The snippets of the package's README run."""

import re
from pathlib import Path

from elastictok.data import write_clip, write_picture

README = Path(__file__).parents[2] / "data" / "README.md"


def test_snippets(tmp_path, make, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    write_picture(tmp_path / "photos" / "a.png", make.corners(80, 100))
    write_clip(tmp_path / "photos" / "clip.mp4", make.numbered(20), 8)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        # Compiled, not evaluated from data: this is our own file, and its promises are the test.
        exec(compile(snippet, str(README), "exec"), {"__name__": "__main__"})
    assert "used 2 files" in capsys.readouterr().out
    assert (tmp_path / "first.png").exists()
    assert (tmp_path / "copy.mp4").exists()
