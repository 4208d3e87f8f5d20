"""The reference values: an excerpt that is always here, and the whole where its folder is.

`ELASTICTOK_PARITY` names the folder; by default it is `../shared/parity` beside the checkout.
"""

import json
import lzma
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from elastictok.models import ElasticTok, load_official

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
            wanted = self.values[name]
            assert wanted.shape == found.shape, name
        else:
            wanted = self.values[f"{name}:sample"]
            # The stride that the sample was taken with follows from its size.
            stride = next(
                n for n in range(1, found.size + 2, 2) if -(-found.size // n) == wanted.size
            )
            found, within = found.reshape(-1)[::stride], within.reshape(-1)[::stride]
        off = np.abs(found - wanted)[within]
        assert off.size, f"nothing of {name} was compared"
        assert off.max() <= atol, f"{self.variant} {name} is off by {off.max():.3g}"


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
