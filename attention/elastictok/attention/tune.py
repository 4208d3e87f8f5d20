"""Measures tile sizes on this machine's chip and writes the table that `attention` then uses.

    python -m elastictok.attention.tune --head-dim 64 128 --dtype bfloat16 --block 512 2048
    export ELASTICTOK_ATTENTION_TILES=$PWD/attention_tiles.json

The kernels for TPUs on a TPU, the tiled XLA backend elsewhere.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from elastictok.attention._masks import BlockCausal, Causal
from elastictok.attention._pallas_tpu import PallasTPU
from elastictok.attention._tile_sizes import (
    TileEntry,
    TileKey,
    Tiles,
    TileSizes,
    XLATileSizes,
    chip_here,
    read_tiles,
    tile_sizes,
    tuned_now,
    write_tiles,
)
from elastictok.attention._tiled import AbstractTiled, How, backward, forward
from elastictok.attention._xla import XLA


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured on, and how often.

    **Arguments:**

    - `length`: tokens; the tiles that are found serve any length.
    - `heads`: heads of queries, keys and values.
    - `sizes`: the tile sizes that are tried, for queries and for keys.
    - `repeats`: runs of each, of which the fastest counts.
    """

    length: int = 8192
    heads: int = 8
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    repeats: int = 5


def tune(key: TileKey, setting: Setting, say: Callable[[str], object] = print) -> TileEntry:
    """The fastest tile sizes for a key, measured on the device that is there.

    Each pass is measured alone. Sizes that do not compile, because they need too much memory, are
    said and left out.

    **Raises:**

    `RuntimeError` if no size of a pass can run.
    """
    best = tile_sizes(key, table=()).tiles
    milliseconds = {}
    for name in [field.name for field in dataclasses.fields(best) if field.name != "vmem"]:
        times: dict[TileSizes, float] = {}
        for queries, keys in itertools.product(setting.sizes, repeat=2):
            if max(queries, keys) > setting.length:
                continue
            sizes = TileSizes(queries, keys)
            try:
                seconds = _seconds(key, dataclasses.replace(best, **{name: sizes}), name, setting)
            except jax.errors.JaxRuntimeError as error:
                say(f"  {name} {queries} x {keys}: {str(error).splitlines()[0][:100]}")
                continue
            times[sizes] = seconds
            say(f"  {name} {queries} x {keys}: {seconds * 1e3:.3f} ms")
        if not times:
            raise RuntimeError(f"no tile sizes of {setting.sizes} can run {name} for {key}")
        fastest = min(times, key=lambda sizes: times[sizes])
        best = dataclasses.replace(best, **{name: fastest})
        milliseconds[f"{name} of {setting.length} tokens"] = times[fastest] * 1e3
    return TileEntry(key, best, tuned_now(milliseconds))


def _seconds(key: TileKey, tiles: Tiles, name: str, setting: Setting) -> float:
    """How long one pass takes."""
    backend: AbstractTiled
    if isinstance(tiles, XLATileSizes):
        backend = XLA(tiles=tiles)
    else:
        backend = PallasTPU(tiles=tiles)
    mask = Causal() if key.block == 1 else BlockCausal(block=key.block)
    leaves, structure = jax.tree.flatten(mask)
    how = How(backend, structure, key.head_dim**-0.5)
    leaves = tuple(map(jnp.asarray, leaves))
    shape = (setting.length, setting.heads, key.head_dim)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, *shape), key.dtype)
    rows = jnp.zeros((setting.heads, setting.length))

    @jax.jit
    def run() -> object:
        if name == "forward":
            return forward(how, q, k, v, leaves, dtype=q.dtype)
        dq, dk, dv = backward(how, q, k, v, rows, rows, d_out, leaves, dtype=q.dtype)
        # What is not returned is not computed.
        return {"dq": dq, "dkv": (dk, dv), "backward": (dq, dk, dv)}[name]

    jax.block_until_ready(run())
    times = []
    for _ in range(setting.repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def _keys(options: argparse.Namespace) -> Iterator[TileKey]:
    backend = "pallas_tpu" if jax.default_backend() == "tpu" else "xla"
    for dtype, head_dim, block in itertools.product(options.dtype, options.head_dim, options.block):
        yield TileKey(backend, chip_here(), dtype, head_dim, block)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m elastictok.attention.tune",
        description="Measure attention's tile sizes on this chip, and write the table to use.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Setting()
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128], help="widths of a head")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"], help="types"
    )
    parser.add_argument(
        "--block", type=int, nargs="+", default=[2048], help="tokens per block; 1 for causal"
    )
    parser.add_argument("--length", type=int, default=default.length, help="tokens to measure on")
    parser.add_argument("--heads", type=int, default=default.heads, help="heads to measure on")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(default.sizes), help="tile sizes to try"
    )
    parser.add_argument("--repeats", type=int, default=default.repeats, help="runs of each")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("attention_tiles.json"),
        help="the table; entries that it already has for other keys stay",
    )
    options = parser.parse_args(arguments)
    for name in ("head_dim", "block", "length", "heads", "sizes", "repeats"):
        values = getattr(options, name)
        if min([values] if isinstance(values, int) else values) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {values}")
    setting = Setting(options.length, options.heads, tuple(options.sizes), options.repeats)
    try:
        table = read_tiles(options.out) if options.out.exists() else ()
    except (ValueError, OSError) as error:
        parser.error(f"--out: {error}")
    for key in _keys(options):
        print(
            f"{key.backend} on {key.chip}: {key.dtype}, head_dim {key.head_dim}, block {key.block}"
        )
        entry = tune(key, setting)
        table = (*(other for other in table if other.key != key), entry)
        write_tiles(options.out, table)
        print(f"  fastest: {entry.tiles}")
    print(f"Wrote {options.out}. To use it:")
    print(f"  export ELASTICTOK_ATTENTION_TILES={options.out.resolve()}")


if __name__ == "__main__":
    main()
