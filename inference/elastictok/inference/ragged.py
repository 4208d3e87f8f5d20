"""Blocks of differing lengths as fixed sequences of ids, for those who train generators on tokens.

A document (a picture or clip) is written as

    beginning, block, block, ..., ending

and a block as its codes, closed by an end (`EndOfBlock`) or led by the number of its tokens
(`LengthToken`). `pack` puts documents into sequences of one length, `unpack` gets them back. A
vocabulary's `start`, `allowed` and `advance` are the grammar as data for `jax.lax.scan`: whatever
is sampled under the mask `allowed` decodes.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int32

from ._tokens import Tokens
from ._vocabulary import (
    AbstractVocabulary,
    Blocks,
    EndOfBlock,
    LengthToken,
    State,
    codebook_size_of,
    described,
    integers,
)

__all__ = [
    "AbstractVocabulary",
    "Blocks",
    "EndOfBlock",
    "LengthToken",
    "Packed",
    "Rectangle",
    "State",
    "from_rectangular",
    "pack",
    "rectangular",
    "to_tokens",
    "unpack",
]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """Documents in sequences of one length. NumPy arrays, all `[sequences length]`.

    - `ids`: `i32`; padding at the end of a sequence.
    - `segments`: `i32`, 1, 2, ... for the documents of a sequence, 0 for padding.
    - `block_starts`: `bool`, true at the first id of each block (its length, where announced).
    - `positions`: `i32`, index of an id in its document; 0 for padding. A document that continues
      in another sequence goes on counting.
    - `documents`: `i32`, which of the packed clips an id belongs to; -1 for padding.
    - `valid`: `bool`, false for padding.

    They are what attention takes: `BlockCausal(1) & Segments(segments[i]) & KeyValid(valid[i])`
    lets an id see those before it in its own document, and padding nothing.
    """

    ids: Int32[np.ndarray, "sequences length"]
    segments: Int32[np.ndarray, "sequences length"]
    block_starts: Bool[np.ndarray, "sequences length"]
    positions: Int32[np.ndarray, "sequences length"]
    documents: Int32[np.ndarray, "sequences length"]
    valid: Bool[np.ndarray, "sequences length"]


@final
@dataclass(frozen=True)
class _Piece:
    """What of a document goes into one sequence."""

    document: int
    position: int  # of its first id in the document
    ids: np.ndarray
    starts: np.ndarray


def pack(
    clips: Iterable[Tokens | Blocks], vocabulary: AbstractVocabulary, sequence_length: int
) -> Packed:
    """Packs documents into sequences: each, in the order given, into the first one with room.

    A document that is longer than a sequence is split between blocks, into parts of as many whole
    blocks as fit a sequence, which are packed as any other. Each part is a segment; only the first
    has the beginning, only the last the ending. Nothing is dropped, cut or repeated.

    **Arguments:**

    - `clips`: `Tokens`, or the codes of each block.
    - `vocabulary`: how they are written.
    - `sequence_length`: ids in a sequence.

    **Raises:** `ValueError` if a clip does not fit the vocabulary, or a single block of it (with
    the beginning or ending beside it) does not fit a sequence. It says which.
    """
    sequences: list[list[_Piece]] = []
    room: list[int] = []
    open_ = []  # sequences that may take more, in order
    least = vocabulary.block_ids(vocabulary.shortest)  # no piece is shorter
    for piece in _pieces(clips, vocabulary, sequence_length):
        index = next((i for i in open_ if room[i] >= len(piece.ids)), len(sequences))
        if index == len(sequences):
            sequences.append([])
            room.append(sequence_length)
            open_.append(index)
        sequences[index].append(piece)
        room[index] -= len(piece.ids)
        if room[index] < least:
            open_.remove(index)
    return _packed(sequences, vocabulary, sequence_length)


def unpack(packed: Packed, vocabulary: AbstractVocabulary) -> list[list[np.ndarray]]:
    """The codes of each block of each document, in the order in which they were packed.

    **Raises:** `ValueError` if parts of a document are missing or doubled, or are not written in
    this vocabulary.
    """
    where = np.flatnonzero(packed.valid)
    documents, positions, ids = (
        array.reshape(-1)[where] for array in (packed.documents, packed.positions, packed.ids)
    )
    order = np.lexsort((positions, documents))
    documents, positions, ids = documents[order], positions[order], ids[order]
    count = int(documents[-1]) + 1 if len(documents) else 0
    ends = np.searchsorted(documents, np.arange(count + 1))
    unpacked = []
    for index, (start, stop) in enumerate(itertools.pairwise(ends)):
        whole = np.array_equal(positions[start:stop], np.arange(stop - start))
        if not whole or start == stop:
            raise ValueError(
                f"document {index} is not whole: its {stop - start} positions do not count from 0; "
                "unpack everything that was packed together"
            )
        with _naming("document", index):
            unpacked.append(vocabulary.decode(ids[start:stop]))
    return unpacked


@final
@dataclass(frozen=True, eq=False)
class Rectangle:
    """Blocks of one document, each padded to the longest length.

    - `ids`: `i32[blocks longest]`, or `i32[blocks longest streams]` if `codebook_size` is a tuple.
    - `keep`: `bool[blocks longest]`, true for tokens that are kept: a prefix of each block.
    """

    ids: np.ndarray
    keep: np.ndarray


def rectangular(clip: Tokens | Blocks, vocabulary: AbstractVocabulary) -> Rectangle:
    """Pads each block to exactly `longest` positions, for generators that want a rectangle.

    Code ids only, each stream's its own, and `padding` where `keep` is false; no other marks.

    **Raises:** `ValueError` if the clip does not fit the vocabulary.
    """
    blocks = _blocks(clip, vocabulary)
    shape = (len(blocks), vocabulary.longest)
    ids = np.full((*shape, *vocabulary.token_shape), vocabulary.padding, np.int32)
    keep = np.zeros(shape, np.bool_)
    for index, codes in enumerate(blocks):
        with _naming("block", index):
            flat = vocabulary.code_ids(codes)
        ids[index, : len(codes)] = flat.reshape(-1, *vocabulary.token_shape)
        keep[index, : len(codes)] = True
    return Rectangle(ids, keep)


def from_rectangular(rectangle: Rectangle, vocabulary: AbstractVocabulary) -> list[np.ndarray]:
    """The codes of each block; ids where `keep` is false are not looked at.

    **Raises:** `ValueError` if shapes differ, or `keep` is not a prefix, of an allowed length, or
    a kept id is not a code of its stream. It says where.
    """
    ids, keep = integers("ids", rectangle.ids), np.asarray(rectangle.keep, np.bool_)
    longest, row = vocabulary.longest, vocabulary.token_shape
    if keep.shape[1:] != (longest,) or ids.shape != keep.shape + row:
        raise ValueError(
            f"ids of shape {ids.shape} and keep of shape {keep.shape}; give "
            f"{described('blocks', longest, *row)} and {described('blocks', longest)}"
        )
    ids, blocks = ids.reshape(len(ids), -1), []
    for index, length in enumerate(map(int, keep.sum(axis=1))):
        if not (vocabulary.shortest <= length and keep[index, :length].all()):
            raise ValueError(
                f"block {index} keeps {length} tokens up to position "
                f"{int(np.flatnonzero(keep[index]).max(initial=-1))}; it must keep its first "
                f"{vocabulary.shortest} to {longest}"
            )
        with _naming("block", index):
            blocks.append(vocabulary.codes_of(ids[index, : length * vocabulary.streams]))
    return blocks


def to_tokens(blocks: Blocks, like: Tokens) -> Tokens:
    """`Tokens` of generated blocks, which `Tokenizer.decode` takes.

    **Arguments:**

    - `blocks`: the codes of each block, as the model that made `like` writes them.
    - `like`: tokens of the same model: size, rate and window are taken from them. A single block
      is a picture if they are one.

    **Returns:** tokens of which nothing was measured.

    **Raises:** `ValueError` if the blocks are not such as `like`'s.
    """
    vocabulary = EndOfBlock.of(like)
    blocks = _blocks(blocks, vocabulary)
    for index, codes in enumerate(blocks):
        with _naming("block", index):
            vocabulary.code_ids(codes)
    count = len(blocks)
    picture = like.picture and count == 1
    return dataclasses.replace(
        like,
        codes=np.concatenate(blocks).astype(np.int32),
        lengths=np.array([len(codes) for codes in blocks], np.int32),
        losses=np.full(count, np.nan),
        met=np.zeros(count, np.bool_),
        monotone=np.zeros(count, np.bool_),
        measured=np.zeros(count, np.bool_),
        encoder_evaluations=np.zeros(count, np.int32),
        decoder_evaluations=np.zeros(count, np.int32),
        seconds=None,
        first_block=0,
        frames=1 if picture else count * like.frames_per_block,
        picture=picture,
    )


def _blocks(clip: Tokens | Blocks, vocabulary: AbstractVocabulary) -> Blocks:
    """The codes of each block, not checked yet."""
    if not isinstance(clip, Tokens):
        if not len(clip):
            raise ValueError("a document without blocks; it needs at least 1")
        return clip
    size = codebook_size_of(clip)
    if size != vocabulary.codebook_size:
        raise ValueError(
            f"the tokens have a codebook_size of {size} and the vocabulary of "
            f"{vocabulary.codebook_size}; use {type(vocabulary).__name__}.of(tokens)"
        )
    return [clip.block(index) for index in range(clip.blocks)]


def _pieces(
    clips: Iterable[Tokens | Blocks], vocabulary: AbstractVocabulary, sequence_length: int
) -> Iterator[_Piece]:
    for document, clip in enumerate(clips):
        with _naming("document", document):
            units = _units(_encoded(clip, vocabulary), vocabulary)
            spans = _split([len(ids) for ids in units], sequence_length)
        position = 0
        for span in spans:
            ids = np.concatenate(units[span])
            # A block starts its unit, but for the first, which the beginning goes before.
            starts = np.cumsum([0, *map(len, units[span])])[:-1]
            starts[0] += span.start == 0
            yield _Piece(document, position, ids, starts)
            position += len(ids)


def _encoded(clip: Tokens | Blocks, vocabulary: AbstractVocabulary) -> list[np.ndarray]:
    encoded = []
    for index, codes in enumerate(_blocks(clip, vocabulary)):
        with _naming("block", index):
            encoded.append(vocabulary.encode_block(codes))
    return encoded


def _units(blocks: list[np.ndarray], vocabulary: AbstractVocabulary) -> list[np.ndarray]:
    """What must not be parted: blocks, the first and last with the beginning and the ending."""
    units = list(blocks)
    units[0] = np.insert(units[0], 0, vocabulary.beginning)
    units[-1] = np.append(units[-1], np.int32(vocabulary.ending))
    return units


def _split(sizes: list[int], most: int) -> list[slice]:
    """Runs of units of at most `most` ids together, each as long as it can be."""
    spans, start, size = [], 0, 0
    for index, more in enumerate(sizes):
        if more > most:
            raise ValueError(
                f"block {index} takes {more} ids and a sequence has {most}; pass "
                f"sequence_length={more} or more, or truncate the tokens"
            )
        if size + more > most:
            spans.append(slice(start, index))
            start, size = index, 0
        size += more
    return [*spans, slice(start, len(sizes))]


def _packed(
    sequences: list[list[_Piece]], vocabulary: AbstractVocabulary, sequence_length: int
) -> Packed:
    shape = (len(sequences), sequence_length)
    ids = np.full(shape, vocabulary.padding, np.int32)
    documents = np.full(shape, -1, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    block_starts = np.zeros(shape, np.bool_)
    for row, pieces in enumerate(sequences):
        at = 0
        for segment, piece in enumerate(pieces, start=1):
            span = slice(at, at + len(piece.ids))
            ids[row, span] = piece.ids
            documents[row, span] = piece.document
            segments[row, span] = segment
            positions[row, span] = piece.position + np.arange(len(piece.ids))
            block_starts[row, at + piece.starts] = True
            at = span.stop
    return Packed(
        ids=ids,
        segments=segments,
        block_starts=block_starts,
        positions=positions,
        documents=documents,
        valid=segments > 0,
    )


@contextlib.contextmanager
def _naming(what: str, index: int) -> Iterator[None]:
    """Errors say of which document or block they speak."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} {index}: {error}") from error
