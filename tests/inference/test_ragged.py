"""Ragged blocks as sequences, against a slow packer and grammar in plain Python."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.attention import BlockCausal, KeyValid, Segments
from elastictok.inference import Codes, Latents
from elastictok.inference.ragged import (
    EndOfBlock,
    LengthToken,
    Packed,
    Rectangle,
    from_rectangular,
    pack,
    rectangular,
    to_tokens,
    unpack,
)

KINDS = [EndOfBlock, LengthToken]
VOCABULARIES = st.sampled_from(
    [
        kind(size, shortest, longest)
        for kind in KINDS
        for size in [3, (3,), (2, 3), (4, 1, 2)]
        for shortest, longest in [(1, 1), (1, 4), (2, 3), (3, 6)]
    ]
)
# All documents of these, in the room given, are few enough to be listed.
TINY = [
    (kind(size, shortest, longest), room)
    for kind in KINDS
    for size, shortest, longest, room in [
        (2, 2, 3, 9),
        (1, 1, 4, 11),
        ((1, 2), 1, 2, 11),
        ((1, 1, 1), 2, 3, 22),
    ]
]


def sizes_of(v):
    return [v.codebook_size] if isinstance(v.codebook_size, int) else list(v.codebook_size)


@functools.cache
def layout(v):
    """The ids of each stream's codes, padding, beginning, ending, and the other marks."""
    sizes = sizes_of(v)
    codes = [[sum(sizes[:s]) + c for c in range(size)] for s, size in enumerate(sizes)]
    after = sum(sizes)
    marks = 1 if isinstance(v, EndOfBlock) else v.longest - v.shortest + 1
    return codes, after, after + 1, after + 2, [after + 3 + i for i in range(marks)]


def write_block(v, block):
    """The ids of a block given as a list of tokens, each a list of codes."""
    codes, _, _, _, marks = layout(v)
    flat = [codes[stream][code] for token in block for stream, code in enumerate(token)]
    return [*flat, *marks] if isinstance(v, EndOfBlock) else [marks[len(block) - v.shortest], *flat]


def write(v, document):
    _, _, beginning, ending, _ = layout(v)
    return [beginning, *(i for block in document for i in write_block(v, block)), ending]


def may_follow(v, prefix):
    """The set of ids that may follow a document's first ids, if room is not limited."""
    codes, padding, beginning, ending, marks = layout(v)
    streams = len(codes)
    if not prefix:
        return {beginning}
    if prefix[-1] in (ending, padding):
        return {padding}
    rest, blocks = prefix[1:], 0
    while rest:
        if isinstance(v, LengthToken):
            wanted = (marks.index(rest[0]) + v.shortest) * streams
            if len(rest) - 1 < wanted:
                return set(codes[(len(rest) - 1) % streams])
            rest = rest[1 + wanted :]
        elif marks[0] in rest:
            rest = rest[rest.index(marks[0]) + 1 :]
        else:
            tokens, stream = len(rest) // streams, len(rest) % streams
            end = {marks[0]} if stream == 0 and tokens >= v.shortest else set()
            return end | (set(codes[stream]) if tokens < v.longest else set())
        blocks += 1
    begin = set(codes[0]) if isinstance(v, EndOfBlock) else set(marks)
    return begin | ({ending} if blocks else set())


def first_fault(v, ids):
    """The first position that the grammar refuses, or None; the end counts as one."""
    for at in range(len(ids)):
        if ids[at] not in may_follow(v, ids[:at]):
            return at
    _, padding, _, _, _ = layout(v)
    return None if may_follow(v, ids) == {padding} else len(ids)


def read(v, ids):
    """A valid document's blocks, as lists of tokens."""
    codes, _, _, ending, marks = layout(v)
    blocks, block = [], []
    for id in ids[1 : ids.index(ending)]:
        stream = next((s for s, own in enumerate(codes) if id in own), None)
        if stream is None:
            assert id in marks
            blocks, block = [*blocks, block], []
        elif stream == 0:
            block.append([id - codes[0][0]])
        else:
            block[-1].append(id - codes[stream][0])
    blocks.append(block)
    # An end comes after its block, a length before.
    return blocks[:-1] if isinstance(v, EndOfBlock) else blocks[1:]


