"""How much is computed at once: tile sizes, by chip, type, head_dim and block. Never by length, so
that a new length needs no new entry and compiles with the tiles that the last one was tuned for.

What nobody has measured yet comes from a rule per chip and is marked as untuned. What
`python -m elastictok.attention.tune` measured is read from a file.
"""

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# The file that `python -m elastictok.attention.tune` wrote, if there is one.
TABLE_VARIABLE = "ELASTICTOK_ATTENTION_TILES"
_VERSION = 1
_LARGEST_FILE = 2**24  # bytes; a table of every chip is a hundredth of it


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """The tiles of one pass: the most, for any length. Lengths up to a tile run as one tile.

    **Arguments:**

    - `queries`, `keys`: tokens per tile.
    """

    queries: int
    keys: int

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"TileSizes.{name} is {size}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class XLATileSizes:
    """The tiles of `XLA`. The defaults suit the caches of CPUs.

    **Arguments:**

    - `forward`, `backward`: of each pass.
    """

    forward: TileSizes = TileSizes(512, 256)
    backward: TileSizes = TileSizes(512, 256)


@dataclasses.dataclass(frozen=True)
class TPUTileSizes:
    """The tiles of `PallasTPU`. On a TPU they are multiples of 128.

    **Arguments:**

    - `forward`: of the forward kernel.
    - `dq`, `dkv`: of the kernels for the gradient of the queries, and of the keys and values.
    - `vmem`: bytes of vector memory that a kernel may take.
    """

    forward: TileSizes
    dq: TileSizes
    dkv: TileSizes
    vmem: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.vmem < 1:
            raise ValueError(f"TPUTileSizes.vmem is {self.vmem} bytes; it must be at least 1")


Tiles = XLATileSizes | TPUTileSizes
_KINDS: Mapping[str, type[Tiles]] = {"xla": XLATileSizes, "pallas_tpu": TPUTileSizes}


@dataclasses.dataclass(frozen=True)
class TileKey:
    """What tile sizes depend on.

    **Arguments:**

    - `backend`: `"xla"` or `"pallas_tpu"`.
    - `chip`: `jax.Device.device_kind`.
    - `dtype`: the type of the products, such as `"bfloat16"`.
    - `head_dim`: width of a head.
    - `block`: tokens that a mask treats alike (`AbstractMask.granularity`), 1 if none.
    """

    backend: str
    chip: str
    dtype: str
    head_dim: int
    block: int


@dataclasses.dataclass(frozen=True)
class TileEntry:
    """A row of the table: `tuned` says when and with what, and is `None` if nobody measured it."""

    key: TileKey
    tiles: Tiles
    tuned: str | None = None


# The largest tile, and the vector memory to ask for: well below what the chip has (in MB: v4 16 per
# core; v5p and 7x 64; v5e and v6e 128). All compile, for every head_dim and type (tests/attention/
# test_aot.py). None was timed.
_TPUS: Mapping[str, tuple[int, int]] = {
    "TPU v4": (512, 16),
    "TPU v5 lite": (1024, 64),
    "TPU v5": (1024, 48),
    "TPU v6 lite": (1024, 64),
    "TPU7x": (1024, 48),
}
TPU_CHIPS = tuple(_TPUS)


def tile_sizes(key: TileKey, table: tuple[TileEntry, ...] | None = None) -> TileEntry:
    """The tile sizes for a key.

    **Arguments:**

    - `key`: what to look for. A table's entry fits if it has the same backend, chip, type and
      head_dim; of those, the one with the nearest block is taken.
    - `table`: entries that come before the untuned ones. Default: those of the file that the
      environment variable `ELASTICTOK_ATTENTION_TILES` names, if it is set.
    """
    table = _of_environment(os.environ.get(TABLE_VARIABLE, "")) if table is None else table
    fitting = [entry for entry in table if dataclasses.replace(entry.key, block=key.block) == key]
    if fitting:
        return min(fitting, key=lambda entry: abs(entry.key.block - key.block))
    return TileEntry(key, _untuned(key))


def _untuned(key: TileKey) -> Tiles:
    if key.backend == "xla":
        return XLATileSizes()
    largest, megabytes = _TPUS.get(key.chip, _TPUS["TPU v4"])
    # A tile larger than a block is part hidden on the diagonal; a small one starves the matrix
    # unit.
    size = min(largest, max(key.block, 256) if key.block > 1 else 512)
    if key.dtype == "float32":  # several passes of the matrix unit each: large tiles compile slowly
        size = min(size, 512)
    size = -(-size // 128) * 128
    tiles = TileSizes(size, size)
    return TPUTileSizes(tiles, tiles, tiles, megabytes * 2**20)


def chip_here() -> str:
    """The kind of this machine's devices."""
    return jax.devices()[0].device_kind


def tuned_now(milliseconds: Mapping[str, float]) -> str:
    """What `TileEntry.tuned` says of a measurement that was just taken."""
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in milliseconds.items())
    return f"{datetime.date.today()}, jax {jax.__version__}: {times}"


def write_tiles(path: str | Path, table: tuple[TileEntry, ...]) -> None:
    """Writes a table as JSON, one entry per line, all or nothing."""
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in table]
    text = f'{{"version": {_VERSION}, "entries": [\n' + ",\n".join(lines) + "\n]}\n"
    partial = Path(f"{path}.partial")
    partial.write_text(text)
    partial.replace(path)


def read_tiles(path: str | Path) -> tuple[TileEntry, ...]:
    """Reads a table that `write_tiles`, or the tuning command, wrote.

    **Raises:**

    `ValueError` naming the file and the entry if it is not such a table; `OSError` if it cannot be
    read.
    """
    path = Path(path)
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(
            f"{path} has more than {_LARGEST_FILE} bytes: it is no table of tile sizes"
        )
    try:
        content = json.loads(path.read_text())
        version, entries = content["version"], list(content["entries"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of tile sizes: {error!r}") from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version!r}; this elastictok reads {_VERSION}")
    table = []
    for number, entry in enumerate(entries):
        try:
            table.append(_entry(entry))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, entry {number}: {error!r}") from error
    return tuple(table)


def _entry(entry: Any) -> TileEntry:
    for field in dataclasses.fields(TileKey):
        if type(value := entry["key"][field.name]) is not field.type:
            raise TypeError(f"{field.name} is {value!r}, not of {field.type}")
    key = TileKey(**entry["key"])
    if key.backend not in _KINDS:
        raise ValueError(f"backend is {key.backend!r}, not one of {', '.join(_KINDS)}")
    tiles: dict[str, Any] = {
        name: _integer(name, value) if name == "vmem" else _sizes(name, value)
        for name, value in entry["tiles"].items()
    }
    tuned = entry["tuned"]
    if not (tuned is None or isinstance(tuned, str)):
        raise TypeError(f"tuned is {tuned!r}, neither text nor null")
    return TileEntry(key, _KINDS[key.backend](**tiles), tuned)


def _sizes(name: str, value: Any) -> TileSizes:
    return TileSizes(**{side: _integer(f"{name}.{side}", size) for side, size in value.items()})


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} is {value!r}, not an integer")
    return value


@functools.cache
def _of_environment(path: str) -> tuple[TileEntry, ...]:
    return read_tiles(path) if path else ()
