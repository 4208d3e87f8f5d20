"""Data sets of tokens: records, shards, resumption, and reading by Grain. No model: codes are made
from the pixels here."""

import copy
import dataclasses
import json
import os
import shutil
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.data import (
    TOKEN_INDEX,
    MediaError,
    TokenDataset,
    TokenRecord,
    build,
    load_tokens,
    read_media,
    tokenize,
    write_clip,
    write_picture,
)

SETTINGS = {"model": "a model", "length": 3}


def make_record(lengths=(3, 1, 2), codebook_size=300, row=(), seed=0, **changes):
    rng = np.random.default_rng(seed)
    shape = (sum(lengths), *row)
    continuous = codebook_size is None
    codes = None if continuous else rng.integers(0, codebook_size, shape).astype(np.int32)
    fields = {
        "key": "media/deep/clip.mp4",
        "kind": "clip",
        "codes": codes,
        "latents": rng.normal(size=shape).astype(np.float32) if continuous else None,
        "lengths": np.array(lengths, np.int32),
        "losses": np.where(rng.random(len(lengths)) < 0.3, np.nan, rng.random(len(lengths))),
        "frames": 2 * len(lengths) - 1,
        "height": 16,
        "width": 24,
        "original_height": 40,
        "original_width": 60,
        "tokens_per_block": 16,
        "frames_per_block": 2,
        "window": 3,
        "fps": 12.5,
        "missing": 0,
        "codebook_size": codebook_size,
        "fingerprint": "a model",
    }
    return TokenRecord(**{**fields, **changes})


def assert_same(a, b):
    for field in dataclasses.fields(TokenRecord):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if isinstance(ours, np.ndarray):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes(), field.name
        else:
            assert ours == theirs, field.name


RECORDS = st.builds(
    make_record,
    st.lists(st.integers(1, 16), min_size=1, max_size=5),
    st.sampled_from([None, 1, 255, 256, 257, 65536, 65537, 2**31]),
    st.just((2,)),
    st.integers(0, 99),
    key=st.text(),
) | st.builds(make_record, codebook_size=st.integers(1, 2**31), fps=st.floats(0.1, 900))


@given(RECORDS)
def test_a_record_comes_back(record):
    stored = record.to_bytes()
    assert_same(TokenRecord.from_bytes(stored, "x"), record)
    row = record.values.shape[1] if record.values.ndim == 2 else 1
    size = record.codebook_size or 2**32
    width = 1 if size <= 256 else 2 if size <= 65536 else 4
    header = struct.unpack("<I", stored[:4])[0]
    assert len(stored) == 4 + header + 12 * record.blocks + len(record.values) * row * width
    blocks = [record.block(i) for i in range(record.blocks)]
    assert np.concatenate(blocks).tobytes() == record.values.tobytes()
    assert [len(block) for block in blocks] == record.lengths.tolist()


def test_a_picture_has_no_rate():
    record = make_record((4,), kind="picture", fps=None, frames=1)
    assert_same(TokenRecord.from_bytes(record.to_bytes(), "x"), record)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "picture"}, "clips have it, pictures do not"),
        ({"fps": None}, "clips have it, pictures do not"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"frames": 0}, "frames is 0; it must be 1 to"),
        ({"frames": 9}, "for 5 blocks"),
        ({"missing": -1}, "missing is -1"),
        ({"lengths": np.array([3, 0, 3], np.int32)}, "lengths from 0 to 3"),
        ({"lengths": np.array([3, 1, 3], np.int32)}, "lengths that sum to 7"),
        ({"tokens_per_block": 2}, "1 to 2 tokens"),
        ({"codebook_size": 2}, "code book of 2"),
        ({"codebook_size": None}, "codebook_size goes with codes"),
        ({"codes": None}, "one of them"),
        ({"codes": np.zeros(6, np.float32)}, "must be integers"),
        ({"codes": np.full(6, -1, np.int32)}, "codes from -1"),
        ({"codes": np.zeros((6, 0), np.int32)}, "shape"),
    ],
)
def test_contradictions(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(make_record(), **changes)


def forged(record, **changes):
    """A record whose description lies."""
    stored = record.to_bytes()
    size = struct.unpack("<I", stored[:4])[0]
    facts = {**json.loads(stored[4 : 4 + size]), **changes}
    header = json.dumps({k: v for k, v in facts.items() if v != "absent"}).encode()
    return struct.pack("<I", len(header)) + header + stored[4 + size :]


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 2**31 - 1},
        {"frames": 2**62},
        {"frames": 5.0},
        {"frames": True},
        {"frames": 3},
        {"frames_per_block": 1},
        {"row": [2**31 - 1]},
        {"row": [2]},
        {"row": [0]},
        {"row": [1, 1]},
        {"row": None},
        {"row": "2"},
        {"codebook_size": None},
        {"codebook_size": 70_000},
        {"codebook_size": 257},
        {"codebook_size": 2**40},
        {"kind": "hologram"},
        {"key": 3},
        {"key": "absent"},
        {"extra": 1},
        {"fps": "fast"},
        {"fingerprint": None},
        {"tokens_per_block": 1},
    ],
)
def test_descriptions_that_lie(changes):
    record = make_record(codes=np.array([299, 0, 1, 257, 3, 4], np.int32))
    with pytest.raises(MediaError, match=r"^x: its record is damaged"):
        TokenRecord.from_bytes(forged(record, **changes), "x")


