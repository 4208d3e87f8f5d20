"""The reference values: an excerpt that is always here, and the whole where its folder is.

`ELASTICTOK_PARITY` names the folder; by default it is `../shared/parity` beside the checkout.
"""

import dataclasses
import json
import lzma
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from elastictok.models import ElasticTok, OfficialConfig, load_official

DATA = Path(__file__).parent / "data"
WHOLE = Path(os.environ.get("ELASTICTOK_PARITY", Path(__file__).parents[3] / "shared" / "parity"))


class Reference(NamedTuple):
    """What the official implementation computed.

    - `params`, `config`: its checkpoint and options.
    - `model`: ours with these weights.
    """

    variant: str
    values: dict[str, np.ndarray]
    params: Path
    config: Path
    model: ElasticTok

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    def check(self, name: str, found, atol: float, rows=None) -> None:
        """Compares an array with the reference's, or with the sample of it that is kept.

        `rows` says which of its leading places mean anything; all by default.
        """
        found = np.asarray(found, np.float64)
        within = np.ones(found.shape, bool)
        if rows is not None:
            within &= np.asarray(rows).reshape(*np.shape(rows), *[1] * (found.ndim - np.ndim(rows)))
        if name in self.values:
            assert self.values[name].shape == found.shape, name
        at, wanted = self.entries(name, found.size)
        found, within = found.reshape(-1)[at], within.reshape(-1)[at]
        off = np.abs(found - wanted)[within]
        assert off.size, f"nothing of {name} was compared"
        assert off.max() <= atol, f"{self.variant} {name} is off by {off.max():.3g}"

    def entries(self, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        """What there is of an array of this size: places in it, flat, and the numbers there."""
        if name in self.values:
            return np.arange(size), self.values[name].reshape(-1)
        wanted = self.values[f"{name}:sample"]
        # The stride that the sample was taken with follows from its size.
        stride = next(n for n in range(1, size + 2, 2) if -(-size // n) == wanted.size)
        return np.arange(0, size, stride), wanted


def read_excerpt(path: Path) -> dict[str, np.ndarray]:
    head, _, content = lzma.decompress(path.read_bytes()).partition(b"\n")
    found, at = {}, 0
    for name, dtype, shape in json.loads(head):
        count = int(np.prod(shape))
        found[name] = np.frombuffer(content, dtype, count, at).reshape(shape)
        at += found[name].nbytes
    assert at == len(content)
    return found


@pytest.fixture(scope="session", params=["excerpt", "whole"])
def source(request) -> str:
    if request.param == "whole" and not (WHOLE / "fsq_golden.npz").exists():
        pytest.skip(f"the whole reference is not in {WHOLE}; its excerpt is tested")
    return request.param


@pytest.fixture(scope="session", params=["fsq", "vae"])
def reference(request, source, tmp_path_factory) -> Reference:
    variant = request.param
    params = tmp_path_factory.mktemp("official") / f"{variant}_params_fp32"
    params.write_bytes(lzma.decompress((DATA / f"{params.name}.xz").read_bytes()))
    config = DATA / f"{variant}_config.json"
    excerpt = read_excerpt(DATA / f"{variant}_golden.xz")
    if source == "whole":
        assert params.read_bytes() == (WHOLE / params.name).read_bytes()
        excerpt = {"bf16_sha256": excerpt["bf16_sha256"]} | dict(
            np.load(WHOLE / f"{variant}_golden.npz")
        )
    return Reference(variant, excerpt, params, config, load_official(params, config))


@pytest.fixture(scope="session")
def whole_folder() -> Path:
    return WHOLE


@pytest.fixture(scope="session")
def unclipped(reference) -> ElasticTok:
    """The same model with blocks of 1 token and more: the reference keeps 1 token of one block,
    and what takes lengths instead of masks would raise that to the 4 of the options."""
    config = dataclasses.replace(OfficialConfig.read(reference.config), min_toks=1)
    return load_official(reference.params, config)


@pytest.fixture(scope="session")
def cut():
    """From pixels to tokens by NumPy, apart from the library's own way."""

    def cut(model: ElasticTok, pixels) -> np.ndarray:
        t, h, w = (getattr(model.patching, name) for name in ("frames", "height", "width"))
        pixels = np.asarray(pixels)
        clips, frames, height, width, _ = pixels.shape
        cells = pixels.reshape(clips, frames // t, t, height // h, h, width // w, w, 3)
        return cells.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(clips, -1, t * h * w * 3)

    return cut
