"""The Python in README files and docs runs as it stands."""

import contextlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
# These packages run their READMEs and guides themselves, on what they need.
ELSEWHERE = {"attention", "data", "eval"}
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
    if "```python" in path.read_text() and not {path.parent.name, path.stem} & ELSEWHERE
)


def test_there_is_something_to_run():
    assert Path("README.md") in DOCUMENTS


# Trains, which takes half a minute.
SLOW = {"generators"}


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, marks=[pytest.mark.heavy] if path.stem in SLOW else [], id=str(path))
        for path in DOCUMENTS
    ],
)
def test_snippets_run_in_order(document, tmp_path, monkeypatch):
    import jax

    from elastictok.data import write_picture
    from elastictok.models import presets

    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        write_picture(
            tmp_path / "photos" / f"{i}.png", rng.integers(0, 256, (90, 70, 3)).astype(np.uint8)
        )
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippet"}
    if document.parent.name == "inference":  # speaks of a model and frames that the reader has
        namespace["model"] = presets.demo(key=jax.random.key(0))
        namespace["frames"] = rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S):
        # Training is cut short; nothing else is changed.
        snippet = re.sub(r"steps=\d[\d_]*", "steps=2", snippet)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(snippet, str(document), "exec"), namespace)
    assert os.getcwd() == str(tmp_path)
