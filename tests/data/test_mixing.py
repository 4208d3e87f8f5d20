"""What is mixed of what, in which order, cut how: for any number of sources, hosts and workers."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.data import (
    Batch,
    CentreCrop,
    Clip,
    Component,
    Geometry,
    MemorySource,
    PackedDataset,
    RandomCrop,
    WholeClip,
    _order,
    aspect_buckets,
    build,
    load_clips,
    load_folders,
    write_clip,
    write_picture,
)
from elastictok.data._order import EpochOrder, _Permutation

SIZE = (2, 3)


def clip(identity, frames, size=SIZE):
    """Every pixel says which clip it is of, and which frame."""
    pixels = np.zeros((frames, *size, 3), np.uint8)
    pixels[..., 0] = identity
    pixels[..., 1] = np.arange(frames)[:, None, None]
    return Clip(pixels, 8.0)


def blocks_of(batch):
    """Identity and the number of the first frame of each valid block, row by row."""
    shown = batch.pixels[:, :, :, 0, 0]
    return [
        [(int(b[0, 0]), int(b[0, 1])) for b, ok in zip(row, valid, strict=True) if ok]
        for row, valid in zip(shown, batch.valid, strict=True)
    ]


def same(left: Batch, right: Batch):
    return left.names == right.names and all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("pixels", "segments", "valid")
    )


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 8), min_size=6, max_size=6),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_shares_of_many_sources_are_never_off_by_more_than_a_document(
    weights, lengths, blocks, seed
):
    components = tuple(
        Component(f"source {i}", MemorySource([clip(i, lengths[i]), clip(i, 8)]), weight)
        for i, weight in enumerate(weights)
    )
    dataset = PackedDataset(components, Geometry(SIZE, 1, blocks), CentreCrop(), seed=seed)
    taken = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    with iter(dataset) as batches:
        for _ in range(12):
            for row in blocks_of(next(batches)):
                for identity, _ in row:
                    taken[identity] += 1
            assert (np.abs(taken - shares * taken.sum()) <= blocks + 1e-6).all()
        report = batches.report()
    assert [used.blocks for used in report.components] == taken.tolist()


def test_a_component_without_weight_is_left_out():
    components = (
        Component("kept", MemorySource([clip(1, 4)]), 2.0),
        Component("left out", MemorySource([clip(2, 4)]), 0),
    )
    with iter(PackedDataset(components, Geometry(SIZE, 1, 2), CentreCrop())) as batches:
        assert {i for row in blocks_of(next(batches)) for i, _ in row} == {1}
    with pytest.raises(ValueError, match="no component has a weight above 0"):
        PackedDataset(components[1:], Geometry(SIZE, 1, 2))
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="the weight of kept is"):
            Component("kept", MemorySource([]), weight)


@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory):
    """Red pictures and green clips, as built data sets, and blue pictures and clips as files."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def paint(count, channel):
        frames = rng.integers(0, 60, (count, 24, 32, 3)).astype(np.uint8)
        frames[..., channel] = 255 - frames[..., channel] // 4
        return frames

    for name in ("red", "green", "blue"):
        (root / name).mkdir()
    for index in range(7):
        write_picture(root / "red" / f"{index}.jpg", paint(1, 0)[0])
        write_clip(root / "green" / f"{index}.mp4", paint(4 + 2 * index, 1), 8)
        write_picture(root / "blue" / f"{index}.png", paint(1, 2)[0])
    write_clip(root / "blue" / "a.mp4", paint(9, 2), 8)
    for name in ("red", "green"):
        build(root / name, root / f"{name}-set", shard_bytes=5000)
    return root


def colours(batch):
    """How many blocks of the batch are red, green and blue."""
    means = batch.pixels.mean((2, 3, 4))[batch.valid]
    return np.bincount(means.argmax(-1), minlength=3)


