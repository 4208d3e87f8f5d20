"""One clip, block after block, as a coroutine; and many of them side by side.

A walk asks for passes through the codec and is sent their results. Whoever runs it may put the
passes that several walks wait for into one call.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import UInt8

from ._allocate import Allocation, Round, Rounds, rounds
from ._codec import ElasticCodec
from ._strategies import AbstractStrategy, Block

Request = tuple[np.ndarray, int, Any]
Result = tuple[np.ndarray, Any]


class Cut(NamedTuple):
    """A block of a clip, ready to be encoded.

    - `truth`: its frames, without padding and repetition: what a reconstruction is compared with.
    - `pixels`: padded to whole patches, the last frame repeated: what the codec is given.
    - `block`: what the strategy is told, but for the length of the block before.
    """

    truth: UInt8[np.ndarray, "frames height width 3"]
    pixels: UInt8[np.ndarray, "frames_per_block padded_height padded_width 3"]
    block: Block


@final
@dataclass(frozen=True, eq=False)
class State:
    """Between two blocks of a clip.

    - `encoder`: the codec's state after the last block.
    - `decoder`: the codec's state before `behind`.
    - `behind`: blocks that the decoder has not seen, because nobody measured them: the arguments of
      `ElasticCodec.decode` for each.
    - `previous`: length of the last block, None before the first.
    """

    encoder: Any
    decoder: Any
    behind: tuple[tuple[np.ndarray, int], ...] = ()
    previous: int | None = None


@final
@dataclass(frozen=True, eq=False)
class Chosen:
    """A block's tokens and how they were found; the fields of `Allocation`, and what it took."""

    values: np.ndarray
    allocation: Allocation[None]
    encoder_evaluations: int
    decoder_evaluations: int
    frames: int
    seconds: float


class Ask(NamedTuple):
    """Passes that a walk waits for.

    - `decode`: through the decoder instead of the encoder.
    - `requests`: which.
    """

    decode: bool
    requests: list[Request]


# Yields what it waits for, or a finished block (which it is sent None for); returns the last state.
Walk = Generator[Ask | Chosen, list[Result] | None, State]


class _Probed(NamedTuple):
    """What a probe leaves behind besides its loss: the tokens, and the states after the block."""

    values: np.ndarray
    encoder: Any
    decoder: Any


def walk(
    codec: ElasticCodec, strategy: AbstractStrategy, cuts: Iterable[Cut], state: State
) -> Walk:
    """Lets the strategy search one block after another."""
    for cut in cuts:
        chosen, state = yield from _search(codec, strategy, cut, state)
        yield chosen
    return state


def _search(
    codec: ElasticCodec, strategy: AbstractStrategy, cut: Cut, state: State
) -> Generator[Ask | Chosen, list[Result] | None, tuple[Chosen, State]]:
    """One block. Every probe starts from the same states."""
    block = replace(cut.block, previous=state.previous)
    probes = _Probes(codec, strategy, cut, block, state)
    search: Rounds[_Probed] = rounds(strategy, block)
    wanted = next(search)
    while True:
        try:
            wanted = search.send((yield from probes(wanted)))
        except StopIteration as stop:
            return probes.close(stop.value)


class _Probes:
    """Measures lengths of one block, and counts the passes that it takes."""

    def __init__(
        self,
        codec: ElasticCodec,
        strategy: AbstractStrategy,
        cut: Cut,
        block: Block,
        state: State,
    ):
        self._codec, self._strategy, self._cut, self._block = codec, strategy, cut, block
        self._state = state
        self._passes = {False: 0, True: 0}  # by whether they decode
        # The length that the encoder was told last, and what it gave. For probes that tell it the
        # same: only one is kept, since it may hold megabytes of cache.
        self._encoded: tuple[int, Result] | None = None

    def __call__(
        self, wanted: Round
    ) -> Generator[Ask | Chosen, list[Result] | None, list[tuple[float, _Probed]]]:
        """The loss of each length wanted (NaN if it need not be measured), and what comes of it."""
        encodings = yield from self._encode(wanted.lengths)
        kept = [
            _kept(self._codec, values, length)
            for (values, _), length in zip(encodings, wanted.lengths, strict=True)
        ]
        if not wanted.measure:
            return [
                (math.nan, _Probed(values, encoder, None))
                for values, (_, encoder) in zip(kept, encodings, strict=True)
            ]
        yield from self._catch_up()
        asked = [(k, n, self._state.decoder) for k, n in zip(kept, wanted.lengths, strict=True)]
        decoded = yield from self._ask(True, asked)
        return [
            (self._loss(pixels), _Probed(values, encoder, decoder))
            for values, (_, encoder), (pixels, decoder) in zip(
                kept, encodings, decoded, strict=True
            )
        ]

    def close(self, found: Allocation[_Probed]) -> tuple[Chosen, State]:
        """The block's tokens, and the state after it."""
        probed, state = found.result, self._state
        if found.measured:
            after = State(probed.encoder, probed.decoder, (), found.length)
        else:
            behind = (*state.behind, (probed.values, found.length))
            after = State(probed.encoder, state.decoder, behind, found.length)
        chosen = Chosen(
            values=probed.values[: found.length],
            # Without the states: there is one of each at a time, however long the clip.
            allocation=Allocation(
                found.length,
                found.loss,
                found.met,
                found.monotone,
                found.measured,
                found.probed,
                None,
            ),
            encoder_evaluations=self._passes[False],
            decoder_evaluations=self._passes[True],
            frames=len(self._cut.truth),
            seconds=0.0,
        )
        return chosen, after

    def _encode(
        self, lengths: Sequence[int]
    ) -> Generator[Ask | Chosen, list[Result] | None, list[Result]]:
        told = [self._strategy.encoded_length(self._block, length) for length in lengths]
        known = {} if self._encoded is None else dict([self._encoded])
        new = [length for length in dict.fromkeys(told) if length not in known]
        if new:
            asked = [(self._cut.pixels, length, self._state.encoder) for length in new]
            known.update(zip(new, (yield from self._ask(False, asked)), strict=True))
        self._encoded = told[-1], known[told[-1]]
        return [known[length] for length in told]

    def _catch_up(self) -> Generator[Ask | Chosen, list[Result] | None, None]:
        """Shows the decoder the blocks before that nobody measured."""
        while self._state.behind:
            values, length = self._state.behind[0]
            ((_, decoder),) = yield from self._ask(True, [(values, length, self._state.decoder)])
            self._state = replace(self._state, decoder=decoder, behind=self._state.behind[1:])

    def _ask(
        self, decode: bool, requests: list[Request]
    ) -> Generator[Ask | Chosen, list[Result] | None, list[Result]]:
        self._passes[decode] += len(requests)
        results = yield Ask(decode, requests)
        assert results is not None  # what is asked for is answered
        return results

    def _loss(self, pixels: np.ndarray) -> float:
        truth = self._cut.truth
        count, height, width = truth.shape[:3]
        return float(self._strategy.criterion(truth, pixels[:count, :height, :width]))


