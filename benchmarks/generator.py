"""A tiny generator, trained for a minute on ragged tokens, whose samples all decode.

    elastictok demo
    python benchmarks/generator.py                # writes generated.png
    python benchmarks/generator.py --model RUN --data FOLDER --steps 1000

`docs/generators.md` explains it. The model needs FSQ, as the demo's has: a code is generated digit
by digit, because a tiny generator learns 39 digits in a minute, and 64,000 codes never.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from elastictok.attention import BlockCausal, KeyValid, Segments
from elastictok.data import find_media, read_media, write_picture
from elastictok.inference import MSE, Binary, Tokenizer, Tokens
from elastictok.inference.ragged import (
    AbstractVocabulary,
    LengthToken,
    Packed,
    State,
    pack,
    to_tokens,
)
from elastictok.models import (
    Cells,
    ElasticTok,
    Linear,
    RankRotary,
    Raster,
    RMSNorm,
    Transformer,
    count_parameters,
    load,
)
from elastictok.quantizers import FSQ

SEQUENCE_LENGTH = 512
CELLS = Cells(Raster(), (1, 1, 1))  # positions are ranks, which need no cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="elastictok-demo", help="a model folder")
    parser.add_argument("--data", type=Path, help="default: what the demo was trained on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crops", type=int, default=40, help="of each picture")
    parser.add_argument("--out", type=Path, default=Path("generated.png"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()

    model = load(arguments.model)
    tokenizer = Tokenizer(model, Binary(MSE(0.04)))
    folder = arguments.data or Path(arguments.model) / "data" / "train"
    clips = [tokenizer.encode(frames) for frames in material(folder, arguments.crops)]
    lengths = np.concatenate([tokens.lengths for tokens in clips])
    say(start, f"{len(clips)} documents, {len(lengths)} blocks, {lengths.mean():.1f} tokens each")

    vocabulary = vocabulary_for(model, clips[0])
    packed = pack([digits(model, tokens) for tokens in clips], vocabulary, SEQUENCE_LENGTH)
    filled = f"{packed.valid.mean():.0%} of {packed.ids.shape[0]} sequences"
    say(start, f"{filled} filled, {vocabulary.vocabulary_size} ids")

    generator = Generator(vocabulary.vocabulary_size, key=jax.random.key(arguments.seed))
    say(start, f"training {count_parameters(generator):,} parameters")
    generator, _ = train(
        generator,
        vocabulary,
        packed,
        steps=arguments.steps,
        seed=arguments.seed,
        report=lambda step, loss: say(start, f"step {step}  loss {loss:.3f} per id"),
    )

    rows = []
    for blocks in (1, 2):
        made = generate(generator, model, vocabulary, clips[-1], blocks, count=8, seed=0)
        say(start, f"sampled blocks of {[tokens.lengths.tolist() for tokens in made]} tokens")
        frames = np.stack([tokenizer.decode(tokens) for tokens in made])
        firsts = frames[:, :: model.frames_per_block]  # of each block
        rows += [np.concatenate(list(row), axis=1) for row in firsts.swapaxes(0, 1)]
    write_picture(arguments.out, np.concatenate(rows))
    say(start, f"wrote {arguments.out}: pictures of one block; below, clips of two")


def material(folder: Path, crops: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Random square crops of the pictures, and what is in the clips, six frames at a time."""
    rng = np.random.default_rng(seed)
    media = find_media(folder)
    for path in media.pictures:
        frames = read_media(path).frames
        height, width = frames.shape[1:3]
        for _ in range(crops):
            side = int(min(height, width) * rng.uniform(0.25, 1.0))
            y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
            yield frames[:, y : y + side, x : x + side]
    for path in media.clips:
        frames = read_media(path).frames
        for first in range(0, len(frames) - 5, 6):
            yield frames[first : first + 6]


def vocabulary_for(model: ElasticTok, tokens: Tokens) -> LengthToken:
    """Ids for the digits of FSQ's codes: a stream for each digit."""
    return LengthToken(levels(model), tokens.shortest, tokens.tokens_per_block)


def levels(model: ElasticTok) -> tuple[int, ...]:
    if not isinstance(model.quantizer, FSQ):
        raise ValueError(f"the model's quantizer is {model.quantizer}; this example needs FSQ")
    return model.quantizer.levels


def digits(model: ElasticTok, tokens: Tokens) -> list[np.ndarray]:
    """`[length digits]` of each block; FSQ's first digit is the fastest."""
    rows = (tokens.block(index) for index in range(tokens.blocks))
    return [np.stack(np.unravel_index(row, levels(model), order="F"), axis=-1) for row in rows]


