"""`Tokens` and token files."""

import hashlib
import io
import itertools
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import Codes, Latents, TokenFile, TokenFileError, Tokens

KINDS = st.one_of(
    st.builds(
        Codes,
        st.sampled_from([1, 2, 255, 256, 257, 65536, 65537, 2**31]),
        st.none() | st.integers(1, 3),
    ),
    st.builds(Latents, st.integers(1, 3)),
)
PASSES = st.integers(0, 3) | st.sampled_from([255, 256, 2**31 - 1])
LENGTHS = st.lists(st.integers(2, 16), min_size=1, max_size=5)


@st.composite
def tokens(draw, make_tokens):
    """Any `Tokens`: extreme numbers, unmeasured blocks, pictures."""
    lengths, kind = draw(LENGTHS), draw(KINDS)
    blocks = len(lengths)
    picture = blocks == 1 and draw(st.booleans())
    measured = np.array(draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)))
    losses = np.array(draw(st.lists(st.floats(), min_size=blocks, max_size=blocks)))
    losses = np.where(measured, losses, np.nan)
    seed = draw(st.integers(0, 99))
    made = make_tokens(
        lengths,
        kind,
        seed,
        losses=losses,
        monotone=measured & (np.random.default_rng(seed).random(blocks) < 0.5),
        measured=measured,
        met=losses < draw(st.floats(allow_nan=False)),
        encoder_evaluations=np.array(draw(st.lists(PASSES, min_size=blocks, max_size=blocks))),
        decoder_evaluations=np.array(draw(st.lists(PASSES, min_size=blocks, max_size=blocks))),
        first_block=draw(st.sampled_from([0, 0, 1, 7, 2**40])),
        fps=draw(st.none() | st.floats(0, exclude_min=True, allow_infinity=False)),
        picture=picture,
        frames=1 if picture else 2 * blocks - draw(st.integers(0, 1)),
        fingerprint=draw(st.text(st.characters(codec="utf-8"), min_size=1)),
    )
    if draw(st.booleans()) and isinstance(kind, Codes):
        edge = made.codes.copy()
        edge[0], edge[-1] = 0, kind.codebook_size - 1
        made = replace(made, codes=edge)
    return made


def replace(tokens, /, **changes):
    return Tokens(**{**vars(tokens), **changes})


@given(st.data())
def test_round_trip(make_tokens, tmp_path_factory, data):
    made = data.draw(tokens(make_tokens))
    path = tmp_path_factory.mktemp("tokens") / "x.safetensors"
    made.save(path)
    back = Tokens.load(path)
    assert back == made
    assert back.seconds is None
    for name, value in vars(made).items():
        if isinstance(value, np.ndarray) and name != "seconds":
            assert getattr(back, name).dtype == value.dtype
            assert getattr(back, name).tobytes() == value.tobytes()
        elif name != "seconds":
            assert getattr(back, name) == value
            assert type(getattr(back, name)) is type(value)
    again = path.with_name("y.safetensors")
    back.save(str(again))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, "u1"), (255, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (2**31, "u4")],
)
@pytest.mark.parametrize("streams", [None, 2])
def test_smallest_integers(make_tokens, tmp_path, size, dtype, streams):
    made = make_tokens(kind=Codes(size, streams))
    codes = made.codes.copy()
    codes[0], codes[-1] = size - 1, 0
    made = replace(made, codes=codes)
    made.save(tmp_path / "x")
    stored = safetensors.numpy.load_file(tmp_path / "x")["codes"]
    assert stored.dtype == np.dtype(dtype)
    assert stored.tolist() == codes.tolist()
    assert Tokens.load(tmp_path / "x") == made


@pytest.fixture(scope="module")
def small_file(make_tokens, tmp_path_factory):
    """Some tokens, their file's bytes, and a loader of other bytes."""
    made = make_tokens((3, 2), Codes(300))
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    made.save(path)
    raw = path.read_bytes()

    def load(changed):
        path.write_bytes(changed)
        return Tokens.load(path)

    assert load(raw) == made
    return made, raw, load