def arrays(v, document):
    """A document given as lists, as the arrays that the code under test takes."""
    one = isinstance(v.codebook_size, int)
    blocks = [np.array(block, np.int32) for block in document]
    return [block[:, 0] if one else block for block in blocks]


def same(blocks, expected):
    return len(blocks) == len(expected) and all(
        a.dtype == np.int32 and a.shape == b.shape and (a == b).all()
        for a, b in zip(blocks, expected, strict=True)
    )


@st.composite
def documents(draw, v, most=4):
    token = st.tuples(*(st.integers(0, size - 1) for size in sizes_of(v))).map(list)
    block = st.lists(token, min_size=v.shortest, max_size=v.longest)
    return draw(st.lists(block, min_size=1, max_size=most))


@st.composite
def corpora(draw, most=6):
    """A vocabulary, documents, and a length of sequences that the longest block fits."""
    v = draw(VOCABULARIES)
    clips = draw(st.lists(documents(v), min_size=0, max_size=most))
    least = max([1, *(len(ids) for clip in clips for ids in units(v, clip))])
    return v, clips, least + draw(st.integers(0, 40))


def units(v, document):
    blocks = [write_block(v, block) for block in document]
    _, _, beginning, ending, _ = layout(v)
    blocks[0] = [beginning, *blocks[0]]
    blocks[-1] = [*blocks[-1], ending]
    return blocks


def slow_pack(v, clips, length):
    """Rows of (id, segment, block start, position, document, valid)."""
    _, padding, beginning, _, _ = layout(v)
    rows = []
    for document, clip in enumerate(clips):
        parts, position = [[]], 0
        for unit in units(v, clip):
            if len(parts[-1]) + len(unit) > length:
                parts.append([])
            starts = 1 if unit[0] == beginning else 0
            for i, id in enumerate(unit):
                parts[-1].append((id, i == starts, position, document))
                position += 1
        for part in parts:
            row = next((r for r in rows if len(r) + len(part) <= length), None)
            if row is None:
                row = []
                rows.append(row)
            segment = row[-1][1] + 1 if row else 1
            row += [(id, segment, start, at, doc, True) for id, start, at, doc in part]
    return [row + [(padding, 0, False, 0, -1, False)] * (length - len(row)) for row in rows]


NAMES = ("ids", "segments", "block_starts", "positions", "documents", "valid")


@given(st.data())
def test_ids_are_laid_out_as_described(data):
    v = data.draw(VOCABULARIES)
    codes, padding, beginning, ending, marks = layout(v)
    assert [*range(v.vocabulary_size)] == [
        *itertools.chain(*codes),
        padding,
        beginning,
        ending,
        *marks,
    ]
    assert (v.padding, v.beginning, v.ending) == (padding, beginning, ending)
    assert [range(a, b) for a, b in itertools.pairwise(v.offsets)] == [
        range(own[0], own[-1] + 1) for own in codes
    ]
    if isinstance(v, EndOfBlock):
        assert [v.end_of_block] == marks
    else:
        assert [v.length_id(n) for n in range(v.shortest, v.longest + 1)] == marks
    again = type(v)(v.codebook_size, v.shortest, v.longest)
    assert again == v
    assert hash(again) == hash(v)


@given(st.data())
def test_documents_are_written_and_read(data):
    v = data.draw(VOCABULARIES)
    document = data.draw(documents(v))
    blocks = arrays(v, document)
    ids = v.encode(blocks)
    assert (ids.dtype, ids.tolist()) == (np.int32, write(v, document))
    assert [v.encode_block(b).tolist() for b in blocks] == [write_block(v, b) for b in document]
    assert [v.block_ids(len(b)) for b in blocks] == [len(write_block(v, b)) for b in document]
    padded = np.pad(ids, (0, data.draw(st.integers(0, 3))), constant_values=v.padding)
    assert same(v.decode(padded), blocks)
    assert all(same([v.codes_of(v.code_ids(b))], [b]) for b in blocks)


