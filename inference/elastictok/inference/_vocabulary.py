"""The grammar of ids: documents of blocks, for generators of tokens."""

import abc
import itertools
from collections.abc import Sequence
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._tokens import Tokens

# Room that never runs out; sums of it and a block's ids stay within int32.
_UNLIMITED = 2**29
_NOT_BEGUN, _WITHIN, _OVER = range(3)

Blocks = Sequence[np.ndarray]
"""The codes of a document's blocks, `[length]` or `[length streams]` integers each."""


@final
class State(eqx.Module):
    """How far a document has come: all that its next id depends on. Scalars; batch by `jax.vmap`.

    - `stage`: 0 before the beginning, 1 within the document, 2 after its ending.
    - `length`: the most tokens that the current block may have (all that it must have, if it was
      announced); 0 between blocks.
    - `tokens`: whole tokens of the current block so far.
    - `stream`: the stream that the next code belongs to.
    - `room`: ids that may still come.
    - `owed`: blocks that have yet to come before the document may end.
    - `more`: whether blocks may come that are not owed.
    """

    stage: Int[Array, ""]
    length: Int[Array, ""]
    tokens: Int[Array, ""]
    stream: Int[Array, ""]
    room: Int[Array, ""]
    owed: Int[Array, ""]
    more: Bool[Array, ""]