def assert_refused_or_equal(small_file, changed):
    made, _, load = small_file
    try:
        back = load(changed)
    except TokenFileError as error:
        assert "x.safetensors" in str(error)
    else:
        assert back == made


def test_flipped_bits(small_file):
    raw = small_file[1]
    for index in range(len(raw)):
        for bit in range(8) if index < 40 else [index % 8]:
            changed = bytearray(raw)
            changed[index] ^= 1 << bit
            assert_refused_or_equal(small_file, bytes(changed))


def test_flipped_bits_of_the_body_are_seen(small_file):
    _, raw, load = small_file
    body = 8 + int.from_bytes(raw[:8], "little")
    for index in range(body, len(raw)):
        changed = bytearray(raw)
        changed[index] ^= 1 << (index % 8)
        with pytest.raises(TokenFileError):
            load(bytes(changed))


def test_every_truncation(small_file):
    _, raw, load = small_file
    for length in range(len(raw)):
        with pytest.raises(TokenFileError):
            load(raw[:length])
    with pytest.raises(TokenFileError):
        load(raw + b"\0")


@given(st.data())
def test_random_damage(small_file, data):
    changed = bytearray(small_file[1])
    for _ in range(data.draw(st.integers(1, 6))):
        index = data.draw(st.integers(0, len(changed) - 1))
        changed[index] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(changed)))
    end = data.draw(st.integers(start, min(len(changed), start + 4)))
    changed[start:end] = data.draw(st.binary(max_size=4))
    assert_refused_or_equal(small_file, bytes(changed))


@given(st.binary(max_size=200))
def test_noise(small_file, noise):
    with pytest.raises(TokenFileError):
        small_file[2](noise)


def forge(raw, *, facts=None, arrays=None, about=None, metadata=None):
    """A file with changes and a checksum that is right: damage done on purpose.

    Written from the format's description in the package's README.md.
    """
    size = int.from_bytes(raw[:8], "little")
    old = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["elastictok.tokens"])
    assert old["version"] == 1
    facts = {**old["facts"], **(facts or {})}
    tensors = {**safetensors.numpy.load(raw), **(arrays or {})}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    if "checksums" not in (arrays or {}):
        tensors["checksums"] = forge_checksums(tensors)
    whole, index = hashlib.sha256(), hashlib.sha256()
    parts = [(json.dumps(facts, sort_keys=True).encode(), True)]
    for name in sorted(tensors):
        array = tensors[name]
        parts.append((json.dumps([name, array.dtype.str, list(array.shape)]).encode(), True))
        parts.append((array.tobytes(), name not in ("codes", "latents")))
    for part, indexed in parts:
        for digest in (whole, index) if indexed else (whole,):
            digest.update(len(part).to_bytes(8, "little") + part)
    new = {"sha256": whole.hexdigest(), "sha256_index": index.hexdigest()}
    new = {"version": 1, "facts": facts, **new, **(about or {})}
    if metadata is None:
        metadata = {"elastictok.tokens": json.dumps(new, sort_keys=True)}
    return safetensors.numpy.save(tensors, metadata=metadata)


def forge_checksums(tensors):
    """Of blocks whose lengths make sense, else of nothing."""
    values = tensors.get("codes", tensors.get("latents"))
    lengths = tensors["lengths"].reshape(-1).astype(np.int64)
    blocks, start = [], 0
    for length in lengths.tolist() if values is not None and values.ndim else []:
        blocks.append(zlib.crc32(values[start : start + length].tobytes()))
        start += length
    return np.array(blocks, np.uint32)


