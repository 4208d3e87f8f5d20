"""The code in the README and the guide runs as it stands, on what the package needs."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("document", "snippets"),
    [
        ("attention/README.md", 1),
        pytest.param("docs/attention.md", 8, marks=pytest.mark.heavy),
    ],
)
def test_every_python_block(document, snippets, monkeypatch):
    from elastictok.attention import _registry

    monkeypatch.setattr(_registry, "_BACKENDS", dict(_registry._BACKENDS))
    blocks = re.findall(r"```(python|text)\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    names: dict[str, object] = {}
    said = io.StringIO()
    for number, (kind, block) in enumerate(blocks):
        if kind == "text":  # what the code before it prints
            assert block == said.getvalue()
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, f"{document}, block {number}", "exec"), names)
    assert sum(kind == "python" for kind, _ in blocks) == snippets
