"""The official implementation's checkpoints: its options, its names of tensors, its files."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from elastictok.quantizers import FSQ, AbstractQuantizer, GaussianVAE

from . import presets
from ._decoder import Decoder
from ._describe import ModelFileError, differences, listed, named, replaced
from ._elastictok import ElasticTok
from ._encoder import Encoder
from ._folder import converted, placement, put
from ._order import Raster
from ._patching import Patching
from ._rope import RankRotary
from ._stream import Name, StoredArray, scan

# Options that change how the official program runs, and no weight and no value. `scan_layers`, too:
# stacked and separate layers are told apart by the tensors' names.
_RUNNING = {
    "lpips_loss_ratio",
    "mask_mode",
    "mask_type",
    "mesh_dim",
    "param_scan_axis",
    "remat_attention",
    "remat_block",
    "remat_mlp",
    "scan_attention",
    "scan_key_chunk_size",
    "scan_layers",
    "scan_mlp",
    "scan_mlp_chunk_size",
    "scan_query_chunk_size",
    "use_flash_attention",
}


@dataclasses.dataclass(frozen=True)
class OfficialConfig:
    """The options of the official implementation that decide what a model is, by its names.

    `OFFICIAL_FSQ` and `OFFICIAL_VAE` are the two released models, and
    `dataclasses.replace(OFFICIAL_FSQ, hidden_size=512)` is another size; `OfficialConfig.read`
    takes a JSON file. `resolution` is the height and width of the frames, which the official code
    has among the options of its data.

    **Raises:** `ValueError` naming an option that makes no model.
    """

    bottleneck_type: Literal["fsq", "vae"]
    patch_size: tuple[int, int, int]
    frames_per_block: int
    min_toks: int
    max_toks: int
    max_sequence_length: int
    theta: float
    fsq_quant_levels: tuple[int, ...] = presets.FSQ_64K
    vae_bottleneck_dim: int = 8
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_encoder_layers: int = 10
    num_decoder_layers: int = 10
    num_attention_heads: int = 8
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    resolution: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if field.name != "bottleneck_type" and not 0 < number < math.inf:
                    raise ValueError(f"{field.name} is {value}; it must be above 0")
        grid = Patching(*self.patch_size).grid(
            self.frames_per_block, self.resolution, self.resolution
        )
        if math.prod(grid) != self.max_toks:
            raise ValueError(
                f"a block of {self.frames_per_block} frames of {self.resolution}x{self.resolution} "
                f"pixels in patches of {self.patch_size} has {math.prod(grid)} tokens, and "
                f"max_toks is {self.max_toks}; give the resolution that the model was trained at"
            )
        _ = self.quantizer  # which checks its own options
        if self.max_sequence_length % self.max_toks:
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}, which is not a whole number "
                f"of blocks of max_toks = {self.max_toks} tokens"
            )

    @staticmethod
    def read(path: str | os.PathLike[str]) -> "OfficialConfig":
        """From a JSON file; see `from_options`.

        **Raises:** `ValueError` for a file that is not one; `OSError` if it cannot be read.
        """
        try:
            options = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"{path} holds a {type(options).__name__}, not options by their names")
        try:
            return OfficialConfig.from_options(options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> "OfficialConfig":
        """From the official options by their names.

        What is not given is as in the released model of that `bottleneck_type`, but `resolution`,
        which follows from `max_toks` for square frames. Options that only change how the official
        program runs are passed over.

        **Raises:** `ValueError` naming options that do not exist or make no model.
        """
        known = {field.name for field in dataclasses.fields(OfficialConfig)}
        unknown = sorted(str(name) for name in set(options) - known - _RUNNING)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there are no options {', '.join(unknown)}{hint}")
        bottleneck = options.get("bottleneck_type")
        if bottleneck not in ("fsq", "vae"):
            raise ValueError(f"bottleneck_type is {bottleneck!r}; it must be fsq or vae")
        config = OFFICIAL_FSQ if bottleneck == "fsq" else OFFICIAL_VAE
        values = {
            name: _like(name, getattr(config, name), value)
            for name, value in options.items()
            if name in known
        }
        if "resolution" not in values:
            values["resolution"] = _square(dataclasses.asdict(config) | values)
        return dataclasses.replace(config, **values)

    @functools.lru_cache(maxsize=8)  # noqa: B019  a config is a few numbers
    def shapes(self) -> ElasticTok:
        """The model with a `jax.ShapeDtypeStruct` for each array."""
        return eqx.filter_eval_shape(self.build, key=jax.random.key(0))

    @property
    def quantizer(self) -> AbstractQuantizer:
        """The bottleneck; it has no weights."""
        if self.bottleneck_type == "fsq":
            return FSQ(self.fsq_quant_levels)
        return GaussianVAE(self.vae_bottleneck_dim)

    def build(self, *, key: Key[Array, ""]) -> ElasticTok:
        """The model with random weights."""
        patching, quantizer = Patching(*self.patch_size), self.quantizer
        encode_key, decode_key = jax.random.split(key)

        def sizes(layers: int, key: Key[Array, ""]) -> dict[str, Any]:
            return dict(
                dim=self.hidden_size,
                hidden=self.intermediate_size,
                layers=layers,
                heads=self.num_attention_heads,
                rotary=RankRotary(self.theta),
                eps=self.rms_norm_eps,
                std=self.initializer_range,
                remat=True,
                key=key,
            )

        return ElasticTok(
            patching,
            Raster(),
            Encoder(
                patching.patch_dim,
                quantizer.input_dim,
                **sizes(self.num_encoder_layers, encode_key),
            ),
            quantizer,
            Decoder(
                quantizer.latent_dim,
                patching.patch_dim,
                **sizes(self.num_decoder_layers, decode_key),
            ),
            frames_per_block=self.frames_per_block,
            min_tokens=self.min_toks,
            size=(self.resolution, self.resolution),
            context=self.max_sequence_length // self.max_toks,
        )


OFFICIAL_FSQ = OfficialConfig(
    bottleneck_type="fsq",
    patch_size=(1, 8, 8),
    frames_per_block=4,
    min_toks=256,
    max_toks=4096,
    max_sequence_length=1 << 20,
    theta=5e7,
)
"""The released discrete model, ElasticTok-FSQ: 64,000 codes, trained on up to 1M tokens."""

OFFICIAL_VAE = OfficialConfig(
    bottleneck_type="vae",
    patch_size=(2, 8, 8),
    frames_per_block=4,
    min_toks=128,
    max_toks=2048,
    max_sequence_length=1 << 19,
    theta=5e6,
)
"""The released continuous model, ElasticTok-VAE: 8 channels, trained on up to 512K tokens."""


def load_official(
    path: str | os.PathLike[str],
    config: OfficialConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = jnp.float32,
    shardings: PyTree[jax.sharding.Sharding] | None = None,
    sha256: str | None = None,
) -> ElasticTok:
    """Reads a checkpoint of the official implementation (its "streaming" format).

    Parameters alone or whole train states (whose optimizer state is passed over), bfloat16 or
    float32, layers stacked or separate. The file is looked through first, and every tensor compared
    with what the model needs; then they are read one at a time, each straight to its place. Nothing
    is unpickled. The format has no checksum: a bit that flipped inside a weight is found only by
    `sha256`, or if it makes a number infinite or NaN.

    **Arguments:**

    - `path`: the file, such as `params` of a released model.
    - `config`: `OFFICIAL_FSQ`, `OFFICIAL_VAE`, another `OfficialConfig`, or what makes one: the
      official options by name, or the path of a JSON file of them.
    - `dtype`: of the weights in memory: float32 to train on, which is exact; None for that of the
      file.
    - `shardings`: as for `load`; a tree of them is best made from `config.shapes()`.
    - `sha256`: that the whole file must have.

    **Raises:** `ModelFileError` listing tensors that are missing, unknown or of another shape, and
    saying where the file is cut short or damaged; `ValueError` for options that make no model.
    """
    path = Path(path)
    if isinstance(config, Mapping):
        config = OfficialConfig.from_options(config)
    elif not isinstance(config, OfficialConfig):
        config = OfficialConfig.read(config)
    model = config.shapes()
    try:
        if sha256 is not None:
            _check_sha256(path, sha256)
        contents = scan(path, lambda name: name[:1] not in (("step",), ("opt_state",)))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing; give the file, such as params") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error
    found = {_plain(name): array for name, array in contents.arrays.items()}
    separate = any(part.isdigit() for name in found for part in name.split("/")[2:3])
    sources = {name: _sources(name, leaf.shape, separate) for name, leaf in named(model)}
    needed = {part: _kind(shape) for parts in sources.values() for part, shape in parts.items()}
    faults = differences(
        needed, {name: _kind(array.shape, array.dtype) for name, array in found.items()}
    )
    if len(found) < len(contents.arrays):
        faults.insert(0, "holds parameters twice, with the prefix params and without")
    if contents.fault is not None:
        faults.insert(0, f"is cut short or damaged {contents.fault}")
    if faults:
        raise ModelFileError(
            f"{path} is no checkpoint of this model (bottleneck {config.bottleneck_type}, width "
            f"{config.hidden_size}, {config.num_encoder_layers} + {config.num_decoder_layers} "
            f"layers); give the options of its size, or fetch it again:{listed(faults)}"
        )
    places = placement(model, shardings)

    def read(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        values = _read([found[part] for part in sources[name]], like.shape)
        if not np.all(np.isfinite(values)):
            raise ModelFileError(
                f"{path}: {', '.join(sources[name])} holds numbers that are not finite: the file "
                "is damaged, or training went wrong"
            )
        return put(values if dtype is None else converted(values, dtype), places.get(name))

    return replaced(model, read)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, wanted: str) -> None:
    found = file_sha256(path)
    if found != wanted.strip().lower():
        raise ModelFileError(
            f"{path} has the sha256 {found}, not {wanted}; it is damaged or another file: fetch it "
            "again"
        )


_TENSORS = {
    "encoder.in_proj.weight": "encoder/in_proj/kernel",
    "encoder.kept": "encoder/is_kept_embed",
    "encoder.masked": "encoder/is_masked_embed",
    "encoder.norm.weight": "encoder/ln_f/kernel",
    "encoder.out_proj.weight": "encoder/pre_quant/kernel",
    "decoder.in_proj.weight": "decoder/post_quant/kernel",
    "decoder.norm.weight": "decoder/ln_f/kernel",
    "decoder.out_proj.weight": "decoder/out_proj/kernel",
}
_LAYERS = {
    "attention_norm.weight": "attention_norm/kernel",
    "attention.query.weight": "attention/wq/kernel",
    "attention.key.weight": "attention/wk/kernel",
    "attention.value.weight": "attention/wv/kernel",
    "attention.out.weight": "attention/wo/kernel",
    "feed_forward_norm.weight": "ffn_norm/kernel",
    "feed_forward.gate.weight": "feed_forward/w1/kernel",
    "feed_forward.down.weight": "feed_forward/w2/kernel",
    "feed_forward.up.weight": "feed_forward/w3/kernel",
}


def _sources(name: str, shape: tuple[int, ...], separate: bool) -> dict[str, tuple[int, ...]]:
    """The official tensors that one of ours is made of, in order, with their shapes."""
    side, stack, part = name.partition(".transformer.layers.")
    if not stack:
        # The two embeddings of the keep mask are rows there.
        return {_TENSORS[name]: (1, *shape) if len(shape) == 1 and "norm" not in name else shape}
    blocks, tensor = f"{side}/{side}_blocks", _LAYERS[part]
    if not separate:
        return {f"{blocks}/scan_decoder/{tensor}": shape}
    return {f"{blocks}/{i}/{tensor}": shape[1:] for i in range(shape[0])}


def _plain(name: Name) -> str:
    """A parameter's name without the prefixes of a train state."""
    while name[:1] == ("params",):
        name = name[1:]
    return "/".join(name)