class AbstractVocabulary(eqx.Module):
    """What each id means: codes first (each stream has ids of its own), then the marks.

    In this order: the codes of the first stream, of the next, ..., `padding`, `beginning`,
    `ending`, and the marks of the subclass. Immutable, hashable, without arrays: close over it in
    a jitted function.

    - `codebook_size`: codes of a token; or a tuple, codes of each of its streams. Ids go through
      the streams of a token before the next token.
    - `shortest`, `longest`: the lengths that a block may have, in tokens, both included.
    """

    codebook_size: eqx.AbstractVar[int | tuple[int, ...]]
    shortest: eqx.AbstractVar[int]
    longest: eqx.AbstractVar[int]

    def __check_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(
                f"codebook_size is {self.codebook_size}; a stream needs at least 1 code"
            )
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"lengths from {self.shortest} to {self.longest} leave no choice; a block needs "
                "1 <= shortest <= longest"
            )
        if self.vocabulary_size >= 2**31 or self.block_ids(self.longest) >= _UNLIMITED:
            raise ValueError(
                f"{self.vocabulary_size} ids and {self.block_ids(self.longest)} for a block; below "
                f"{2**31} and {_UNLIMITED} fit into int32: split codes into streams, or shorten "
                "the blocks"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each stream."""
        size = self.codebook_size
        return (size,) if isinstance(size, int) else size

    @property
    def streams(self) -> int:
        """Ids that make a token."""
        return len(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first id of each stream, and the one after the last stream's."""
        return tuple(itertools.accumulate(self.sizes, initial=0))

    @property
    def padding(self) -> int:
        """Fills what is left of a sequence."""
        return self.offsets[-1]

    @property
    def beginning(self) -> int:
        """The first id of a document."""
        return self.padding + 1

    @property
    def ending(self) -> int:
        """The last id of a document."""
        return self.padding + 2

    @property
    @abc.abstractmethod
    def vocabulary_size(self) -> int:
        """Number of ids."""

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of a token's codes: `()` or `(streams,)`."""
        return () if isinstance(self.codebook_size, int) else (self.streams,)

    def block_ids(self, length: int) -> int:
        """Ids that a block of so many tokens takes: its codes, and an end or a length."""
        return length * self.streams + 1

    def code_ids(self, codes: np.ndarray) -> np.ndarray:
        """`i32[length * streams]` of one block, without marks.

        **Arguments:**

        - `codes`: integers `[length]`, or `[length streams]` if `codebook_size` is a tuple.

        **Raises:** `ValueError` for another shape, a length that is not allowed, or codes outside
        their code book.
        """
        codes = integers("codes", codes)
        if not codes.ndim or codes.shape[1:] != self.token_shape:
            raise ValueError(
                f"codes of shape {codes.shape}; for codebook_size={self.codebook_size} give "
                f"{described('length', *self.token_shape)}"
            )
        self._check_length(len(codes))
        rows = codes.reshape(-1, self.streams)
        wrong = np.argwhere((rows < 0) | (rows >= np.array(self.sizes)))
        if len(wrong):
            token, stream = wrong[0]
            raise ValueError(
                f"code {rows[token, stream]} at token {token}, stream {stream}; the code book "
                f"there has {self.sizes[stream]}: use the vocabulary of the tokens' model"
            )
        return (rows + np.array(self.offsets[:-1])).reshape(-1).astype(np.int32)

    def codes_of(self, code_ids: np.ndarray) -> np.ndarray:
        """The codes of one block, the inverse of `code_ids`.

        **Raises:** `ValueError` at the first id that is not a code of the stream whose turn it is;
        for parts of a token; or for a length that is not allowed.
        """
        ids = integers("code_ids", code_ids).reshape(-1)
        run = self._run(ids, 0, len(ids))
        stream = len(run) % self.streams
        if stream or len(run) < len(ids):
            raise _refused(ids, len(run), [self._names(stream)])
        self._check_length(len(ids) // self.streams)
        return self._codes(ids)

    def encode(self, blocks: Blocks) -> np.ndarray:
        """`i32[ids]` of a whole document: beginning, blocks, ending.

        **Raises:** `ValueError` if there are no blocks, or for what `encode_block` does not take.
        """
        if not len(blocks):
            raise ValueError("a document without blocks; it needs at least 1")
        parts = [self.encode_block(codes) for codes in blocks]
        return np.concatenate([[self.beginning], *parts, [self.ending]]).astype(np.int32)

    @abc.abstractmethod
    def encode_block(self, codes: np.ndarray) -> np.ndarray:
        """`i32[ids]` of one block, marks included; takes and refuses what `code_ids` does."""

    def decode(self, ids: np.ndarray) -> list[np.ndarray]:
        """The codes of each block of one whole document, the inverse of `encode`.

        **Arguments:**

        - `ids`: integers: beginning, blocks, ending, and perhaps padding.

        **Returns:** `i32[length]` or `i32[length streams]` for each block.

        **Raises:** `ValueError` at the first id that the grammar does not allow; it names the
        position, the id and what was allowed.
        """
        ids = integers("ids", ids)
        if ids.ndim != 1:
            raise ValueError(f"ids of shape {ids.shape}; give those of one document, one axis")
        blocks = []
        if _id(ids, 0) != self.beginning:
            raise _refused(ids, 0, [f"the beginning ({self.beginning})"])
        at = 1
        while not (blocks and _id(ids, at) == self.ending):
            or_else = [f"the ending ({self.ending})"] if blocks else []
            flat, at = self._read(ids, at, or_else)
            blocks.append(self._codes(flat))
        foreign = np.flatnonzero(ids[at + 1 :] != self.padding)
        if len(foreign):
            raise _refused(ids, at + 1 + int(foreign[0]), [f"padding ({self.padding})"])
        return blocks

    def start(self, room: int | None = None, *, blocks: int | None = None) -> State:
        """The state before a document.

        **Arguments:**

        - `room`: ids that will be sampled, beginning and ending included: the document is led to
          its end within them, and padding follows. None does not limit them.
        - `blocks`: exactly how many blocks the document shall have; None leaves it to the sampler,
          who gives at least one.

        **Raises:** `ValueError` if the shortest such document does not fit.
        """
        count = 1 if blocks is None else blocks
        if count < 1:
            raise ValueError(f"blocks is {blocks}; a document has at least 1")
        least = 2 + count * self.block_ids(self.shortest)
        room = _UNLIMITED if room is None else room
        if not least <= room <= _UNLIMITED:
            raise ValueError(
                f"room for {room} ids; {count} blocks of {self.shortest} tokens take {least}: give "
                f"{least} to {_UNLIMITED}"
            )
        return _state(_NOT_BEGUN, room, count, blocks is None)

    def allowed(self, state: State) -> Bool[Array, "vocabulary"]:
        """The ids that may come next: never none of them.

        The first is the beginning, whatever the logits say; after the ending comes padding. A
        document cannot be led into a corner: a block is only begun, and a token only added, if
        what must come after it has room. Pure, of fixed shape: for `jit`, `vmap` and `scan`.
        """
        ids = jnp.arange(self.vocabulary_size)
        may_end = (state.length == 0) & (state.owed == 0)
        within = jnp.where(ids == self.ending, may_end, self._continues(state, ids))
        return jnp.select(
            [state.stage == _NOT_BEGUN, state.stage == _WITHIN],
            [ids == self.beginning, within],
            ids == self.padding,
        )

    def advance(self, state: State, id: Int[Array, ""] | int) -> State:
        """The state after one more id, which must be an allowed one: this is not checked."""
        id = jnp.asarray(id)
        code = id < self.padding
        wraps = code & (state.stream + 1 == self.streams)
        tokens = state.tokens + wraps
        opened = self._opened(state, id)
        length = state.length + opened
        closes = self._closes(id, tokens, length)
        stage = jnp.where(id == self.beginning, _WITHIN, state.stage)
        over = (id == self.ending) | (id == self.padding)
        return State(
            stage=jnp.where(over, _OVER, stage),
            length=jnp.where(closes, 0, length),
            tokens=jnp.where(closes, 0, tokens),
            stream=jnp.where(code & ~wraps, state.stream + 1, 0),
            room=state.room - 1,
            owed=jnp.maximum(state.owed - (opened > 0), 0),
            more=state.more,
        )

    def allowed_along(
        self, ids: Int[Array, "length"], segments: Int[Array, "length"]
    ) -> Bool[Array, "length vocabulary"]:
        """For each position of a packed sequence, the ids that were allowed there, given those
        before it in its segment: the mask for training under the distribution that is sampled.

        Room is not limited. The first position of a document allows the beginning; of a segment
        that continues one, a block. Padding allows padding.
        """
        first = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])

        def step(state, inputs):
            id, segment, first = inputs
            stage = jnp.where(id == self.beginning, _NOT_BEGUN, _WITHIN)
            stage = jnp.where(segment == 0, _OVER, stage)
            fresh = _state(stage, _UNLIMITED, 1, True)
            state = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, state)
            return self.advance(state, id), self.allowed(state)

        return jax.lax.scan(step, self.start(), (ids, segments, first))[1]

    @abc.abstractmethod
    def _read(self, ids: np.ndarray, at: int, or_else: list[str]) -> tuple[np.ndarray, int]:
        """The code ids of the block at `at`, and the position after it. `or_else` may stand at `at`
        instead: for the error.
        """

    @abc.abstractmethod
    def _continues(self, state: State, ids: Int[Array, "vocabulary"]) -> Bool[Array, "vocabulary"]:
        """Within a document, which ids go on with a block or begin one."""

    @abc.abstractmethod
    def _opened(self, state: State, id: Int[Array, ""]) -> Int[Array, ""]:
        """The most tokens of the block that an id opens; 0 if it opens none."""

    @abc.abstractmethod
    def _closes(
        self, id: Int[Array, ""], tokens: Int[Array, ""], length: Int[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether an id, by which a block of at most `length` tokens has `tokens`, is its last."""

    def _reserve(self, owed: Int[Array, ""]) -> Int[Array, ""]:
        """The fewest ids that blocks still owed take, and the ending."""
        return owed * self.block_ids(self.shortest) + 1

    def _fits(self, state: State, tokens: Int[Array, "..."] | int) -> Bool[Array, "..."]:
        """Whether a block of so many tokens may begin."""
        ids = tokens * self.streams + 1 + self._reserve(jnp.maximum(state.owed - 1, 0))
        return ((state.owed > 0) | state.more) & (ids <= state.room)

    def _in_stream(self, state: State, ids: Int[Array, "vocabulary"]) -> Bool[Array, "vocabulary"]:
        """The codes of the stream whose turn it is."""
        offsets = jnp.asarray(self.offsets)
        return (offsets[state.stream] <= ids) & (ids < offsets[state.stream + 1])

    def _run(self, ids: np.ndarray, at: int, most: int) -> np.ndarray:
        """As many ids from `at` on, at most `most`, as are codes of the stream whose turn it is."""
        run = ids[at : at + most]
        stream = np.arange(len(run)) % self.streams
        offsets = np.array(self.offsets)
        wrong = np.flatnonzero((run < offsets[stream]) | (run >= offsets[stream + 1]))
        return run[: wrong[0]] if len(wrong) else run

    def _codes(self, flat: np.ndarray) -> np.ndarray:
        rows = flat.reshape(-1, self.streams) - np.array(self.offsets[:-1])
        return rows.astype(np.int32).reshape(-1, *self.token_shape)

    def _check_length(self, length: int) -> None:
        if not self.shortest <= length <= self.longest:
            raise ValueError(
                f"a block of {length} tokens; this vocabulary allows {self.shortest} to "
                f"{self.longest}: truncate, or build it with other bounds"
            )

    def _names(self, stream: int) -> str:
        return f"a code ({self.offsets[stream]} to {self.offsets[stream + 1] - 1})"


@final
class EndOfBlock(AbstractVocabulary):
    """A block is its codes and an end, `end_of_block`; a generator decides as it goes.

    The end comes after `shortest` tokens at the earliest, and must come after `longest`.

    **Arguments:** see `AbstractVocabulary`. `EndOfBlock.of(tokens)` takes them from `Tokens`.
    """

    codebook_size: int | tuple[int, ...] = eqx.field(static=True)
    shortest: int = eqx.field(static=True)
    longest: int = eqx.field(static=True)

    @classmethod
    def of(cls, tokens: Tokens) -> "EndOfBlock":
        """The vocabulary for tokens of this model and size.

        **Raises:** `ValueError` if they are latents, which have no ids.
        """
        return cls(codebook_size_of(tokens), tokens.shortest, tokens.tokens_per_block)

    @property
    def end_of_block(self) -> int:
        """Closes a block."""
        return self.ending + 1

    @property
    def vocabulary_size(self) -> int:
        return self.end_of_block + 1

    def encode_block(self, codes: np.ndarray) -> np.ndarray:
        return np.append(self.code_ids(codes), np.int32(self.end_of_block))

    def _read(self, ids: np.ndarray, at: int, or_else: list[str]) -> tuple[np.ndarray, int]:
        flat = self._run(ids, at, self.longest * self.streams)
        tokens, stream = divmod(len(flat), self.streams)
        stop = at + len(flat)
        allowed = [] if len(flat) else or_else
        if not stream and tokens >= self.shortest:
            if _id(ids, stop) == self.end_of_block:
                return flat, stop + 1
            allowed = [f"the end of the block ({self.end_of_block})"]
        if tokens < self.longest:
            allowed = [self._names(stream), *allowed]
        raise _refused(ids, stop, allowed)

    def _continues(self, state: State, ids: Int[Array, "vocabulary"]) -> Bool[Array, "vocabulary"]:
        whole = state.stream == 0
        again = state.room >= self.streams + 1 + self._reserve(state.owed)
        code = jnp.where(
            state.length == 0,
            self._fits(state, self.shortest),
            ~whole | ((state.tokens < self.longest) & again),
        )
        end = whole & (state.tokens >= self.shortest)
        return jnp.where(ids == self.end_of_block, end, self._in_stream(state, ids) & code)

    def _opened(self, state: State, id: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where((state.length == 0) & (id < self.padding), self.longest, 0)

    def _closes(
        self, id: Int[Array, ""], tokens: Int[Array, ""], length: Int[Array, ""]
    ) -> Bool[Array, ""]:
        return id == self.end_of_block


@final
class LengthToken(AbstractVocabulary):
    """A block is the number of its tokens, an id for each length allowed, and its codes.

    A generator commits itself before the first code: a budget can be planned.

    **Arguments:** see `AbstractVocabulary`. `LengthToken.of(tokens)` takes them from `Tokens`.
    """

    codebook_size: int | tuple[int, ...] = eqx.field(static=True)
    shortest: int = eqx.field(static=True)
    longest: int = eqx.field(static=True)

    @classmethod
    def of(cls, tokens: Tokens) -> "LengthToken":
        """The vocabulary for tokens of this model and size.

        **Raises:** `ValueError` if they are latents, which have no ids.
        """
        return cls(codebook_size_of(tokens), tokens.shortest, tokens.tokens_per_block)

    def length_id(self, length: int) -> int:
        """The id that announces a length.

        **Raises:** `ValueError` if a block may not have it.
        """
        self._check_length(length)
        return self.ending + 1 + length - self.shortest

    @property
    def vocabulary_size(self) -> int:
        return self.length_id(self.longest) + 1

    def encode_block(self, codes: np.ndarray) -> np.ndarray:
        flat = self.code_ids(codes)
        return np.append(np.int32(self.length_id(len(codes))), flat)

    def _read(self, ids: np.ndarray, at: int, or_else: list[str]) -> tuple[np.ndarray, int]:
        first, last = self.length_id(self.shortest), self.length_id(self.longest)
        announced = _id(ids, at)
        if announced is None or not first <= announced <= last:
            raise _refused(ids, at, [f"a length ({first} to {last})", *or_else])
        wanted = (announced - first + self.shortest) * self.streams
        flat = self._run(ids, at + 1, wanted)
        if len(flat) < wanted:
            allowed = self._names(len(flat) % self.streams)
            raise _refused(ids, at + 1 + len(flat), [allowed])
        return flat, at + 1 + wanted

    def _continues(self, state: State, ids: Int[Array, "vocabulary"]) -> Bool[Array, "vocabulary"]:
        lengths = jnp.clip(self._length(ids), self.shortest, self.longest)
        announces = (self._length(ids) >= self.shortest) & self._fits(state, lengths)
        return jnp.where(state.length == 0, announces, self._in_stream(state, ids))

    def _opened(self, state: State, id: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where(id > self.ending, self._length(id), 0)

    def _closes(
        self, id: Int[Array, ""], tokens: Int[Array, ""], length: Int[Array, ""]
    ) -> Bool[Array, ""]:
        return (id < self.padding) & (tokens == length)

    def _length(self, ids: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """What an id announces; below `shortest` for ids that announce nothing."""
        return ids - (self.ending + 1) + self.shortest


def _state(stage: Int[Array, ""] | int, room: int, owed: int, more: bool) -> State:
    zero = jnp.zeros((), jnp.int32)
    stage = jnp.asarray(stage, jnp.int32)
    return State(stage, zero, zero, zero, zero + room, zero + owed, jnp.asarray(more))


def codebook_size_of(tokens: Tokens) -> int | tuple[int, ...]:
    """As vocabularies take it."""
    kind = tokens.kind
    if tokens.codes is None or tokens.codebook_size is None:
        raise ValueError(
            f"these tokens are {kind}: vectors have no ids; use a model with a discrete quantizer "
            "(FSQ, VQ, LFQ, Residual), or a generator of continuous latents"
        )
    size = tokens.codebook_size
    return size if tokens.codes.ndim == 1 else (size,) * tokens.codes.shape[1]


def described(*axes: str | int) -> str:
    """For errors."""
    return f"({', '.join(map(str, axes))})"


def integers(name: str, values: np.ndarray) -> np.ndarray:
    """**Raises:** `ValueError` unless they are integers."""
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} of type {array.dtype}; give integers")
    return array.astype(np.int64)


def _id(ids: np.ndarray, at: int) -> int | None:
    return int(ids[at]) if at < len(ids) else None


def _refused(ids: np.ndarray, at: int, allowed: list[str]) -> ValueError:
    found = "no more ids" if _id(ids, at) is None else f"id {ids[at]}"
    return ValueError(f"{found} at position {at}; allowed there: {' or '.join(allowed)}")