def test_weights_are_shares_of_the_blocks(two_data_sets):
    root = two_data_sets
    dataset = load_folders(
        {root / "red-set": 1, root / "green-set": 2, root / "blue": 1.0},
        Geometry((16, 16), 2, 4, fps=8),
        batch_size=4,
    )
    seen = np.zeros(3)
    with iter(dataset) as batches:
        for _ in range(10):
            seen += colours(next(batches))
            assert (np.abs(seen - np.array([1, 2, 1]) / 4 * seen.sum()) <= 8).all()
        report = batches.report()
    names = [used.name for used in report.components]
    assert names == [
        f"pictures of {root / 'red-set'}",
        f"clips of {root / 'green-set'}",
        f"pictures of {root / 'blue'}",
        f"clips of {root / 'blue'}",
    ]
    assert sum(used.blocks for used in report.components) == seen.sum()
    assert report[names[0]].items == 7
    assert report["no such"].items == 0


def test_folders_without_weights_are_taken_together(two_data_sets):
    root = two_data_sets
    dataset = load_folders(
        [root / "red-set", root / "blue", root / "green-set"], Geometry((16, 16), 2, 1, fps=8)
    )
    assert [(c.name, len(c.source), c.weight) for c in dataset.components] == [
        ("pictures", 14, 0.5),
        ("clips", 8, 0.5),
    ]
    with iter(dataset) as batches:
        seen = sum(colours(next(batches)) for _ in range(30))
    # Seven of fourteen pictures are blue, and one of eight clips.
    assert seen[0] / seen.sum() == pytest.approx(1 / 4, abs=0.05)
    assert seen[1] / seen.sum() == pytest.approx(7 / 16, abs=0.05)