def _kind(shape: tuple[int, ...], dtype: np.dtype | None = None) -> str:
    """A tensor's shape for people, and its type if that is none of weights."""
    odd = dtype is not None and not jnp.issubdtype(dtype, jnp.floating)
    return f"{dtype if odd else ''}{list(shape)}"


def _read(parts: list[StoredArray], shape: tuple[int, ...]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0].read().reshape(shape)
    values = np.empty(shape, parts[0].dtype)
    for i, part in enumerate(parts):
        values[i] = part.read()
    return values


def _like(name: str, example: Any, value: Any) -> Any:
    """A JSON value in the type of an option.

    **Raises:** `ValueError` if it has another.
    """
    whole = type(value) is int
    if isinstance(example, int) and not whole:
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if isinstance(example, float):
        if not whole and type(value) is not float:
            raise ValueError(f"{name} is {value!r}; it must be a number")
        return float(value)
    if isinstance(example, tuple):
        if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
            raise ValueError(f"{name} is {value!r}; it must be a list of whole numbers")
        if name == "patch_size" and len(value) != 3:
            raise ValueError(f"{name} is {value!r}; give frames, height and width")
        return tuple(value)
    return value


def _square(options: Mapping[str, Any]) -> int:
    """The side of square frames that make `max_toks` tokens; any number where there is none."""
    frames, height, width = options["patch_size"]
    cells = options["max_toks"] * frames // options["frames_per_block"]
    return max(1, math.isqrt(cells * height * width))