def _kept(codec: ElasticCodec, values: np.ndarray, length: int) -> np.ndarray:
    """What a decoder that has only the kept tokens is given."""
    kept = codec.kind.zeros(len(values))
    kept[:length] = values[:length]
    return kept


def run(codec: ElasticCodec, one: Walk) -> Generator[Chosen, None, State]:
    """Runs one walk alone: yields each block as soon as it is found, returns the last state."""
    sent: list[Result] | None = None
    seconds = 0.0
    while True:
        start = time.perf_counter()
        try:
            wanted = one.send(sent)
        except StopIteration as stop:
            return stop.value
        if isinstance(wanted, Chosen):
            sent = None
            yield replace(wanted, seconds=seconds + time.perf_counter() - start)
            seconds = 0.0
            continue
        sent = _answer(codec, wanted.decode, wanted.requests)
        seconds += time.perf_counter() - start


class _Lane:
    """A walk that is under way."""

    def __init__(self, index: int, one: Walk):
        self.index, self._walk = index, one
        self.found: list[Chosen] = []
        self.wanted: Ask | None = None
        self._seconds = 0.0

    def step(self, results: list[Result] | None, seconds: float) -> None:
        """On to the next passes that it waits for; `wanted` is None when it is done.

        **Arguments:**

        - `results`: what it waited for; None at the start.
        - `seconds`: its share of the time that those took.
        """
        self._seconds += seconds
        while True:
            start = time.perf_counter()
            try:
                wanted = self._walk.send(results)
            except StopIteration:
                self.wanted = None
                return
            self._seconds += time.perf_counter() - start
            if not isinstance(wanted, Chosen):
                self.wanted = wanted
                return
            self.found.append(replace(wanted, seconds=self._seconds))
            self._seconds, results = 0.0, None


def run_side_by_side(
    codec: ElasticCodec, walks: Iterable[Callable[[], Walk]], lanes: int
) -> Iterator[tuple[int, list[Chosen]]]:
    """Runs many walks, `lanes` of them at a time, with their passes in common calls.

    One that is done makes room for the next and costs nothing more. A pass in a common call counts
    for its share of the call's time.

    **Arguments:**

    - `walks`: each begins when there is room for it.

    **Returns:** an iterator over the number of each walk and its blocks, in the order in which they
    end.
    """
    waiting = enumerate(walks)
    active: deque[_Lane] = deque()
    while True:
        while len(active) < lanes and (following := next(waiting, None)) is not None:
            lane = _Lane(following[0], following[1]())
            lane.step(None, 0.0)
            active.append(lane)
        if not active:
            return
        for decode in (False, True):
            _pass(codec, [lane for lane in active if lane.wanted and lane.wanted.decode is decode])
            for lane in [lane for lane in active if lane.wanted is None]:
                active.remove(lane)
                yield lane.index, lane.found


def _pass(codec: ElasticCodec, lanes: Sequence[_Lane]) -> None:
    """One call for all that these walks wait for, which is of one kind."""
    asks = [lane.wanted for lane in lanes if lane.wanted is not None]
    if not asks:
        return
    start = time.perf_counter()
    requests = [request for ask in asks for request in ask.requests]
    results = iter(_answer(codec, asks[0].decode, requests))
    each = (time.perf_counter() - start) / len(requests)
    for lane, ask in zip(lanes, asks, strict=True):
        lane.step([next(results) for _ in ask.requests], each * len(ask.requests))


def _answer(codec: ElasticCodec, decode: bool, requests: list[Request]) -> list[Result]:
    return codec.decode_batch(requests) if decode else codec.encode_batch(requests)