@given(st.data())
def test_foreign_ids_are_refused_where_they_are(data):
    v = data.draw(VOCABULARIES)
    ids = write(v, data.draw(documents(v))) + [v.padding] * data.draw(st.integers(0, 2))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(ids) - 1))
        change = data.draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        id = [data.draw(st.integers(-1, v.vocabulary_size))]
        ids = {
            "replace": ids[:at] + id + ids[at + 1 :],
            "insert": ids[:at] + id + ids[at:],
            "delete": ids[:at] + ids[at + 1 :],
            "cut": ids[: at + 1],
        }[change]
    check_decoded(v, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, (2, 1)])
def test_every_single_change_is_refused_where_it_is(kind, size):
    v = kind(size, 1, 3)
    token = [0] * len(sizes_of(v))
    ids = [*write(v, [[token] * 2, [token] * 3]), v.padding, v.padding]
    for at in range(len(ids) + 1):
        check_decoded(v, ids[:at])
        for id in range(-1, v.vocabulary_size + 1):
            check_decoded(v, [*ids[:at], id, *ids[at + 1 :]])


def check_decoded(v, ids):
    """What is read, or where it is refused and what was allowed there, is the oracle's."""
    fault = first_fault(v, ids)
    if fault is None:
        assert same(v.decode(np.array(ids)), arrays(v, read(v, ids)))
        return
    found = f"id {ids[fault]}" if fault < len(ids) else "no more ids"
    with pytest.raises(
        ValueError, match=rf"^{found} at position {fault}; allowed there: ."
    ) as info:
        v.decode(np.array(ids, np.int64))
    # What it says was allowed is what was: single ids, or ranges.
    said = set()
    for part in str(info.value).split("(")[1:]:
        first, _, last = part.split(")")[0].partition(" to ")
        said |= set(range(int(first), int(last or first) + 1))
    assert said == may_follow(v, ids[:fault])


@given(corpora())
def test_packing_is_that_of_the_slow_packer(corpus):
    v, clips, length = corpus
    packed = pack([arrays(v, clip) for clip in clips], v, length)
    rows = slow_pack(v, clips, length)
    for index, name in enumerate(NAMES):
        array = getattr(packed, name)
        assert array.shape == (len(rows), length)
        assert array.dtype == (bool if name in ("block_starts", "valid") else np.int32)
        assert array.tolist() == [[entry[index] for entry in row] for row in rows], name


@given(corpora(), st.randoms(use_true_random=False))
def test_packing_loses_and_doubles_nothing(corpus, random):
    v, clips, length = corpus
    clips = [arrays(v, clip) for clip in clips]
    packed = pack(clips, v, length)
    rows = list(range(len(packed.ids)))
    random.shuffle(rows)  # as a training set does
    shuffled = Packed(**{name: getattr(packed, name)[rows] for name in NAMES})
    for each in (packed, shuffled):
        unpacked = unpack(each, v)
        assert len(unpacked) == len(clips)
        assert all(same(got, clip) for got, clip in zip(unpacked, clips, strict=True))
    assert packed.block_starts.sum() == sum(map(len, clips))


@settings(max_examples=6)
@given(corpora())
def test_attention_sees_its_own_document_only(corpus):
    v, clips, length = corpus
    packed = pack([arrays(v, clip) for clip in clips[:2]], v, length)
    for i in range(len(packed.ids)):
        mask = BlockCausal(1) & Segments(packed.segments[i]) & KeyValid(packed.valid[i])
        label = [(d, s) for d, s in zip(packed.documents[i], packed.segments[i], strict=True)]
        expected = [
            [k <= q and label[q] == label[k] and label[k][0] >= 0 for k in range(length)]
            for q in range(length)
        ]
        assert np.asarray(mask.dense(length, length)).tolist() == expected