def test_the_format_is_as_described(small_file):
    made, raw, load = small_file
    assert load(forge(raw)) == made
    assert forge(raw) == raw


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"version": 2}, "version 2 of the format; this elastictok reads version 1"),
        ({"version": "1"}, "no version"),
        ({"version": True}, "no version"),
        ({"version": None}, "no version"),
        ({"sha256": "0" * 64}, "checksum"),
        ({"sha256": None}, "checksum"),
        ({"sha256_index": "0" * 64}, "checksum"),
        ({"sha256_index": None}, "checksum"),
        ({"facts": []}, "checksum"),
        ({"facts": {}}, "checksum"),
    ],
)
def test_future_and_damaged_files(small_file, about, says):
    _, raw, load = small_file
    with pytest.raises(TokenFileError, match=says):
        load(forge(raw, about=about))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "not written by Tokens.save"),
        ({"format": "pt"}, "not written by Tokens.save"),
        ({"elastictok.tokens": "[" * 100_000}, "not JSON"),
        ({"elastictok.tokens": '{"version": 1'}, "not JSON"),
        ({"elastictok.tokens": "[1]"}, "no version"),
    ],
)
def test_foreign_files(small_file, metadata, says):
    _, raw, load = small_file
    with pytest.raises(TokenFileError, match=says):
        load(forge(raw, metadata=metadata))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"frames": 2**62}, "frames is"),
        ({"frames": 9}, "5 blocks"),
        ({"frames": 0}, "frames is 0"),
        ({"frames": True}, "frames is True"),
        ({"frames": 3.0}, "frames is 3.0"),
        ({"height": -1}, "height is -1"),
        ({"width": 2**40}, "width is"),
        ({"original_width": 2**40}, "original_width is"),
        ({"window": 2**40}, "window is"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": 25}, "fps is 25"),
        ({"kind": "picture"}, "a picture has 1 frame"),
        ({"kind": "hologram"}, "hologram"),
        ({"kind": None}, "kind is None"),
        ({"codebook_size": None}, "codebook_size"),
        ({"codebook_size": 2**40}, "codebook_size"),
        ({"codebook_size": 2}, "code book of 2"),
        ({"bits_per_token": None}, "bits_per_token"),
        ({"bits_per_token": -1.0}, "bits_per_token"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"fingerprint": ["x"]}, "fingerprint"),
        ({"min_tokens": 3}, "3 to 16"),
        ({"tokens_per_block": 2}, "2 to 2"),
        ({"extra": 1}, "extra"),
        ({"first_block": -1}, "first_block is -1"),
        ({"first_block": 2**41}, "first_block is"),
        ({"first_block": None}, "first_block is None"),
        ({"first_block": 1.0}, "first_block is 1.0"),
    ],
)
def test_facts_that_lie(small_file, facts, says):
    _, raw, load = small_file
    with pytest.raises(TokenFileError, match=says):
        load(forge(raw, facts=facts))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"lengths": np.array([3, 3], np.uint8)}, "sum to 6"),
        ({"lengths": np.array([5], np.uint8)}, "lengths has shape"),
        ({"lengths": np.array([3.0, 2.0], np.float32)}, "lengths of type float32"),
        ({"lengths": np.array([2**32 - 1, 2**31], np.uint32)}, "lengths of type uint32"),
        ({"lengths": np.array([[3, 2]], np.uint8)}, "lengths has shape"),
        ({"codes": np.array([0, 1, 2, 3, 300], np.uint16)}, "300"),
        ({"codes": np.zeros((5, 0), np.uint16)}, "shape"),
        ({"codes": np.zeros((), np.uint16)}, "shape"),
        ({"codes": np.zeros(5, np.float32)}, "codes of type"),
        ({"codes": np.zeros(5, np.int64)}, "type I64"),
        ({"codes": None}, "codes"),
        ({"latents": np.zeros((5, 2), np.float32)}, "codes"),
        ({"losses": None}, "losses"),
        ({"losses": np.array([np.nan, np.nan])}, "loss"),
        ({"met": np.array([1, 0], np.uint8)}, "met of type"),
        ({"seconds": np.zeros(2)}, "seconds"),
        ({"codes": np.zeros(5, np.bool_)}, "codes of type bool"),
        ({"checksums": None}, "checksums"),
        ({"checksums": np.zeros(2, np.uint32)}, "block 0 does not have the checksum"),
        ({"checksums": np.zeros(3, np.uint32)}, "checksums of type uint32 have shape"),
        ({"checksums": np.zeros(2, np.uint8)}, "checksums of type uint8"),
        ({"measured": None}, "measured"),
        ({"measured": np.zeros(2, np.bool_)}, "was not measured, but"),
    ],
)
def test_arrays_that_lie(small_file, arrays, says):
    _, raw, load = small_file
    if "losses" in arrays:
        raw = forge(raw, arrays={"met": np.ones(2, np.bool_), "losses": np.zeros(2)})
    with pytest.raises(TokenFileError, match=says):
        load(forge(raw, arrays=arrays))


