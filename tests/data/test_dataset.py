"""Packing, shares, order and resuming, on frames that say whose they are."""

import itertools
import json
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.data import (
    AbstractSource,
    CentreCrop,
    Clip,
    Component,
    Geometry,
    MediaError,
    MediaWarning,
    MemorySource,
    PackedDataset,
    RandomCrop,
    WholeClip,
    load_clips,
)

SIZE = (2, 3)


def clip(identity, frames, picture=False):
    """Every pixel of it says which clip and which frame it belongs to."""
    pixels = np.zeros((frames, *SIZE, 3), np.uint8)
    pixels[..., 0] = identity
    pixels[..., 1] = np.arange(frames)[:, None, None]
    pixels[..., 2] = 200
    return Clip(pixels, None if picture else 8.0)


def library(pictures, lengths):
    """Pictures 0, 1, ... and after them clips of the lengths given."""
    result = [clip(index, 1, picture=True) for index in range(pictures)]
    return result + [clip(pictures + i, length) for i, length in enumerate(lengths)]


def documents(batch):
    """Takes a batch apart: per row, documents as (identity, numbers of their frames), blocks."""
    rows = []
    for pixels, segments, valid in zip(batch.pixels, batch.segments, batch.valid, strict=True):
        assert (valid == (segments > 0)).all()
        assert (pixels[~valid] == 0).all()
        row = []
        for segment in range(1, segments.max(initial=0) + 1):
            blocks = np.flatnonzero(segments == segment)
            assert (np.diff(blocks) == 1).all(), "a document is in one piece"
            shown = pixels[blocks].reshape(-1, *pixels.shape[2:])
            assert (shown == shown[:, :1, :1]).all()
            assert (shown[..., 2] == 200).all()
            assert len(set(shown[:, 0, 0, 0])) == 1, "a document is of one clip"
            row.append((int(shown[0, 0, 0, 0]), shown[:, 0, 0, 1].tolist(), len(blocks)))
        assert sum(blocks for _, _, blocks in row) == valid.sum()
        assert (valid == (np.arange(len(valid)) < valid.sum())).all(), "padding comes last"
        rows.append(row)
    return rows


def same(left, right):
    return all(
        (getattr(left, name) == getattr(right, name)).all()
        for name in ("pixels", "segments", "valid")
    )


LIBRARIES = st.tuples(st.integers(0, 4), st.lists(st.integers(1, 30), max_size=4)).filter(
    lambda pair: pair[0] or pair[1]
)