def test_the_same_data_is_the_same_run_wherever_it_lies(two_data_sets, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(two_data_sets / "green-set", target_is_directory=True)
    geometry = Geometry((8, 8), 2, 2, fps=8)
    with iter(load_folders(two_data_sets / "green-set", geometry)) as batches:
        next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = next(batches)
    with iter(load_folders(moved, geometry)) as batches:
        batches.set_state(state)
        assert (next(batches).pixels == expected.pixels).all()
    with (
        iter(load_folders(two_data_sets / "red-set", geometry)) as batches,
        pytest.raises(ValueError, match="the pictures are not the same"),
    ):
        batches.set_state(state)


@pytest.mark.heavy
def test_two_hosts_with_two_workers_mix_in_every_batch(two_data_sets):
    """Grain's own mix gives one worker or host nothing but pictures, the other nothing but clips
    (measured shares of 0, 1, 0, 1); here every one keeps the shares, and each item is used by one.
    """
    root = two_data_sets
    seen_by: list[set[str]] = []
    for host in range(2):
        dataset = load_folders(
            {root / "red-set": 0.5, root / "green-set": 0.5},
            Geometry((8, 8), 2, 4, fps=8),
            batch_size=4,
            shard=(host, 2),
            workers=2,
        )
        names: Counter[str] = Counter()
        taken = [np.zeros(3), np.zeros(3)]
        with iter(dataset) as batches:
            for turn in range(12):
                batch = next(batches)
                names.update(itertools.chain(*batch.names))
                here = colours(batch)
                assert here[0] > 0
                assert here[1] > 0
                # Batches come from the workers in turn.
                taken[turn % 2] += here
                reds, greens, _ = taken[turn % 2]
                assert abs(reds - greens) / 2 <= 4
        seen_by.append(set(names))
    assert not seen_by[0] & seen_by[1]
    assert len(seen_by[0] | seen_by[1]) == 14


@settings(max_examples=15)
@given(
    items=st.integers(1, 30),
    hosts=st.integers(1, 4),
    workers=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_hosts_and_workers_divide_every_epoch(items, hosts, workers, seed):
    """Positions are what Grain gives to a worker: every so many."""
    if items < hosts:
        return
    for epoch in range(2):
        used = []
        for host in range(hosts):
            order = EpochOrder(items, (host, hosts), seed)
            own = len(order.items)
            for worker in range(workers):
                positions = range(worker, (epoch + 1) * own, workers)
                used += [order(p) for p in positions if p >= epoch * own]
        assert sorted(used) == list(range(items))


@pytest.mark.parametrize("items", [999, 1000, 1025, 4096])
def test_the_order_of_many_items_is_a_permutation_too(items, monkeypatch):
    monkeypatch.setattr(_order, "_LISTED", 999)
    order = EpochOrder(items, (0, 1), 3)
    epochs = [[order(p) for p in range(e * items, (e + 1) * items)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(items))
    assert epochs[0] != epochs[1]
    moved = np.abs(np.array(epochs[0]) - np.arange(items))
    assert moved.mean() == pytest.approx(items / 3, rel=0.15)
    # Asking for a place does not need the ones before.
    assert EpochOrder(items, (0, 1), 3)(items + 5) == epochs[1][5]
    # Nor are the epochs of one seed those of the next, one later.
    other = EpochOrder(items, (0, 1), 4)
    assert epochs[1] != [other(p) for p in range(items)]


@given(count=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_computed_orders_are_permutations_of_any_length(count, seed):
    permutation = _Permutation(count, [seed, 0])
    assert sorted(map(permutation, range(count))) == list(range(count))


def test_computed_orders_look_random():
    """Every item comes to every place about as often: chi-squared of 9 x 9 cells."""
    count, draws = 9, 2000
    seen = np.zeros((count, count))
    for seed in range(draws):
        permutation = _Permutation(count, [seed, 1])
        for place in range(count):
            seen[place, permutation(place)] += 1
    expected = draws / count
    chi = ((seen - expected) ** 2 / expected).sum()
    # 64 degrees of freedom: mean 64, standard deviation 11.
    assert chi < 64 + 5 * 11


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(lengths=LENGTHS, frames=st.integers(1, 4), blocks=st.integers(1, 4), seed=st.integers(0, 3))
def test_whole_clips_go_on_from_one_document_to_the_next(lengths, frames, blocks, seed):
    clips = [clip(i, length) for i, length in enumerate(lengths)]
    dataset = load_clips(
        clips,
        Geometry(SIZE, frames, blocks),
        crop=CentreCrop(),
        excerpt=WholeClip(),
        batch_size=1,
        seed=seed,
    )
    shown: dict[int, list[list[int]]] = {i: [] for i in range(len(lengths))}
    with iter(dataset) as batches:
        # One row to a batch: documents come in the order in which they were drawn.
        while not all(shown.values()):
            for identity, numbers in documents(next(batches)):
                shown[identity].append(numbers)
        for _ in range(12):
            for identity, numbers in documents(next(batches)):
                shown[identity].append(numbers)
        report = batches.report()
    left_over = 0
    for identity, length in enumerate(lengths):
        found = shown[identity]
        if length < frames:
            assert all(n == [min(i, length - 1) for i in range(frames)] for n in found)
            continue
        whole = length // frames * frames
        parts = -(-(whole // frames) // blocks)
        for first in range(0, len(found), parts):
            use = list(itertools.chain(*found[first : first + parts]))
            start = use[0]
            assert use == list(range(start, start + len(use)))
            assert 0 <= start <= length - whole
            if first + parts <= len(found):
                assert len(use) == whole
                left_over += length - whole
    assert report.tail_frames == left_over


def documents(batch):
    """Identity and frame numbers of each document."""
    found = []
    for pixels, segments in zip(batch.pixels, batch.segments, strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            frames = pixels[segments == segment].reshape(-1, *pixels.shape[2:])[:, 0, 0]
            found.append((int(frames[0, 0]), frames[:, 1].tolist()))
    return found


def test_one_window_for_all_parts_of_a_clip():
    frame = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3)).astype(np.uint8)
    dataset = load_clips(
        [Clip(frame.repeat(24, 0), 8.0)],
        Geometry((8, 8), 2, 3),
        crop=RandomCrop(0.3, 0.6),
        excerpt=WholeClip(),
        batch_size=4,
    )
    with iter(dataset) as batches:
        rows = next(batches).pixels.reshape(4, -1, 8, 8, 3)
        assert (rows == rows[:1, :1]).all()
        assert (next(batches).pixels[0, 0, 0] != rows[0, 0]).any()


SHAPES = st.sampled_from([(4, 4), (4, 8), (8, 4), (9, 5), (3, 20)])


@settings(max_examples=15)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=5),
    before=st.integers(0, 5),
    excerpt=st.booleans(),
    batch_size=st.integers(1, 3),
)
def test_buckets_and_whole_clips_resume_exactly(shapes, before, excerpt, batch_size):
    clips = [clip(i, 3 * i + 1, shape) for i, shape in enumerate(shapes)]
    sizes = ((4, 4), (4, 8), (8, 4))
    arguments = {"batch_size": batch_size, "seed": 1}
    if excerpt:
        arguments["excerpt"] = WholeClip()
    geometry = Geometry(sizes[0], 2, 3, buckets=sizes[1:])
    dataset = load_clips(clips, geometry, crop=CentreCrop(), **arguments)
    with iter(dataset) as batches:
        for _ in range(before):
            next(batches)
        state = json.dumps(batches.get_state())
        expected = [next(batches) for _ in range(5)]
        after = json.dumps(batches.get_state())
    for batch in expected:
        height, width = batch.pixels.shape[3:5]
        for row in blocks_of(batch):
            for identity, _ in row:
                high, wide = shapes[identity]
                aspects = {s: abs(math.log(s[1] / s[0] / (wide / high))) for s in sizes}
                assert aspects[height, width] == min(aspects.values())
    with iter(load_clips(clips, geometry, crop=CentreCrop(), **arguments)) as batches:
        batches.set_state(json.loads(state))
        assert all(same(next(batches), batch) for batch in expected)
        assert json.dumps(batches.get_state()) == after


@given(
    high=st.integers(1, 40),
    wide=st.integers(1, 40),
    multiple=st.integers(1, 16),
    ratios=st.lists(st.floats(0.1, 10), max_size=5),
)
def test_buckets_have_the_multiple_and_no_larger_area(high, wide, multiple, ratios):
    size = (high * multiple, wide * multiple)
    found = aspect_buckets(size, multiple=multiple, ratios=ratios)
    assert len(set(found)) == len(found) <= len(ratios)
    assert size not in found
    for height, width in found:
        assert height % multiple == width % multiple == 0
        assert 0 < height * width <= size[0] * size[1]


def test_buckets_meet_their_ratios():
    assert aspect_buckets((256, 256), multiple=8, ratios=(1, 4 / 3, 9 / 16)) == (
        (216, 296),
        (336, 192),
    )
    for bad in ({"multiple": 0}, {"multiple": 3}, {"multiple": 8, "ratios": (0.0,)}):
        with pytest.raises(ValueError, match=r"multiples of|a ratio is"):
            aspect_buckets((256, 256), **bad)
    with pytest.raises(ValueError, match="each may be given once"):
        Geometry((8, 8), 1, buckets=((8, 8),))


RUN = """
import hashlib, json, os, sys
from elastictok.data import Geometry, RandomCrop, WholeClip, load_folders


def main(log, state, workers, *folders):
    dataset = load_folders(
        dict.fromkeys(folders, 0.5), Geometry((8, 8), 2, 3, fps=8), excerpt=WholeClip(),
        batch_size=2, workers=int(workers), seed=5,
    )
    with iter(dataset) as batches, open(log, "a") as lines:
        if os.path.exists(state):
            batches.set_state(json.loads(open(state).read()))
        while True:
            batch = next(batches)
            digest = hashlib.sha256(batch.pixels.tobytes() + batch.segments.tobytes()).hexdigest()
            # As a training step and its checkpoint: both or none.
            with open(state + ".new", "w") as file:
                json.dump(batches.get_state(), file)
            print(digest, file=lines, flush=True)
            os.replace(state + ".new", state)


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_a_run_goes_on_bit_for_bit(workers, two_data_sets, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    rng = np.random.default_rng(workers)
    folders = [two_data_sets / "red-set", two_data_sets / "green-set"]

    def run(name, batches, kills):
        """Lets the program run until it has made so many batches, and kills it on the way."""
        log = tmp_path / f"{name}.log"
        log.touch()
        while True:
            goal = min(batches, len(log.read_text().split()) + int(rng.integers(1, 6)))
            goal = goal if kills else batches
            command = [sys.executable, "run.py", log, tmp_path / f"{name}.json", str(workers)]
            process = subprocess.Popen(
                [*command, *folders],
                cwd=tmp_path,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"ELASTICTOK_TYPECHECK": "0"},
                start_new_session=True,
            )
            while len(log.read_text().split()) < goal and process.poll() is None:
                pass
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            # A batch after the last state may be in the log twice.
            done = log.read_text().split()
            if len(done) >= batches:
                return done

    expected = run("once", 14, kills=False)[:14]
    pieces = run("pieces", 14 + 4, kills=True)
    resumed = [digest for digest, _ in itertools.groupby(pieces)][:14]
    assert resumed == expected[: len(resumed)]
    assert len(resumed) >= 12