def test_parts_that_are_missing_or_doubled_are_refused():
    v = EndOfBlock(5, 1, 4)
    packed = pack([[np.arange(4), np.arange(3), np.arange(4)], [np.arange(2)]], v, 7)
    assert unpack(packed, v)[1][0].tolist() == [0, 1]
    for rows in ([1, 2], [0, 0, 1, 2]):
        part = Packed(**{name: getattr(packed, name)[rows] for name in NAMES})
        with pytest.raises(ValueError, match=r"document 0 is not whole: .* unpack everything"):
            unpack(part, v)
    with pytest.raises(ValueError, match=r"document 0: id 6 at position 0; allowed there"):
        unpack(packed, EndOfBlock(4, 1, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind, make_tokens):
    v = kind(5, 2, 4)
    good = np.arange(4)
    least = v.block_ids(4) + 2
    assert len(pack([[good]], v, least).ids) == 1
    with pytest.raises(ValueError, match=rf"document 1: block 0 takes {least} ids .*={least} or"):
        pack([[np.arange(2)], [good]], v, least - 1)
    for bad, message in [
        ([good, np.arange(1)], "block 1: a block of 1 tokens; this vocabulary allows 2 to 4"),
        ([np.arange(5)], "block 0: a block of 5 tokens"),
        ([np.array([4, 5])], "block 0: code 5 at token 1, stream 0; the code book there has 5"),
        ([np.array([-1, 0])], "block 0: code -1 at token 0"),
        ([np.zeros((2, 1), np.int32)], r"shape \(2, 1\).*codebook_size=5 give \(length\)"),
        ([np.zeros(2)], "codes of type float64; give integers"),
        ([], "without blocks"),
        (make_tokens((2, 3)), "codebook_size of 125 and the vocabulary of 5; use " + kind.__name__),
        (make_tokens((2, 3), Latents(4)), "dim=4.*vectors have no ids; use a model with a discr"),
    ]:
        with pytest.raises(ValueError, match="document 1: .*" + message):
            pack([[good], bad], v, 20)
    with pytest.raises(ValueError, match="without blocks"):
        v.encode([])
    with pytest.raises(ValueError, match="code 2 at token 1, stream 1; the code book there has 2"):
        kind((3, 2), 1, 4).encode([np.array([[2, 1], [2, 2]])])
    with pytest.raises(ValueError, match=r"ids of shape \(1, 2\)"):
        v.decode(np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="vectors have no ids"):
        kind.of(make_tokens(kind=Latents(4)))
    for arguments in [(0, 1, 2), ((), 1, 2), ((3, 0), 1, 2), (3, 0, 2), (3, 3, 2)]:
        with pytest.raises(ValueError, match=r"needs at least 1 code|leave no choice"):
            kind(*arguments)
    with pytest.raises(ValueError, match="int32: split codes into streams"):
        kind(2**31 - 4, 1, 2)
    for room, blocks in [(least - 3, None), (2 * least - 7, 2), (2**30, 1)]:
        with pytest.raises(ValueError, match=f"room for {room} ids"):
            v.start(room, blocks=blocks)
    with pytest.raises(ValueError, match="at least 1"):
        v.start(blocks=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [None, 1, 3])
def test_tokens_are_packed(kind, streams, make_tokens):
    clips = [make_tokens((3, 5, 2), Codes(7, streams)), make_tokens((16,), Codes(7, streams), 1)]
    v = kind.of(clips[0])
    assert v == kind(7 if streams is None else (7,) * streams, 2, 16)
    for clip, blocks in zip(clips, unpack(pack(clips, v, 60), v), strict=True):
        assert same(blocks, [clip.block(i) for i in range(clip.blocks)])


# What is sampled


@functools.cache
def masks(v):
    """The masks before each id, of many documents at once."""

    def scan(state, ids):
        def step(state, id):
            return v.advance(state, id), v.allowed(state)

        return jax.lax.scan(step, state, ids)[1]

    return jax.jit(jax.vmap(scan))


def language(v, room):
    """Every document of at most so many ids, as its number of blocks and its ids."""
    tokens = [list(t) for t in itertools.product(*map(range, sizes_of(v)))]
    every = [
        list(block)
        for length in range(v.shortest, v.longest + 1)
        for block in itertools.product(tokens, repeat=length)
    ]
    found, grown = [], [[]]
    while grown:
        grown = [d for old in grown for b in every if len(write(v, d := [*old, b])) <= room]
        found += [(len(d), write(v, d)) for d in grown]
    return found


@pytest.mark.parametrize(("v", "most"), TINY, ids=str)
def test_the_mask_is_exact(v, most):
    """At every prefix of every document: the ids that some document in the room goes on with."""
    documents, states, expected = [], [], []
    every = language(v, most)
    for room, blocks in itertools.product(range(most + 1), [None, 1, 2]):
        ids = [own for count, own in every if len(own) <= room and blocks in (None, count)]
        ids = [own + [v.padding] * (most - len(own)) for own in ids]
        follow = {}
        for own in ids:
            for at, id in enumerate(own):
                follow.setdefault(tuple(own[:at]), set()).add(id)
        if not ids:
            with pytest.raises(ValueError, match=f"room for {room} ids"):
                v.start(room, blocks=blocks)
            continue
        states += [v.start(room, blocks=blocks)] * len(ids)
        documents += ids
        expected += [[follow[tuple(own[:at])] for at in range(most)] for own in ids]
    stacked = jax.tree.map(lambda *x: np.stack(x), *states)
    got = np.asarray(masks(v)(stacked, jnp.array(documents)))
    allowed = np.zeros_like(got)
    for i, row in enumerate(expected):
        for at, ids in enumerate(row):
            allowed[i, at, [*ids]] = True
    assert (got == allowed).all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample(v, room, states, keys):
    """Ids sampled under the mask from random logits that prefer some ids by far."""

    def one(state, key):
        def step(state, key):
            allowed = v.allowed(state)
            logits = bias + 3 * jax.random.normal(key, (v.vocabulary_size,))
            id = jnp.argmax(jnp.where(allowed, logits, -jnp.inf))
            return v.advance(state, id), (id, allowed.any())

        key, start = jax.random.split(key)
        bias = 6 * jax.random.normal(start, (v.vocabulary_size,))
        return jax.lax.scan(step, state, jax.random.split(key, room))[1]

    return jax.vmap(one)(states, keys)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_sampled_under_the_mask_decodes(kind):
    v, room = kind((8, 8, 5), 2, 9), 60
    wanted = [None, 1, 2] * 40
    states = [v.start(room, blocks=blocks) for blocks in wanted]
    states = jax.tree.map(lambda *x: np.stack(x), *states)
    keys = jax.random.split(jax.random.key(0), len(wanted))
    ids, any_allowed = (np.asarray(x) for x in sample(v, room, states, keys))
    assert any_allowed.all()
    free = set()
    for row, blocks in zip(ids.tolist(), wanted, strict=True):
        assert first_fault(v, row) is None
        document = read(v, row)
        assert same(v.decode(np.array(row)), arrays(v, document))
        assert blocks in (None, len(document))
        free |= {len(document)} if blocks is None else set()
    assert len(free) > 1


@functools.cache
def along(v):
    return jax.jit(jax.vmap(v.allowed_along))


@given(st.sampled_from([*itertools.product(KINDS, [3, (2, 3)])]), st.data())
def test_masks_along_packed_sequences(kind, data):
    """Those of each document by itself, wherever it was packed to."""
    v, length, rows = kind[0](kind[1], 1, 4), 16, 4
    clips = data.draw(st.lists(documents(v), min_size=1, max_size=4))
    packed = pack([arrays(v, clip) for clip in clips], v, length)
    padded = [
        np.pad(x, ((0, max(rows - len(x), 0)), (0, 0)))[:rows]
        for x in (packed.ids, packed.segments)
    ]
    got = np.asarray(along(v)(*padded))
    for row, at in np.ndindex(min(len(packed.ids), rows), length):
        segments = packed.segments[row]
        if not segments[at]:
            expected = {v.padding}
        else:
            whole = write(v, clips[packed.documents[row, at]])
            prefix = whole[: packed.positions[row, at]]
            expected = may_follow(v, prefix)
            if prefix and (at == 0 or segments[at - 1] != segments[at]):
                expected -= {v.ending}  # a segment that goes on does so with a block
        assert packed.ids[row, at] in expected
        assert set(np.flatnonzero(got[row, at]).tolist()) == expected


# As many ids in both, so that operations are compiled once.
@pytest.mark.parametrize("v", [EndOfBlock((4, 3), 1, 3), LengthToken((3, 2), 1, 3)], ids=str)
def test_jit_and_vmap_are_eager(v):
    allowed, advance = jax.jit(v.allowed), jax.jit(v.advance)
    state = v.start(12)
    states, ids = [], write(v, [[[0, 1], [2, 0]]])
    for id in ids:
        states.append(state)
        state = advance(state, id)
    eager = [v.allowed(state) for state in states]
    for state, id, mask in zip(states, ids, eager, strict=True):
        assert (mask == allowed(state)).all()
        assert eqx.tree_equal(advance(state, id), v.advance(state, jnp.array(id)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    assert (jax.vmap(v.allowed)(stacked) == jnp.stack(eager)).all()


def test_without_a_limit_of_room_documents_go_on():
    v = LengthToken(4, 1, 3)
    state = v.start()
    advance = jax.jit(v.advance)
    for id in write(v, [[[0]]] * 500)[:-1]:
        state = advance(state, id)
    assert set(np.flatnonzero(v.allowed(state)).tolist()) == may_follow(v, write(v, [[[0]]])[:-1])


# Rectangles, and back to tokens


@given(st.data())
def test_rectangles(data):
    v = data.draw(VOCABULARIES)
    document = data.draw(documents(v))
    blocks = arrays(v, document)
    rectangle = rectangular(blocks, v)
    shape = (len(document), v.longest, *blocks[0].shape[1:])
    assert (rectangle.ids.dtype, rectangle.ids.shape) == (np.int32, shape)
    codes = layout(v)[0]
    for i, block in enumerate(document):
        assert rectangle.keep[i].tolist() == [t < len(block) for t in range(v.longest)]
        padding = [[v.padding] * len(codes)] * (v.longest - len(block))
        flat = [[codes[s][c] for s, c in enumerate(token)] for token in block]
        assert rectangle.ids[i].reshape(v.longest, -1).tolist() == flat + padding
    # A generator may put anything where nothing is kept.
    noise = np.where(rectangle.ids == v.padding, data.draw(st.integers(-1, 99)), rectangle.ids)
    assert same(from_rectangular(Rectangle(noise, rectangle.keep), v), blocks)


def test_rectangles_that_are_none_are_refused():
    v = EndOfBlock((3, 2), 1, 3)
    good = rectangular([np.array([[0, 1], [2, 0]])], v)
    assert from_rectangular(good, v)[0].tolist() == [[0, 1], [2, 0]]
    swapped = good.ids[..., ::-1]
    for ids, keep, message in [
        (good.ids[..., 0], good.keep, r"give \(blocks, 3, 2\) and \(blocks, 3\)"),
        (good.ids, good.keep[0], r"keep of shape \(3,\)"),
        (good.ids, [[True, False, True]], "block 0 keeps 2 tokens up to position 2; it must keep"),
        (good.ids, [[False] * 3], "block 0 keeps 0 tokens"),
        (good.ids, [[True] * 3], r"block 0: id 5 at position 4; allowed there: a code \(0 to 2\)"),
        (swapped, good.keep, "block 0: id 4 at position 0"),
        (good.ids.astype(float), good.keep, "give integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_rectangular(Rectangle(ids, np.array(keep)), v)


@pytest.mark.parametrize("streams", [None, 2])
def test_generated_blocks_are_tokens(make_tokens, streams):
    like = make_tokens((3, 5, 2), Codes(7, streams), first_block=4)
    blocks = [like.block(1), like.block(2)]
    made = to_tokens(blocks, like)
    assert same([made.block(0), made.block(1)], blocks)
    assert (made.frames, made.picture, made.first_block, made.seconds) == (4, False, 0, None)
    assert np.isnan(made.losses).all()
    assert not (made.met | made.monotone | made.measured).any()
    assert not made.evaluations.any()
    for name in ("height", "width", "fps", "window", "fingerprint", "codebook_size"):
        assert getattr(made, name) == getattr(like, name)
    picture = make_tokens((3,), Codes(7, streams), frames=1, picture=True)
    assert to_tokens(blocks[:1], picture).picture
    assert to_tokens(blocks, picture).frames == 4
    with pytest.raises(ValueError, match="block 1: a block of 17 tokens"):
        to_tokens([blocks[0], np.zeros((17, *blocks[0].shape[1:]), np.int32)], like)
    with pytest.raises(ValueError, match="without blocks"):
        to_tokens([], like)