def codes(model: ElasticTok, blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`[length]` of each block, the inverse of `digits`."""
    return [np.ravel_multi_index(tuple(rows.T), levels(model), order="F") for rows in blocks]


class Generator(eqx.Module):
    """A transformer from ids to logits of the next one."""

    embedding: jax.Array
    transformer: Transformer
    norm: RMSNorm
    head: Linear

    def __init__(self, ids: int, *, dim: int = 128, layers: int = 3, heads: int = 4, key):
        e, t, h = jax.random.split(key, 3)
        self.embedding = jax.random.normal(e, (ids, dim))
        self.transformer = Transformer(
            dim=dim, hidden=2 * dim, layers=layers, heads=heads, rotary=RankRotary(1e4), key=t
        )
        self.norm = RMSNorm(dim, 1e-5)
        self.head = Linear(dim, ids, std=0.02, key=h)

    def __call__(self, ids, segments, positions):
        """`f32[length vocabulary]`: at each position, of the id after it."""
        mask = BlockCausal(1) & Segments(segments) & KeyValid(segments > 0)
        x = self.transformer(self.embedding[ids], mask, positions, CELLS)
        return self.head(self.norm(x))

    def extend(self, id, cache):
        """The same for one more id, with a cache of those before it."""
        x, cache = self.transformer.extend(self.embedding[id][None], cache, CELLS)
        return self.head(self.norm(x))[0], cache


def loss_of(generator: Generator, vocabulary: AbstractVocabulary, batch: jax.Array) -> jax.Array:
    """Cross-entropy of the next id among those allowed, over pairs of one document."""

    def one(sequence):
        ids, segments, positions = sequence
        allowed = vocabulary.allowed_along(ids, segments)[1:]
        logits = jnp.where(allowed, generator(ids, segments, positions)[:-1], -jnp.inf)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:])
        counts = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        return jnp.where(counts, losses, 0.0).sum(), counts.sum()

    total, count = jax.vmap(one)(batch)
    return total.sum() / count.sum()


def train(
    generator: Generator,
    vocabulary: AbstractVocabulary,
    packed: Packed,
    *,
    steps: int,
    seed: int,
    batch_size: int = 4,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Generator, list[float]]:
    """The trained generator, and the loss of each step."""
    rates = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates))
    state = optimizer.init(eqx.filter(generator, eqx.is_array))

    @eqx.filter_jit
    def update(generator, state, batch):
        loss, gradient = eqx.filter_value_and_grad(loss_of)(generator, vocabulary, batch)
        updates, state = optimizer.update(gradient, state, eqx.filter(generator, eqx.is_array))
        return eqx.apply_updates(generator, updates), state, loss

    # What is known of each id: itself, its segment, its position.
    sequences = jnp.stack([packed.ids, packed.segments, packed.positions], axis=1)
    rng = np.random.default_rng(seed)
    losses = []
    for step in range(1, steps + 1):
        batch = sequences[rng.integers(0, len(sequences), batch_size)]
        generator, state, loss = update(generator, state, batch)
        losses.append(float(loss))
        if step % 20 == 0:
            report(step, losses[-1])
    return generator, losses


def generate(
    generator: Generator,
    model: ElasticTok,
    vocabulary: AbstractVocabulary,
    like: Tokens,
    blocks: int,
    *,
    count: int,
    seed: int,
) -> list[Tokens]:
    """`count` pictures or clips of so many blocks, as tokens that the model decodes."""
    room = 2 + blocks * vocabulary.block_ids(vocabulary.longest)
    state = vocabulary.start(room, blocks=blocks)
    ids = sample(generator, vocabulary, state, room, jax.random.split(jax.random.key(seed), count))
    return [to_tokens(codes(model, vocabulary.decode(row)), like) for row in np.asarray(ids)]


@eqx.filter_jit
def sample(
    generator: Generator, vocabulary: AbstractVocabulary, state: State, room: int, keys: jax.Array
) -> jax.Array:
    """`i32[keys room]`: a document from each key, each valid, whatever the generator thinks."""

    def one(key):
        def step(carry, key):
            state, logits, cache = carry
            logits = jnp.where(vocabulary.allowed(state), logits, -jnp.inf)
            id = jax.random.categorical(key, logits)
            logits, cache = generator.extend(id, cache)
            return (vocabulary.advance(state, id), logits, cache), id

        cache = generator.transformer.init_cache(room, 1)
        carry = state, jnp.zeros(vocabulary.vocabulary_size), cache
        return jax.lax.scan(step, carry, jax.random.split(key, room))[1]

    return jax.vmap(one)(keys)


def say(start: float, text: str) -> None:
    print(f"{time.perf_counter() - start:5.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
