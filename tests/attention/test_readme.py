"""The code in the package's README runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "attention" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_every_python_block(monkeypatch):
    from elastictok.attention import _registry

    monkeypatch.setattr(_registry, "_BACKENDS", dict(_registry._BACKENDS))
    assert len(BLOCKS) == 3
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS):
        code = compile(block, f"{README.name}, block {number}", "exec")
        exec(code, names)
