"""The same data set by a pipeline of Apache Beam, run on this machine."""

import sys

import numpy as np
import pytest

from elastictok.data import build, build_with_beam, write_clip, write_picture

pytestmark = pytest.mark.heavy


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    root = tmp_path_factory.mktemp("beam") / "media"
    (root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 256, (20 + index, 30, 3)).astype(np.uint8)
        write_picture(root / "sub" / f"{index}.png", pixels)
    write_clip(root / "a.mp4", rng.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8), 8)
    (root / "bad.jpg").write_text("no")
    return root


def test_records_are_identical(media, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    settings = {"shard_bytes": 4000, "licence": "CC0-1.0"}
    build(media, tmp_path / "expected", **settings)
    built = build_with_beam(media, tmp_path / "out", runner="DirectRunner", **settings)
    assert built.complete
    assert built.records == {"pictures": 8, "clips": 1}
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert len([name for name in contents(tmp_path / "out") if "arrayrecord" in name]) > 3
    # A second run finds nothing left to do.
    again = build_with_beam(media, tmp_path / "out", runner="DirectRunner", **settings)
    assert again == built


def test_a_begun_build_is_completed(media, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    build(media, tmp_path / "expected", shard_bytes=4000)
    assert not build(media, tmp_path / "out", shard_bytes=4000, shard=(0, 2)).complete
    options = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    assert build_with_beam(media, tmp_path / "out", shard_bytes=4000, options=options).complete
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_without_beam_it_says_what_to_install(media, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(RuntimeError, match=r"elastictok\[beam\]"):
        build_with_beam(media, tmp_path / "out")