def test_latents_that_are_not_numbers():
    record = make_record(codebook_size=None, row=(2,))
    stored = record.to_bytes()[:-4] + np.float32(np.inf).tobytes()
    with pytest.raises(MediaError, match="not finite"):
        TokenRecord.from_bytes(stored, "x")


def test_every_truncation():
    stored = make_record().to_bytes()
    for length in range(len(stored)):
        with pytest.raises(MediaError):
            TokenRecord.from_bytes(stored[:length], "x")
    with pytest.raises(MediaError):
        TokenRecord.from_bytes(stored + b"\0", "x")


@given(st.binary(max_size=80))
def test_noise(noise):
    with pytest.raises(MediaError):
        TokenRecord.from_bytes(noise, "x")


def test_a_key_without_end():
    with pytest.raises(MediaError, match="shorten it"):
        make_record(key="x" * 2**16).to_bytes()


def encode(batch):
    """One block a frame: its first pixels are its codes, from one to four of them."""
    records = []
    for key, clip in batch:
        lengths = 1 + clip.frames[:, 0, 0, 0].astype(np.int32) % 4
        pixels = clip.frames.reshape(len(clip.frames), -1)
        codes = [row[:length] for row, length in zip(pixels, lengths, strict=True)]
        records.append(
            TokenRecord(
                key=key,
                kind="picture" if clip.picture else "clip",
                codes=np.concatenate(codes).astype(np.int32),
                latents=None,
                lengths=lengths,
                losses=np.full(len(lengths), np.nan),
                frames=len(clip.frames),
                height=clip.frames.shape[1],
                width=clip.frames.shape[2],
                original_height=clip.frames.shape[1],
                original_width=clip.frames.shape[2],
                tokens_per_block=4,
                frames_per_block=1,
                window=1,
                fps=clip.fps,
                missing=clip.missing,
                codebook_size=256,
                fingerprint="a model",
            )
        )
    return records


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Nine pictures and clips, a clip that is cut, and three files that cannot be used."""
    folder = tmp_path_factory.mktemp("material") / "media"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(6):
        shape = (8 + index, 12, 3)
        write_picture(folder / f"p{index}.png", rng.integers(0, 256, shape).astype(np.uint8))
    for index in range(3):
        frames = rng.integers(0, 256, (3 + index, 16, 16, 3)).astype(np.uint8)
        write_clip(folder / "deep" / f"c{index}.mp4", frames, 8.0)
    (folder / "deep" / "bad.png").write_bytes(b"no picture")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def content(folder):
    """Every file and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(media, tmp_path_factory):
    """The tokens of the folder, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    made = tokenize(media, out, [encode], settings=SETTINGS, shard_items=4, batch_size=3)
    assert (made.complete, made.records, made.rejected, made.tasks) == (True, 9, 3, 3)
    return out


def test_all_is_there(media, whole):
    dataset = TokenDataset(whole)
    assert len(dataset) == 9
    assert dataset.fingerprint == "a model"
    keys = [dataset.key(index) for index in range(9)]
    expected = [f"media/deep/c{i}.mp4" for i in range(3)] + [f"media/p{i}.png" for i in range(6)]
    assert keys == expected
    for index, key in enumerate(keys):
        record = dataset[index]
        assert record.key == key
        clip = read_media(media.parent / key)
        (again,) = encode([(key, clip)])
        assert_same(record, again)
        row = dataset.index[index]
        assert (row["kept"], row["blocks"]) == (len(record.codes), record.blocks)
        assert (row["frames"], row["fps"]) == (record.frames, record.fps or 0)
    assert dataset.index.dtype == TOKEN_INDEX
    assert dataset.description["tokens"] == dataset.index["kept"].sum()
    rejected = (whole / "rejected.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in rejected] == [
        "key",
        "media/deep/bad.png",
        "media/empty.mp4",
        "media/gone.jpg",
    ]
    for index in (-1, 9):
        with pytest.raises(IndexError):
            dataset[index]
    assert sorted(content(whole)) == [
        "damaged.tsv",
        "rejected.tsv",
        "tokens-00000.arrayrecord",
        "tokens-00001.arrayrecord",
        "tokens-00002.arrayrecord",
        "tokens.index",
        "tokens.json",
        "tokens.keys",
    ]


def test_a_built_data_set_gives_the_same_records(media, whole, tmp_path):
    build(media, tmp_path / "set", shard_bytes=2000)
    made = tokenize(tmp_path / "set", tmp_path / "tokens", [encode], settings=SETTINGS)
    assert (made.records, made.rejected) == (9, 0)
    ours, theirs = TokenDataset(tmp_path / "tokens"), TokenDataset(whole)
    places = {ours.key(index): index for index in range(9)}
    for index in range(9):
        assert_same(ours[places[theirs.key(index)]], theirs[index])


def test_frames_that_are_asked_for(media, tmp_path):
    tokenize(media, tmp_path / "x", [encode], settings=SETTINGS, fps=4, max_frames=2)
    dataset = TokenDataset(tmp_path / "x")
    assert {(r.frames, r.fps) for r in map(dataset.__getitem__, range(9))} == {(1, None), (2, 4.0)}


def options(media, out):
    return {"data": media, "out": out, "settings": SETTINGS, "shard_items": 4, "batch_size": 3}


def test_jobs_make_one_data_set_together(media, whole, tmp_path):
    out = tmp_path / "x"
    made = tokenize(**options(media, out), encoders=[encode], shard=(1, 2))
    assert (made.complete, made.done, made.tasks) == (False, 1, 3)
    assert "1 of 3 tasks done: run the same command to go on" in str(made)
    with pytest.raises(MediaError, match="not complete; run the same `elastictok data tokenize`"):
        TokenDataset(out)
    assert tokenize(**options(media, out), encoders=[encode], shard=(0, 2)).complete
    assert content(out) == content(whole)
    # All is done: no encoder is asked.
    assert tokenize(**options(media, out), encoders=[]).records == 9


@pytest.mark.parametrize("batches", range(4))
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_is_interrupted_goes_on(media, whole, tmp_path, batches, error):
    out, count = tmp_path / "x", iter(range(100))

    def fails(batch):
        if next(count) == batches:
            raise error
        return encode(batch)

    with pytest.raises(error):
        tokenize(**options(media, out), encoders=[fails])
    assert not (out / "tokens.json").exists()
    assert not list(out.glob(".*.tmp"))
    # A stranger's half-written file, as a kill leaves it.
    (out / ".tokens-00001.arrayrecord-x.tmp").write_bytes(b"half")
    assert tokenize(**options(media, out), encoders=[encode]).complete
    assert content(out) == content(whole)


@pytest.mark.parametrize("place", range(1, 20))
def test_killed_anywhere(media, whole, tmp_path, monkeypatch, place):
    """Whatever file was to be renamed next is not."""
    out, replace, count = tmp_path / "x", os.replace, iter(range(1, 100))

    def dies(source, target):
        if next(count) == place:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            tokenize(**options(media, out), encoders=[encode])
    assert tokenize(**options(media, out), encoders=[encode]).complete
    assert content(out) == content(whole)


def test_several_encoders_work_at_once(media, whole, tmp_path):
    # Each waits for the other: one alone would never end.
    barrier = threading.Barrier(2, timeout=20)
    used = []

    def one(which):
        def work(batch):
            used.append(which)
            if len(used) <= 2:
                barrier.wait()
            return encode(batch)

        return work

    given = options(media, tmp_path / "x") | {"batch_size": 2}
    tokenize(**given, encoders=[one(0), one(1)])
    assert {*used} == {0, 1}
    assert content(tmp_path / "x") == content(whole)


def test_records_keep_their_order(media, whole, tmp_path):
    def slow(batch):
        time.sleep(0.03)
        return encode(batch)

    given = {"settings": SETTINGS, "batch_size": 1}
    tokenize(media, tmp_path / "x", [slow, encode, encode], **given)
    ours, theirs = TokenDataset(tmp_path / "x"), TokenDataset(whole)
    for index in range(9):
        assert_same(ours[index], theirs[index])


def test_batches_are_no_larger_than_asked(media, tmp_path):
    sizes = []

    def counts(batch):
        sizes.append(len(batch))
        return encode(batch)

    tokenize(media, tmp_path / "x", [counts], settings=SETTINGS, batch_size=4)
    assert sizes == [4, 4, 1]


def test_progress_grows_to_the_end(media, tmp_path):
    told = []
    tokenize(media, tmp_path / "x", [encode], settings=SETTINGS, progress=told.append)
    last = told[-1]
    assert (last.files, last.all_files, last.rejected) == (12, 12, 3)
    assert last.bytes == last.all_bytes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"settings": {**SETTINGS, "model": "another"}}, "model = a model, now it is another"),
        ({"settings": {**SETTINGS, "length": 4}}, "length = 3, now it is 4"),
        ({"fps": 3.0}, "fps = None, now it is 3.0"),
        ({"max_frames": 3}, "max_frames = None, now it is 3"),
        ({"shard_items": 5}, "shard_items = 4, now it is 5"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused(media, whole, tmp_path, complete, changes, says):
    out = whole
    if not complete:
        out = tmp_path / "x"
        tokenize(**options(media, out), encoders=[encode], shard=(1, 2))
    before = content(out)
    with pytest.raises(MediaError, match=f"the tokens in it were begun with {says}"):
        tokenize(**{**options(media, out), **changes}, encoders=[encode])
    assert content(out) == before


def test_other_data_are_refused(media, whole, tmp_path):
    other = tmp_path / "media"
    shutil.copytree(media, other, symlinks=True)
    with pytest.raises(MediaError, match=f"data = {media}, now it is {other}"):
        tokenize(**options(other, whole), encoders=[encode])
    build(media, tmp_path / "set")
    tokenize(tmp_path / "set", tmp_path / "x", [encode], settings=SETTINGS)
    shutil.rmtree(tmp_path / "set")
    build(media / "deep", tmp_path / "set")
    with pytest.raises(MediaError, match="begun with content ="):
        tokenize(tmp_path / "set", tmp_path / "x", [encode], settings=SETTINGS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shard": (2, 2)}, "shard is"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_items": 0}, "shard_items is 0"),
        ({"data": "nowhere"}, "no such file or folder"),
    ],
)
def test_what_cannot_be(media, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        tokenize(**{**options(media, tmp_path / "x"), **changes}, encoders=[encode])
    assert not (tmp_path / "x").exists()


def test_folders_that_do_not_fit(media, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(MediaError, match="neither a built data set nor a folder of pictures"):
        tokenize(tmp_path / "x", tmp_path / "y", [encode], settings=SETTINGS)
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(MediaError, match="holds other files, such as mine"):
        tokenize(media, tmp_path / "x", [encode], settings=SETTINGS)
    with pytest.raises(MediaError, match="lies in"):
        tokenize(media, media / "tokens", [encode], settings=SETTINGS)
    with pytest.raises(MediaError, match="make one by `elastictok data tokenize"):
        TokenDataset(media)


def test_damage_is_named(whole, tmp_path):
    out = tmp_path / "x"
    shutil.copytree(whole, out)
    shard = out / "tokens-00001.arrayrecord"
    raw = bytearray(shard.read_bytes())
    record = TokenDataset(whole)[4].to_bytes()
    raw[raw.index(record) + len(record) - 1] ^= 1
    shard.write_bytes(raw)
    dataset = TokenDataset(out)
    with pytest.raises(MediaError, match=r"p1.png: its record is damaged; tokenize again"):
        dataset[4]
    assert_same(dataset[0], TokenDataset(whole)[0])
    shard.write_bytes(raw[:-1])
    with pytest.raises(MediaError, match="1 of 3 shards of tokens are missing or cut"):
        TokenDataset(out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c | {"version": 2}, "of version 2, and this elastictok reads 1"),
        (lambda c: c | {"format": "x"}, "damaged"),
        (lambda c: c | {"records": 8}, "damaged"),
        (lambda c: c | {"settings": {}}, "damaged"),
        (lambda c: c | {"shards": [s | {"file": "../x"} for s in c["shards"]]}, "damaged"),
        (lambda c: [c], "damaged"),
    ],
)
def test_descriptions_of_data_sets_that_lie(whole, tmp_path, change, says):
    shutil.copytree(whole, tmp_path / "x")
    path = tmp_path / "x" / "tokens.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(MediaError, match=says):
        TokenDataset(tmp_path / "x")


def test_grain_reads_records(whole):
    tokens = load_tokens(whole)
    dataset = TokenDataset(whole)
    assert len(tokens) == 9
    for index in range(9):
        assert_same(tokens[index], dataset[index])
    shuffled = tokens.shuffle(seed=3)[1::2].repeat(2)
    keys = [record.key for record in shuffled]
    assert len(keys) == 8
    assert {*keys} < {dataset.key(index) for index in range(9)}
    lengths = tokens.map(lambda record: len(record.codes))
    assert list(lengths) == dataset.index["kept"].tolist()
    # The state of an iterator is Grain's, and so exact.
    stream = iter(tokens.shuffle(seed=1).to_iter_dataset())
    for _ in range(4):
        next(stream)
    state = stream.get_state()
    rest = [record.key for record in stream]
    again = iter(tokens.shuffle(seed=1).to_iter_dataset())
    again.set_state(state)
    assert [record.key for record in again] == rest
    assert len(rest) == 5


def test_a_data_set_goes_to_a_worker(whole):
    dataset = copy.copy(TokenDataset(whole))  # made anew from what pickle would keep
    assert_same(dataset[3], TokenDataset(whole)[3])
    dataset.close()
    assert_same(dataset[3], TokenDataset(whole)[3])
