"""`elastictok data tokenize`, and what `inspect` says of token files."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from elastictok.cli import main
from elastictok.data import TokenDataset, load_tokens, write_clip, write_picture
from elastictok.inference import FixedLength, Tokenizer, Tokens
from elastictok.models import CellRotary, CoarseToFine, Patching, load, presets, save
from elastictok.quantizers import FSQ, GaussianVAE

THRESHOLD = 1.13  # which blocks need different numbers of tokens for


def answer(capsys, *arguments):
    """What the program prints when it runs in this process."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refused(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == code
    return capsys.readouterr().err


def make_model(folder, *, seed=0, quantizer=None):
    """16x16 pixels, up to 16 tokens for a block of 2 frames."""
    model = presets.build(
        size=(16, 16),
        context=2,
        frames_per_block=2,
        min_tokens=2,
        patching=Patching(2, 4, 4),
        order=CoarseToFine(),
        quantizer=FSQ((7, 7, 7)) if quantizer is None else quantizer,
        dim=16,
        hidden=16,
        layers=1,
        heads=2,
        rotary=CellRotary(30.0, 100.0),
        place_frequencies=4,
        std=0.4,
        key=jax.random.key(seed),
    )
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Of one size, so that little is compiled: two pictures, two clips, and one that is broken."""
    folder = tmp_path_factory.mktemp("files") / "media"
    (folder / "deep").mkdir(parents=True)
    y, x = np.mgrid[:16, :16]
    for index, name in enumerate(("a.png", "deep/b.png")):
        pixels = np.stack([8 * x + index, 6 * y, 4 * (x + y) * index], axis=-1)
        write_picture(folder / name, pixels.astype(np.uint8))
    for index, name in enumerate(("c.mp4", "deep/d.mp4")):
        clip = [np.stack([8 * x + 9 * t, 6 * y * index, 9 * t + 0 * x], axis=-1) for t in range(5)]
        write_clip(folder / name, np.stack(clip).astype(np.uint8), 8.0)
    (folder / "broken.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "model")


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def command(media, out, model, *more):
    base = ("data", "tokenize", media, out, "--model", model, "--threshold", THRESHOLD)
    return (*base, "--shard-items", 2, "--batch-size", 2, *more)


@pytest.fixture(scope="module")
def whole(media, model, tmp_path_factory):
    """The tokens of the folder, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    main([str(argument) for argument in command(media, out, model)])
    return out


def test_codes_are_those_of_encode(media, model, whole, tmp_path, capsys):
    dataset = TokenDataset(whole)
    assert len(dataset) == len(load_tokens(whole)) == 4
    lengths = set()
    for index in range(4):
        record, out = dataset[index], tmp_path / "x.safetensors"
        path = media.parent / record.key
        answer(capsys, "encode", path, "--model", model, "--threshold", THRESHOLD, "--out", out)
        tokens = Tokens.load(out)
        assert record.codes.tolist() == tokens.codes.tolist()
        assert record.lengths.tolist() == tokens.lengths.tolist()
        np.testing.assert_array_equal(record.losses, tokens.losses)
        for name in ("frames", "height", "width", "original_height", "original_width", "fps"):
            assert getattr(record, name) == getattr(tokens, name)
        for name in ("tokens_per_block", "frames_per_block", "codebook_size", "fingerprint"):
            assert getattr(record, name) == getattr(tokens, name)
        assert record.kind == ("picture" if tokens.picture else "clip")
        lengths.update(record.lengths.tolist())
    assert len(lengths) > 1
    assert "broken.mp4\tcannot be decoded" in (whole / "rejected.tsv").read_text()


def test_jobs_do_as_one(media, model, whole, tmp_path, capsys):
    out = tmp_path / "tokens"
    said = answer(capsys, *command(media, out, model, "--shard", "1/2")).out
    assert "1 of 3 tasks done: run the same command to go on" in said
    said = answer(capsys, *command(media, out, model, "--shard", "0/2")).out
    assert re.search(r"\d+ tokens of 4 pictures and clips; 1 rejected, see", said)
    assert content(out) == content(whole)