@given(
    contents=LIBRARIES,
    frames=st.integers(1, 5),
    blocks=st.integers(1, 4),
    batch_size=st.integers(1, 3),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.77]),
    seed=st.integers(0, 5),
)
def test_packing(contents, frames, blocks, batch_size, share, seed):
    pictures, lengths = contents
    dataset = load_clips(
        library(pictures, lengths),
        Geometry(SIZE, frames, blocks),
        crop=CentreCrop(),
        batch_size=batch_size,
        image_share=share,
        seed=seed,
    )
    tails = 0
    with iter(dataset) as batches:
        seen = [next(batches) for _ in range(6)]
        report = batches.report()
    rows = []
    for batch in seen:
        assert batch.pixels.shape == (batch_size, blocks, frames, *SIZE, 3)
        assert batch.pixels.dtype == np.uint8
        assert batch.segments.dtype == np.int32
        assert batch.valid.dtype == bool
        rows.append(documents(batch))
    for identity, numbers, taken in itertools.chain(*itertools.chain(*rows)):
        length = 1 if identity < pictures else lengths[identity - pictures]
        if length < frames:
            # The last frame is repeated, and nothing of so short a clip is left out.
            assert numbers == [min(i, length - 1) for i in range(frames)]
            continue
        assert taken == min(length // frames, blocks), "as many whole blocks as there are"
        assert numbers == list(range(numbers[0], numbers[0] + taken * frames))
        assert numbers[-1] < length
        if length // frames <= blocks:
            tails += length - taken * frames
    assert report.tail_frames == tails
    assert report.documents == sum(len(row) for batch in rows for row in batch)
    identities = {i for batch in rows for row in batch for i, _, _ in row}
    assert report["pictures"].items == sum(i < pictures for i in identities)
    assert report["clips"].items == sum(i >= pictures for i in identities)
    assert (report.skipped, report.damaged) == ((), ())
    # First-fit: what opened a row or a batch had no room in the rows before.
    for batch in rows:
        for earlier, later in itertools.combinations(batch, 2):
            assert not later or later[0][2] > blocks - sum(taken for _, _, taken in earlier)
    for batch, following in itertools.pairwise(rows):
        for row in batch:
            assert following[0][0][2] > blocks - sum(taken for _, _, taken in row)


@given(
    pictures=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    share=st.floats(0.01, 0.99),
    blocks=st.integers(1, 5),
)
def test_shares_are_never_off_by_more_than_a_document(pictures, lengths, share, blocks):
    dataset = load_clips(
        library(pictures, lengths),
        Geometry(SIZE, 2, blocks),
        crop=CentreCrop(),
        batch_size=4,
        image_share=share,
    )
    of_pictures = total = 0
    with iter(dataset) as batches:
        for _ in range(12):
            batch = next(batches)
            shown = batch.pixels[batch.valid][:, 0, 0, 0, 0]
            of_pictures += int((shown < pictures).sum())
            total += len(shown)
            assert abs(of_pictures - share * total) <= blocks


@pytest.mark.parametrize(("share", "expected"), [(0, {"clips"}), (1, {"pictures"})])
def test_a_share_of_nothing_leaves_a_kind_out(share, expected):
    dataset = load_clips(
        library(2, [8, 8]), Geometry(SIZE, 2), crop=CentreCrop(), image_share=share
    )
    with iter(dataset) as batches:
        for _ in range(5):
            next(batches)
        report = batches.report()
    assert {used.name for used in report.components} == expected


def test_every_frame_of_every_clip_is_used():
    """Also the first ones, and those of a tail: another draw begins elsewhere."""
    lengths = [3, 5, 7, 8, 21]
    dataset = load_clips(library(0, lengths), Geometry(SIZE, 3, 2), crop=CentreCrop())
    used = Counter()
    with iter(dataset) as batches:
        for _ in range(60):
            for row in documents(next(batches)):
                for identity, numbers, _ in row:
                    used.update((identity, number) for number in numbers)
    expected = {(i, number) for i, length in enumerate(lengths) for number in range(length)}
    assert set(used) == expected


def order(batches, count):
    """Identities of the next documents."""
    result = []
    while len(result) < count:
        for row in documents(next(batches)):
            result += [identity for identity, _, _ in row]
    return result[:count]


@given(items=st.integers(1, 40), count=st.integers(1, 5), seed=st.integers(0, 3), frames=st.just(1))
def test_shards_are_a_partition_of_every_epoch(items, count, seed, frames):
    if items < count:
        return
    clips = library(items, [])
    shards = []
    for index in range(count):
        dataset = load_clips(
            clips,
            Geometry(SIZE, frames),
            crop=CentreCrop(),
            batch_size=1,
            seed=seed,
            shard=(index, count),
        )
        with iter(dataset) as batches:
            own = len(range(index, items, count))
            epochs = [order(batches, own) for _ in range(3)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        shards += epochs[0]
    assert sorted(shards) == list(range(items))


def test_epochs_and_seeds_differ_and_one_seed_does_not():
    clips = library(30, [])

    def epochs(seed, count=2):
        dataset = load_clips(clips, Geometry(SIZE, 1), crop=CentreCrop(), batch_size=1, seed=seed)
        with iter(dataset) as batches:
            return [tuple(order(batches, 30)) for _ in range(count)]

    first, second = epochs(0)
    assert first != second
    assert list(first) != list(range(30))
    assert epochs(0) == [first, second]
    assert len({first, second, *epochs(1), *epochs(2)}) == 6


def test_windows_differ_between_epochs_and_not_within_a_document():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (1, 300, 300, 3)).astype(np.uint8)
    still = Clip(np.repeat(frame, 12, 0), 8.0)
    dataset = load_clips([still], Geometry((16, 16), 2, 6), crop=RandomCrop(0.5, 1.0))
    shown = set()
    with iter(dataset) as batches:
        for _ in range(3):
            for row in next(batches).pixels:
                frames = row.reshape(-1, 16, 16, 3)
                assert (frames == frames[0]).all()
                shown.add(frames[0].tobytes())
    assert len(shown) >= 20


def test_streams_draw_different_numbers():
    """Two kinds, or two processes, with the same seed must not crop alike."""
    frame = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    clips = [Clip(frame, None), Clip(frame, None), Clip(frame, 8.0), Clip(frame, 8.0)]
    shown = []
    for index in range(2):
        dataset = load_clips(clips, Geometry((16, 16), 1, 1), batch_size=2, shard=(index, 2))
        with iter(dataset) as batches:
            shown += [row.tobytes() for row in next(batches).pixels]
    assert len(set(shown)) == 4


@settings(max_examples=15)
@given(
    contents=LIBRARIES,
    before=st.integers(0, 6),
    blocks=st.integers(1, 4),
    batch_size=st.integers(1, 3),
)
def test_resuming_is_exact(contents, before, blocks, batch_size):
    pictures, lengths = contents
    clips = [
        Clip(np.random.default_rng(i).integers(0, 256, (len(c.frames), 9, 8, 3), np.uint8), c.fps)
        for i, c in enumerate(library(pictures, lengths))
    ]
    settings = {"batch_size": batch_size, "seed": 3}
    dataset = load_clips(clips, Geometry((4, 4), 2, blocks), **settings)
    with iter(dataset) as batches:
        for _ in range(before):
            next(batches)
        state = json.dumps(batches.get_state())
        # Asking does not disturb, and what is prepared ahead is not in the state.
        assert json.dumps(batches.get_state()) == state
        expected = [next(batches) for _ in range(5)]
        after = json.dumps(batches.get_state())
    other = load_clips(clips, Geometry((4, 4), 2, blocks), **settings)
    with iter(other) as batches:
        next(batches)
        batches.set_state(json.loads(state))
        assert json.dumps(batches.get_state()) == state
        assert all(same(next(batches), batch) for batch in expected)
        assert json.dumps(batches.get_state()) == after


def dataset_with(**changes):
    arguments = {
        "clips": library(3, [8, 9]),
        "geometry": Geometry(SIZE, 2, 2),
        "crop": CentreCrop(),
        "batch_size": 2,
        "image_share": 0.5,
        "seed": 0,
        "shard": (0, 1),
        "workers": 0,
    }
    return load_clips(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"image_share": 0.4}, r"weights was \[0.5, 0.5\] and is now \[0.4, 0.6\]"),
        ({"excerpt": WholeClip()}, r"excerpt was RandomStretch\(\) and is now WholeClip\(\)"),
        ({"clips": library(3, [])}, "other kinds of data are mixed"),
        ({"shard": (0, 2)}, r"shard was \[0, 1\] and is now \[0, 2\]"),
        ({"workers": 2}, "workers was 0 and is now 2"),
        ({"crop": RandomCrop()}, r"crop was CentreCrop\(\) and is now RandomCrop"),
        ({"geometry": Geometry(SIZE, 2, 3)}, "blocks was 2 and is now 3"),
        ({"geometry": Geometry(SIZE, 1, 2)}, "frames_per_block was 2 and is now 1"),
        ({"geometry": Geometry((3, 3), 2, 2)}, r"size was \[2, 3\] and is now \[3, 3\]"),
        ({"geometry": Geometry(SIZE, 2, 2, None)}, "fps was 8.0 and is now None"),
        ({"clips": library(4, [8, 9])}, "the pictures are not the same"),
        ({"clips": library(3, [9, 8])}, "the clips are not the same"),
    ],
)
def test_resuming_with_other_settings_is_an_error_that_names_them(changes, message):
    with iter(dataset_with()) as batches:
        next(batches)
        state = json.loads(json.dumps(batches.get_state()))
    with iter(dataset_with(**changes)) as batches, pytest.raises(ValueError, match=message):
        batches.set_state(state)
    with iter(dataset_with()) as batches:
        with pytest.raises(ValueError, match="version"):
            batches.set_state(state | {"version": 99})
        batches.set_state(state)
        next(batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_share": 1.5}, "image_share is 1.5"),
        ({"image_share": 1, "clips": library(0, [8])}, "leaves out all there is"),
        ({"image_share": 0, "clips": library(2, [])}, "leaves out all there is"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\)"),
        ({"shard": (0, 3)}, "2 clips cannot be divided among 3 processes"),
        ({"clips": []}, "neither pictures nor clips"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataset_with(**changes)


class Faulty(AbstractSource):
    """A source of which some items fail, as files on a disk do."""

    def __init__(self, clips, bad):
        self._inner = MemorySource(clips)
        self._bad = bad
        self.tried = Counter()

    def __len__(self):
        return len(self._inner)

    def name(self, index):
        return f"number {index}"

    def fingerprint(self):
        return self._inner.fingerprint()

    def item(self, index, request):
        self.tried[index] += 1
        if index in self._bad:
            raise MediaError(self.name(index), f"rotten {index}")
        return self._inner.item(index, request)


def faulty(bad_pictures=(), bad_clips=(), pictures=5, clips=3):
    contents = library(pictures, [5] * clips)
    return PackedDataset(
        components=(
            Component("pictures", Faulty(contents[:pictures], set(bad_pictures))),
            Component("clips", Faulty(contents[pictures:], set(bad_clips))),
        ),
        geometry=Geometry(SIZE, 2, 2),
        crop=CentreCrop(),
        batch_size=2,
    )


def test_bad_items_are_skipped_with_one_warning_each_and_counted():
    dataset = faulty(bad_pictures=[1, 4], bad_clips=[2])
    with warnings.catch_warnings(record=True) as caught, iter(dataset) as batches:
        warnings.simplefilter("always")
        shown = set(order(batches, 60))
        report = batches.report()
    assert shown == {0, 2, 3, 5, 6}
    assert dataset.components[0].source.tried[1] > 1
    messages = sorted(str(w.message) for w in caught if w.category is MediaWarning)
    assert messages == [f"skipped number {i}: rotten {i}" for i in (1, 2, 4)]
    assert {(s.name, s.reason) for s in report.skipped} == {
        (f"number {i}", f"rotten {i}") for i in (1, 2, 4)
    }
    assert (report["pictures"].items, report["clips"].items) == (3, 2)
    for part in (
        "used 5 files",
        "pictures: 3 in",
        "clips: 2 in",
        "3 files skipped",
        "number 4: rotten 4",
    ):
        assert part in str(report)


def test_a_kind_without_any_good_item_is_given_up_with_a_warning():
    with warnings.catch_warnings(record=True) as caught, iter(faulty(range(5))) as batches:
        warnings.simplefilter("always")
        assert set(order(batches, 20)) == {5, 6, 7}
        state = batches.get_state()
        expected = [next(batches) for _ in range(3)]
    messages = [str(w.message) for w in caught]
    assert len(messages) == 6
    assert "none of the pictures can be used" in messages[-1]
    with warnings.catch_warnings(record=True) as caught, iter(faulty(range(5))) as batches:
        warnings.simplefilter("always")
        batches.set_state(state)
        assert all(same(next(batches), batch) for batch in expected)
    assert not caught


def test_nothing_but_bad_items_is_an_error_and_no_endless_loop():
    message = r"number \d: rotten \d; none of the 8 files"
    with iter(faulty(range(5), range(3))) as batches, pytest.raises(MediaError, match=message):
        next(batches)


def test_bad_items_do_not_disturb_resuming():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MediaWarning)
        with iter(faulty([0, 3], [1])) as batches:
            for _ in range(4):
                next(batches)
            state = json.loads(json.dumps(batches.get_state()))
            expected = [next(batches) for _ in range(6)]
        with iter(faulty([0, 3], [1])) as batches:
            batches.set_state(state)
            assert all(same(next(batches), batch) for batch in expected)


def test_warnings_as_errors_lose_no_batch_but_the_one():
    with iter(faulty([0, 1, 2, 3])) as batches, warnings.catch_warnings():
        warnings.simplefilter("error", MediaWarning)
        raised = 0
        for _ in range(40):
            try:
                next(batches)
            except MediaWarning:
                raised += 1
    assert 1 <= raised <= 4


def test_clips_in_memory_are_resampled():
    dataset = load_clips([clip(0, 24)], Geometry(SIZE, 2, 4, fps=3), crop=CentreCrop())
    with iter(dataset) as batches:
        for row in documents(next(batches)):
            ((_, numbers, _),) = row
            assert set(np.diff(numbers)) <= {2, 3}
            assert len(numbers) == 8
    dataset = load_clips([clip(0, 24)], Geometry(SIZE, 2, 4, fps=None), crop=CentreCrop())
    with iter(dataset) as batches:
        for row in documents(next(batches)):
            assert set(np.diff(row[0][1])) == {1}


def test_pictures_fill_a_block():
    with iter(load_clips(library(2, []), Geometry(SIZE, 4, 3), crop=CentreCrop())) as batches:
        batch = next(batches)
    assert batch.valid.all()
    assert (batch.segments == [1, 2, 3]).all()
    assert (batch.pixels == batch.pixels[:, :, :1]).all()


def test_batches_belong_to_the_caller():
    with iter(dataset_with()) as batches:
        first, second = next(batches), next(batches)
        kept = second.pixels.copy()
        first.pixels[:] = 255
        assert (second.pixels == kept).all()


def test_two_iterators_do_not_share_a_position():
    dataset = dataset_with()
    with iter(dataset) as one, iter(dataset) as other:
        first = [next(one) for _ in range(3)]
        assert all(same(next(other), batch) for batch in first)


def test_clips_in_memory_are_scaled_down_once(monkeypatch):
    from elastictok.data import _source

    sizes = []
    original = _source.resize

    def counting(frame, size):
        sizes.append((frame.shape[:2], size))
        return original(frame, size)

    monkeypatch.setattr(_source, "resize", counting)
    rows, columns = np.mgrid[:200, :400]
    wave = (127 + 100 * np.sin(rows / 19) * np.cos(columns / 23)).astype(np.uint8)
    frames = wave[None, ..., None].repeat(3, 3)
    dataset = load_clips([Clip(frames, None)], Geometry((10, 10), 1), crop=CentreCrop())
    with iter(dataset) as batches:
        for _ in range(4):
            shown = next(batches).pixels[0, 0, 0]
    assert sizes == [((200, 400), (10, 20))]
    means = frames[0, :, 100:300].reshape(10, 20, 10, 20, 3).mean((1, 3))
    assert np.abs(shown - means).mean() < 3