@pytest.mark.parametrize("shape", [[0], [0, 2**62], [2**62, 0, 2**62], []])
def test_shapes_that_no_tokens_have(small_file, shape):
    _, raw, load = small_file
    raw = forge(raw, arrays={"codes": np.zeros(0, np.uint16)})
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["codes"]["shape"] = shape
    text = json.dumps(header).encode()
    with pytest.raises(TokenFileError):
        load(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_truth_values_that_are_neither(small_file):
    made, raw, load = small_file
    stored = made.met.astype(np.uint8) + 6
    with pytest.raises(TokenFileError, match="neither 0 nor 1"):
        load(forge(raw, arrays={"met": stored.view(np.bool_)}))


@given(st.data())
def test_single_blocks(make_tokens, tmp_path_factory, data):
    made = data.draw(tokens(make_tokens))
    path = tmp_path_factory.mktemp("tokens") / "x.safetensors"
    made.save(path)
    start = data.draw(st.integers(0, made.blocks - 1))
    stop = data.draw(st.integers(start + 1, made.blocks))
    with TokenFile(path) as file:
        assert len(file) == file.index.blocks == made.blocks
        for index in data.draw(st.permutations(range(-made.blocks, made.blocks))):
            block = file.block(index)
            assert (block.dtype, block.shape) == (made.values.dtype, made.block(index).shape)
            assert block.tobytes() == made.block(index).tobytes()
            assert not block.flags.writeable
        assert file.tokens() == made
        if made.first_block + start <= 2**40:
            assert file.select(start, stop) == made.select(start, stop)
        for name in ("bits", "kind", "shortest", "blocks", "picture", "first_block", "fps"):
            assert getattr(file.index, name) == getattr(made, name)
        for name in ("lengths", "losses", "met", "monotone", "measured", "evaluations"):
            np.testing.assert_array_equal(getattr(file.index, name), getattr(made, name))
        assert file.index.kept == len(made.values)
        with pytest.raises(IndexError):
            file.block(made.blocks)
        with pytest.raises(IndexError):
            file.block(-made.blocks - 1)
        with pytest.raises(ValueError, match=f"of {made.blocks}; give"):
            file.select(0, made.blocks + 1)
    with pytest.raises(ValueError, match="closed"):
        file.block(0)


@pytest.fixture
def count_read(monkeypatch):
    """Bytes read from files that are opened while this is there."""

    class Counting(io.FileIO):
        bytes = 0

        def readinto(self, buffer):
            count = super().readinto(buffer)
            Counting.bytes += count
            return count

        def read(self, size=-1):
            raw = super().read(size)
            Counting.bytes += len(raw)
            return raw

        readall = read

    monkeypatch.setattr(Path, "open", lambda self, mode="r", buffering=-1: Counting(self, mode))
    return lambda: Counting.bytes


def test_a_block_takes_few_bytes(make_tokens, tmp_path, count_read, monkeypatch):
    blocks, length = 200, 1000
    made = make_tokens([length] * blocks, Codes(64_000), tokens_per_block=1024)
    path = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.undo()
        made.save(path)
    size = path.stat().st_size
    assert size > blocks * length * 2
    with TokenFile(path) as file:
        opened = count_read()
        # Header, and less than 32 bytes a block.
        assert opened < 3000 + 32 * blocks < size / 20
        assert file.block(150).tolist() == made.block(150).tolist()
        assert count_read() - opened == length * 2
        assert file.select(3, 6).values.tolist() == made.select(3, 6).values.tolist()
        assert count_read() - opened == length * 2 * 4
    before = count_read()
    assert Tokens.load(path) == made
    assert count_read() - before == size


def test_blocks_are_read_by_many_threads(make_tokens, tmp_path):
    made = make_tokens([9, 3, 16, 5] * 50, Codes(300))
    made.save(tmp_path / "x")

    def read(seed):
        order = np.random.default_rng(seed).permutation(made.blocks).tolist()
        return [file.block(index).tolist() == made.block(index).tolist() for index in order]

    with TokenFile(tmp_path / "x") as file, ThreadPoolExecutor(4) as pool:
        assert all(itertools.chain(*pool.map(read, range(4))))


def test_damage_is_seen_by_who_reads_it(small_file, tmp_path):
    """A wrong byte anywhere: in what every opening reads, or in one block, which others are not."""
    made, raw, _ = small_file
    path = tmp_path / "x.safetensors"
    blamed = set()
    for index in range(len(raw)):
        changed = bytearray(raw)
        changed[index] ^= 1 << (index % 8)
        path.write_bytes(changed)
        try:
            with TokenFile(path) as file:
                wrong = []
                for block in range(2):
                    try:
                        same = file.block(block).tolist() == made.block(block).tolist()
                        assert same, index
                    except TokenFileError as error:
                        assert f"block {block} " in str(error)
                        wrong.append(block)
                assert len(wrong) < 2
                blamed.update(wrong)
                for block in {0, 1} - {*wrong}:
                    part = file.select(block, block + 1)
                    assert part == made.select(block, block + 1)
                try:
                    assert file.tokens() == made
                    assert not wrong
                except TokenFileError as error:
                    assert "x.safetensors" in str(error)
        except TokenFileError as error:
            assert "x.safetensors" in str(error)
    assert blamed == {0, 1}


def test_a_file_that_is_cut_while_it_is_open(make_tokens, tmp_path):
    made = make_tokens((3, 5, 2))
    path = tmp_path / "x.safetensors"
    made.save(path)
    with TokenFile(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        seen = 0
        for index in range(3):
            try:
                assert file.block(index).tolist() == made.block(index).tolist()
            except TokenFileError as error:
                assert "cut short" in str(error)
                seen += 1
        assert seen
        with pytest.raises(TokenFileError, match="cut short"):
            file.tokens()


@pytest.mark.parametrize("size", [2**20 + 1, 2**62, 2**64 - 1])
def test_headers_without_end(small_file, tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + small_file[1][8:])
    for length in (None, 2**21):
        if length is not None:
            os.truncate(path, length)  # a hole: room for the smallest of these headers
        with pytest.raises(TokenFileError, match=f"header .*{size} bytes"):
            TokenFile(path)


def test_facts_without_end(make_tokens, tmp_path):
    with pytest.raises(ValueError, match="shorten the fingerprint"):
        make_tokens(fingerprint="x" * 2**20).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_codes_outside_of_the_book(small_file, tmp_path):
    path = tmp_path / "x.safetensors"
    codes = small_file[0].codes.astype(np.uint16)
    codes[4] = 300
    path.write_bytes(forge(small_file[1], arrays={"codes": codes}))
    with TokenFile(path) as file:
        assert file.block(0).tolist() == codes[:3].tolist()
        with pytest.raises(TokenFileError, match="300 for a code book of 300"):
            file.block(1)


def test_latents_that_are_not_numbers(make_tokens, tmp_path):
    made = make_tokens(kind=Latents(2))
    made.save(tmp_path / "x")
    bad = made.latents.copy()
    bad[1, 1] = np.inf
    (tmp_path / "x").write_bytes(forge((tmp_path / "x").read_bytes(), arrays={"latents": bad}))
    with pytest.raises(TokenFileError, match="finite"):
        Tokens.load(tmp_path / "x")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokens.load(tmp_path / "x")


def test_saving_is_all_or_nothing(make_tokens, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    old, new = make_tokens(seed=1), make_tokens(seed=2)
    old.save(path)

    def full(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            new.save(path)
    assert Tokens.load(path) == old
    assert list(tmp_path.iterdir()) == [path]
    new.save(path)
    assert Tokens.load(path) == new
    assert list(tmp_path.iterdir()) == [path]


@given(st.data(), st.integers(1, 20))
def test_truncate(make_tokens, data, length):
    made = data.draw(tokens(make_tokens))
    short = made.truncate(length)
    expected, start, changed = [], 0, False
    for index, kept in enumerate(made.lengths.tolist()):
        new = min(kept, max(length, 2))
        expected += made.values[start : start + new].tolist()
        start += kept
        assert short.lengths[index] == new
        changed |= new < kept
        if changed:
            assert np.isnan(short.losses[index])
            assert not short.met[index]
            assert not short.monotone[index]
            assert not short.measured[index]
        else:
            np.testing.assert_equal(short.losses[index], made.losses[index])
            assert short.met[index] == made.met[index]
            assert short.monotone[index] == made.monotone[index]
            assert short.measured[index] == made.measured[index]
    assert short.values.tolist() == expected
    assert short.values.dtype == made.values.dtype
    assert (short == made) is (not changed)
    assert (
        replace(
            short,
            **{k: getattr(made, k) for k in ("codes", "latents", "lengths", "losses", "met")},
            monotone=made.monotone,
            measured=made.measured,
        )
        == made
    )
    assert short.truncate(length) == short


@pytest.mark.parametrize("length", [0, -3])
def test_truncate_to_nothing(make_tokens, length):
    with pytest.raises(ValueError, match=str(length)):
        make_tokens().truncate(length)


@given(st.data())
def test_any_split_joins_to_the_same(make_tokens, data):
    made = data.draw(tokens(make_tokens))
    cuts = sorted(data.draw(st.sets(st.integers(1, made.blocks))) - {made.blocks})
    bounds = list(zip([0, *cuts], [*cuts, made.blocks], strict=True))
    limit = 2**40 - made.blocks
    made = replace(made, first_block=min(made.first_block, limit))
    parts = [made.select(start, stop) for start, stop in bounds]
    for part, (start, stop) in zip(parts, bounds, strict=True):
        assert part.first_block == made.first_block + start
        assert part.blocks == stop - start
        for index in range(start, stop):
            assert part.block(index - start).tobytes() == made.block(index).tobytes()
            for name in ("lengths", "met", "monotone", "measured", "evaluations", "seconds"):
                assert getattr(part, name)[index - start] == getattr(made, name)[index]
            np.testing.assert_equal(part.losses[index - start], made.losses[index])
    assert sum(part.frames for part in parts) == made.frames
    assert all(part.frames == 2 * part.blocks for part in parts[:-1])
    joined = Tokens.join(parts)
    assert joined == made
    assert joined.seconds.tolist() == made.seconds.tolist()
    without = Tokens.join(replace(part, seconds=None) for part in parts)
    assert without == made
    assert without.seconds is None


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (1, 1), (2, 1), (0, 4), (3, 4)])
def test_select_what_is_not_there(make_tokens, start, stop):
    with pytest.raises(ValueError, match=f"blocks {start} to {stop} of 3"):
        make_tokens().select(start, stop)


def test_parts_that_do_not_follow(make_tokens):
    made = make_tokens((3, 5, 2, 4))
    first, second, third = made.select(0, 1), made.select(1, 2), made.select(2, 4)
    assert Tokens.join([second, third]) == made.select(1, 4)
    picture = make_tokens((3,), picture=True)
    assert Tokens.join([picture]) == picture
    for parts, says in (
        ([], "no parts"),
        ([first, third], "begins with block 2 .* ends before block 1"),
        ([second, first], "begins with block 0"),
        ([first, first], "begins with block 0"),
        ([third, replace(first, first_block=4)], "3 frames in blocks of 2"),
        ([picture, second], "a picture is a whole"),
        ([first, replace(second, fps=25.0)], "fps is 23.976 in one part and 25.0"),
        ([first, replace(second, fingerprint="x")], "fingerprint"),
        ([first, replace(second, window=2)], "window"),
        ([first, replace(second, codebook_size=126)], "codebook_size"),
        ([first, replace(second, codes=second.codes[:, None])], "kind"),
    ):
        with pytest.raises(ValueError, match=says):
            Tokens.join(parts)


def test_bits(make_tokens):
    # 15 lengths allowed, 2 to 16: four bits each.
    made = make_tokens((3, 5, 2), bits_per_token=6.5)
    assert made.bits == 10 * 6.5 + 3 * 4
    assert made.truncate(2).bits == 6 * 6.5 + 3 * 4
    # 17 lengths: five bits. One length: none. A size with fewer tokens than the model's least.
    assert make_tokens((3, 5, 2), bits_per_token=1.0, tokens_per_block=18).bits == 10 + 15
    assert make_tokens((2, 2), bits_per_token=1.0, tokens_per_block=2).bits == 4
    assert make_tokens((2, 2), bits_per_token=1.0, tokens_per_block=2, min_tokens=7).bits == 4
    assert make_tokens(kind=Latents(3)).bits is None


def test_equality(make_tokens):
    made = make_tokens()
    assert made == make_tokens()
    assert made == replace(made, seconds=None)
    assert made != "tokens"
    for name, value in vars(make_tokens((4, 4, 2), seed=5)).items():
        if name in ("seconds", "latents", "lengths", "codes"):
            continue
        if isinstance(value, np.ndarray):
            changed = value.copy()
            changed[1] = not changed[1] if value.dtype == bool else changed[1] + 1
            if name in ("losses", "measured"):
                made = replace(made, **dict.fromkeys(("met", "monotone"), np.zeros(3, np.bool_)))
                made = replace(made, losses=np.array([0.5, np.nan if name == "measured" else 2, 0]))
        elif name in ("frames", "tokens_per_block", "codebook_size", "height", "width", "window"):
            changed = value + 1
        else:
            continue
        assert replace(made, **{name: changed}) != made, name
    codes = made.codes.copy()
    codes[3] = (codes[3] + 1) % 125
    assert replace(made, codes=codes) != made
    with pytest.raises(TypeError):
        hash(made)


def test_arrays_cannot_be_changed(make_tokens):
    lengths = np.array([3, 5, 2], np.int32)
    made = replace(make_tokens(), lengths=lengths)
    lengths[0] = 4
    assert made.lengths[0] == 3
    for name in ("codes", "lengths", "losses", "met"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(made, name)[0] = 0
    with pytest.raises(AttributeError):
        made.frames = 3


def test_blocks_and_evaluations(make_tokens):
    made = make_tokens((3, 5, 2))
    assert [made.block(i).tolist() for i in (0, 1, -1)] == [
        made.codes[:3].tolist(),
        made.codes[3:8].tolist(),
        made.codes[8:].tolist(),
    ]
    with pytest.raises(IndexError):
        made.block(3)
    expected = made.encoder_evaluations + made.decoder_evaluations
    assert made.evaluations.tolist() == expected.tolist()


NO, YES = np.zeros(3, np.bool_), np.ones(3, np.bool_)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents": np.zeros((10, 2), np.float32)}, "one of them"),
        ({"codes": None}, "one of them"),
        ({"encoder_evaluations": np.array([1, -1, 1])}, "negative"),
        ({"seconds": np.zeros(2)}, "seconds has shape"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"first_block": -1}, "first_block is -1; it must be 0 to"),
        ({"first_block": 2**40 + 1}, "first_block is"),
        ({"measured": np.ones(2, np.bool_)}, "measured has shape"),
        ({"measured": np.zeros(3, np.bool_), "met": NO, "monotone": NO}, "block 0 .* losses is"),
        ({"measured": NO, "losses": np.full(3, np.nan), "monotone": NO, "met": YES}, "met is True"),
        ({"measured": NO, "losses": np.full(3, np.nan), "met": NO, "monotone": YES}, "monotone is"),
        ({"min_tokens": 0}, "min_tokens is 0"),
    ],
)
def test_contradictions(make_tokens, changes, says):
    with pytest.raises(ValueError, match=says):
        make_tokens(**changes)