def test_what_is_stopped_goes_on(media, model, whole, tmp_path, capsys, monkeypatch):
    out, calls, encode_batch = tmp_path / "tokens", [], Tokenizer.encode_batch

    def stops(self, *given, **named):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_batch(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", stops)
        said = refused(capsys, *command(media, out, model), code=130)
    assert "stopped; run the same command to go on" in said
    assert not (out / "tokens.json").exists()
    assert len(list(out.glob("tokens-*"))) == 1
    answer(capsys, *command(media, out, model))
    assert content(out) == content(whole)


def test_other_models_and_settings_are_refused(media, model, whole, tmp_path, capsys):
    other = make_model(tmp_path / "other", seed=1)
    said = refused(capsys, *command(media, whole, other))
    prints = [Tokenizer(load(m), FixedLength(1)).codec.fingerprint for m in (model, other)]
    assert f"begun with model = {prints[0]}, now it is {prints[1]}" in said
    said = refused(capsys, *command(media, whole, model, "--threshold", 0.2))
    assert "threshold = 1.13, now it is 0.2" in said
    said = refused(capsys, *command(media, whole, model, "--length", 3))
    assert "give either --threshold" in said
    said = refused(capsys, *command(media, whole, model, "--shard", "2/2"))
    assert "must be I/N" in said
    said = refused(capsys, "data", "tokenize", media, tmp_path / "x", "--model", model)
    assert "give either --threshold" in said


def test_a_built_data_set_and_lengths(media, model, tmp_path, capsys):
    answer(capsys, "data", "build", media, "--out", tmp_path / "set")
    base = ("data", "tokenize", tmp_path / "set", tmp_path / "x", "--model", model)
    answer(capsys, *base, "--length", 3, "--fps", 4, "--max-frames", 3)
    dataset = TokenDataset(tmp_path / "x")
    clip = dataset[3]
    assert (clip.kind, clip.frames, clip.fps) == ("clip", 3, 4.0)
    assert clip.lengths.tolist() == [3, 3]
    assert np.concatenate([clip.block(0), clip.block(1)]).tolist() == clip.codes.tolist()


@pytest.mark.heavy
def test_latents(media, tmp_path, capsys):
    vae = make_model(tmp_path / "vae", quantizer=GaussianVAE(3))
    base = ("data", "tokenize", media / "deep", tmp_path / "x", "--model", vae)
    answer(capsys, *base, "--length", 5)
    record = TokenDataset(tmp_path / "x")[0]
    assert (record.codes, record.latents.shape) == (None, (5, 3))


DEVICES = """
import sys, jax
from elastictok.cli import main
from elastictok.inference import Tokenizer
used, encode_batch = set(), Tokenizer.encode_batch
def notes(self, *given, **named):
    used.add(jax.numpy.zeros(1).devices().pop().id)
    weights = {d.id for x in jax.tree.leaves(self) if isinstance(x, jax.Array) for d in x.devices()}
    assert weights <= {jax.numpy.zeros(1).devices().pop().id}, weights
    return encode_batch(self, *given, **named)
Tokenizer.encode_batch = notes
main(sys.argv[1:])
assert used == {0, 1, 2}, used
"""


@pytest.mark.heavy
def test_all_devices_are_used(media, model, whole, tmp_path):
    out = tmp_path / "tokens"
    arguments = [str(a) for a in command(media, out, model, "--batch-size", 1)]
    arguments[arguments.index("--shard-items") + 1] = "9"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    subprocess.run([sys.executable, "-c", DEVICES, *arguments], env=os.environ | flags, check=True)
    ours, theirs = TokenDataset(out), TokenDataset(whole)
    for index in range(4):
        assert ours[index].key == theirs[index].key
        assert ours[index].codes.tolist() == theirs[index].codes.tolist()


def test_inspect(media, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "x.safetensors"
    clip = media / "deep" / "d.mp4"
    answer(capsys, "encode", clip, "--model", model, "--threshold", THRESHOLD, "--out", path)
    tokens = Tokens.load(path)
    said = answer(capsys, "inspect", path).out
    pixels = tokens.frames * tokens.height * tokens.width
    size = path.stat().st_size
    assert f"{size:,} bytes, {8 * size / pixels:.4f} bits per pixel" in said
    assert f"{tokens.bits:,.0f} bits, {tokens.bits / pixels:.4f} bits per pixel" in said
    assert "5 frames, 16x16, 8 frames/s, 0.62 seconds" in said
    low, high, mean = tokens.lengths.min(), tokens.lengths.max(), tokens.lengths.mean()
    assert f"{low} to {high} per block, mean {mean:.1f}" in said
    assert re.search(r"measured +3 of 3 blocks *\n", said)
    assert "first block" not in said
    tokens.select(1, 3).truncate(2).save(path)
    said = answer(capsys, "inspect", path).out
    assert re.search(r"measured +0 of 2 blocks, 2 not", said)
    assert re.search(r"first block +1: a part of a stream", said)
    dataclasses.replace(tokens, fps=None).save(path)
    assert "frames/s not known" in answer(capsys, "inspect", path).out
    # Codes are not read: a fault in them is for who needs them.
    raw = bytearray(path.read_bytes())
    place = raw.index(tokens.codes.astype(np.uint16).tobytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    assert "3 of 3 blocks" in answer(capsys, "inspect", path).out
    out = tmp_path / "y.mp4"
    assert "checksum" in refused(capsys, "decode", path, "--model", model, "--out", out)
    shutil.copy(media / "a.png", path)
    assert "not a safetensors file" in refused(capsys, "inspect", path)
