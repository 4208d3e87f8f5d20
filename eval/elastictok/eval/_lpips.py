"""LPIPS: how different two pictures look, by the features of a network that knows photographs.

Zhang, Isola, Efros, Shechtman and Wang 2018, arXiv 1801.03924, version 0.1 of its weights. They are
not part of this package and are never fetched: `load_lpips` reads them from a file that you name.
"""

import abc
import contextlib
import functools
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from safetensors import safe_open

from elastictok.models import ModelFileError, file_sha256

# Mean and deviation of ImageNet's colours, for pixels in [-1, 1], as the reference rounds them.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# Of the reference, beside the length of a feature vector.
_EPS = 1e-10

_RECIPE = """:
  import lpips
  from safetensors.torch import save_model
  save_model(lpips.LPIPS(net="vgg"), "lpips-vgg.safetensors")
(pip install lpips safetensors; net="alex" for AlexNet)"""

# What whole state dicts hold besides: the heads once more, constants, torchvision's classifier.
_IGNORED = ("lins.", "scaling_layer.", "classifier.")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
# Unknown tensors that an error lists; a foreign file could hold as many as it likes.
_LISTED = 20


@final
class Convolution(eqx.Module):
    """A convolution over height and width, its weight as PyTorch keeps it.

    Weights are He's random ones until others are put in their place.
    """

    weight: Float[Array, "out_channels in_channels side side"]
    bias: Float[Array, "out_channels"]
    stride: int = eqx.field(static=True)
    padding: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        side: int,
        *,
        stride: int = 1,
        padding: int,
        key: Key[Array, ""],
    ):
        std = (2 / (in_channels * side * side)) ** 0.5
        self.weight = std * jax.random.normal(key, (out_channels, in_channels, side, side))
        self.bias = jnp.zeros(out_channels)
        self.stride = stride
        self.padding = padding

    def __call__(
        self, x: Float[Array, "height width in_channels"]
    ) -> Float[Array, "_ _ out_channels"]:
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight,
            (self.stride, self.stride),
            ((self.padding, self.padding), (self.padding, self.padding)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return y[0] + self.bias


_Slices = tuple[tuple[Convolution, ...], ...]


class AbstractFeatures(eqx.Module):
    """A network that turns a picture into feature maps, from fine to coarse.

    - `channels`: of each map.
    - `smallest`: pixels that a picture needs on each side for the last map to have one position.
    """

    channels: eqx.AbstractVar[tuple[int, ...]]
    smallest: eqx.AbstractVar[int]

    @abc.abstractmethod
    def features(self, image: Float[Array, "height width 3"]) -> tuple[Float[Array, "_ _ _"], ...]:
        """**Arguments:**

        - `image`: colours less ImageNet's mean, over its deviation: what `LPIPS` makes of pixels.

        **Returns:** the maps, `f[height width channels]` each, of sizes of their own.
        """


@final
class VGG16(AbstractFeatures):
    """The convolutions of VGG16 (arXiv 1409.1556, configuration D) up to its last ReLU.

    Maps: `relu1_2`, `relu2_2`, `relu3_3`, `relu4_3`, `relu5_3`.

    **Arguments:**

    - `key`: of random weights. `load_lpips` has trained ones.
    """

    # Where torchvision has the convolutions of each slice, in its list `features`.
    places: ClassVar[tuple[tuple[int, ...], ...]] = (
        (0, 2),
        (5, 7),
        (10, 12, 14),
        (17, 19, 21),
        (24, 26, 28),
    )
    slices: _Slices = eqx.field(repr=False)
    channels: tuple[int, ...] = eqx.field(static=True, repr=False)
    smallest: int = eqx.field(static=True, repr=False)

    def __init__(self, *, key: Key[Array, ""]):
        self.channels = (64, 128, 256, 512, 512)
        self.smallest = 16  # halved four times
        inputs = 3
        slices = []
        for places, outputs in zip(self.places, self.channels, strict=True):
            convolutions = []
            for place in places:
                own = jax.random.fold_in(key, place)
                convolutions.append(Convolution(inputs, outputs, 3, padding=1, key=own))
                inputs = outputs
            slices.append(tuple(convolutions))
        self.slices = tuple(slices)

    def features(self, image: Float[Array, "height width 3"]) -> tuple[Float[Array, "_ _ _"], ...]:
        return _features(self.slices, (None, 2, 2, 2, 2), image)


@final
class AlexNet(AbstractFeatures):
    """The convolutions of AlexNet (torchvision's, of arXiv 1404.5997), a map after each ReLU.

    A twentieth of the multiplications of `VGG16`. The authors measure with this one, and advise
    `VGG16` to optimise through.

    **Arguments:**

    - `key`: of random weights. `load_lpips` has trained ones.
    """

    places: ClassVar[tuple[tuple[int, ...], ...]] = ((0,), (3,), (6,), (8,), (10,))
    slices: _Slices = eqx.field(repr=False)
    channels: tuple[int, ...] = eqx.field(static=True, repr=False)
    smallest: int = eqx.field(static=True, repr=False)

    def __init__(self, *, key: Key[Array, ""]):
        self.channels = (64, 192, 384, 256, 256)
        self.smallest = 31  # 7 positions after the first convolution, then 3, then 1
        keys = jax.random.split(key, 5)
        self.slices = (
            (Convolution(3, 64, 11, stride=4, padding=2, key=keys[0]),),
            (Convolution(64, 192, 5, padding=2, key=keys[1]),),
            (Convolution(192, 384, 3, padding=1, key=keys[2]),),
            (Convolution(384, 256, 3, padding=1, key=keys[3]),),
            (Convolution(256, 256, 3, padding=1, key=keys[4]),),
        )

    def features(self, image: Float[Array, "height width 3"]) -> tuple[Float[Array, "_ _ _"], ...]:
        return _features(self.slices, (None, 3, 3, None, None), image)


def _features(
    slices: _Slices, windows: tuple[int | None, ...], image: Float[Array, "height width 3"]
) -> tuple[Float[Array, "_ _ _"], ...]:
    """**Arguments:**

    - `windows`: of the max-pooling with stride 2 in front of each slice; None for no pooling.
    """
    x = image
    maps = []
    for convolutions, window in zip(slices, windows, strict=True):
        if window is not None:
            # From minus infinity: the start that JAX knows how to differentiate from.
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (window, window, 1), (2, 2, 1), "VALID"
            )
        for convolution in convolutions:
            x = jax.nn.relu(convolution(x))
        maps.append(x)
    return tuple(maps)


def _unit(x: Float[Array, "height width channels"]) -> Float[Array, "height width channels"]:
    """Every position's vector brought to length 1; zero stays zero.

    The square root has no gradient at zero, where flat pictures put whole maps, so that it must not
    see one: a `where` behind it would multiply its infinite gradient by zero, which is NaN.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x / (length + _EPS)


@final
class LPIPS(eqx.Module):
    """The learned perceptual distance of two pictures (arXiv 1801.03924, equation 1).

    Feature vectors are brought to length one, their squared differences weighed by channel,
    averaged over positions and added up over maps. 0 for equal pictures; with the authors' weights,
    none of which is negative, never below 0.

    The weights are constants: no gradient reaches them. Convolutions have the precision of the
    device; for float32 on accelerators call it under `jax.default_matmul_precision("highest")`.

    **Arguments:**

    - `network`: `VGG16` or `AlexNet`.
    - `heads`: the weight of every channel, for each of the network's maps.
    - `sha256`: of the file that all of it comes from, for the record; None if from none.
    """

    network: AbstractFeatures
    heads: tuple[Float[Array, "_"], ...] = eqx.field(repr=False)
    sha256: str | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        found = tuple(head.size for head in self.heads)
        if found != self.network.channels:
            raise ValueError(
                f"heads are of {found} channels, and the maps of {type(self.network).__name__} "
                f"have {self.network.channels}; give one weight for each"
            )

    def __call__(
        self, a: Float[Array, "height width 3"], b: Float[Array, "_ _ 3"]
    ) -> Float[Array, ""]:
        """**Arguments:**

        - `a`, `b`: pixels in [-1, 1], of one size. `jax.vmap` for batches.

        **Returns:** the distance, the same for `(b, a)`. Its gradient is finite for any pixels.

        **Raises:** `ValueError` if the sizes differ, or are too small for the network.
        """
        if a.shape != b.shape:
            raise ValueError(
                f"the pictures are {a.shape} and {b.shape} (height, width, channels); resize or "
                "crop one to the other first"
            )
        heads = jax.lax.stop_gradient(self.heads)
        total = jnp.zeros(())
        for x, y, head in zip(self.features(a), self.features(b), heads, strict=True):
            square = jnp.square(_unit(x) - _unit(y))
            total += jnp.sum(jnp.mean(square, axis=(0, 1)) * head)
        return total

    def features(self, image: Float[Array, "height width 3"]) -> tuple[Float[Array, "_ _ _"], ...]:
        """The network's feature maps of a picture in [-1, 1], before they are brought to length 1.

        **Raises:** `ValueError` if the picture is too small for the network.
        """
        height, width, _ = image.shape
        least = self.network.smallest
        if min(height, width) < least:
            raise ValueError(
                f"a picture of {height}x{width} pixels is too small for "
                f"{type(self.network).__name__}, which needs {least} on each side; enlarge both "
                "pictures first"
            )
        network = jax.lax.stop_gradient(self.network)
        return network.features((image.astype(jnp.float32) - _SHIFT) / _SCALE)


def load_lpips(path: str | os.PathLike[str], sha256: str | None = None) -> LPIPS:
    """Reads the weights of LPIPS from a file; whether VGG16's or AlexNet's, its shapes tell.

    The file is `.safetensors` or `.npz` and holds the state dict of `lpips.LPIPS(net="vgg")` or
    `net="alex"` of the public package `lpips`: `net.slice1.0.weight`, ..., `lin4.model.1.weight`.
    Its convolutions may have torchvision's names instead: `features.0.weight`. This makes one:

        import lpips
        from safetensors.torch import save_model
        save_model(lpips.LPIPS(net="vgg"), "lpips-vgg.safetensors")

    Nothing is unpickled and nothing is fetched. Shapes are compared before any tensor is read.

    **Arguments:**

    - `path`: the file.
    - `sha256`: that the whole file must have. `.safetensors` has no checksum of its own: only this
        finds a bit that flipped inside a weight.

    **Returns:** the distance, in float32; its `sha256` is the file's.

    **Raises:** `ModelFileError` if the file is missing, damaged or a pickle, or listing the tensors
    that are missing, of another shape or type, or unknown.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        what = "is no file of tensors that is read here"
        if path.suffix.lower() in _PICKLES:
            what = "is a pickle by its name, and reading one runs what it says"
        raise ModelFileError(f"{path} {what}; give a .safetensors file (or .npz), made by{_RECIPE}")
    try:
        found_sha256 = file_sha256(path)
    except FileNotFoundError:
        raise ModelFileError(
            f"{path} is missing; LPIPS needs its trained weights, which this package neither holds "
            f"nor fetches: make the file by{_RECIPE}"
        ) from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error
    if sha256 is not None and found_sha256 != sha256.strip().lower():
        raise ModelFileError(
            f"{path} has the sha256 {found_sha256}, not {sha256}; it is damaged or another file: "
            "make it again"
        )
    with _reading(path):
        tensors = reader(path)
    # The right one of the two shares most with the file; a damaged file is told what it lacks.
    candidates = [(VGG16, _needed(VGG16)), (AlexNet, _needed(AlexNet))]
    network, needed = max(candidates, key=lambda pair: _common(pair[1], tensors))
    names, faults = _compare(needed, tensors)
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise ModelFileError(
            f"{path} is no LPIPS with {network.__name__}, which it is nearest to; it{lines}\n"
            f"Make the file by{_RECIPE}"
        )
    weights: dict[str, Array] = {}
    for name, found in names.items():
        with _reading(path):
            values = tensors[found].read().astype(np.float32)
        if not np.all(np.isfinite(values)):
            raise ModelFileError(
                f"{path}: {found} holds numbers that are not finite; the file is damaged: make it "
                "again"
            )
        weights[name] = jnp.asarray(values)
    return _assemble(network, weights, found_sha256)


class _Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


_Network = type[VGG16] | type[AlexNet]
_Shapes = Mapping[str, tuple[int, ...]]


def _needed(network: _Network) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a file, by the names of the package `lpips`."""
    like = eqx.filter_eval_shape(lambda: network(key=jax.random.key(0)))
    needed: dict[str, tuple[int, ...]] = {}
    for i, (places, slice_) in enumerate(zip(network.places, like.slices, strict=True)):
        for place, convolution in zip(places, slice_, strict=True):
            needed[f"net.slice{i + 1}.{place}.weight"] = convolution.weight.shape
            needed[f"net.slice{i + 1}.{place}.bias"] = convolution.bias.shape
    for i, channels in enumerate(like.channels):
        needed[f"lin{i}.model.1.weight"] = (1, channels, 1, 1)
    return needed


def _aliases(name: str) -> tuple[str, ...]:
    """What a tensor may be called in a file."""
    if not name.startswith("net."):
        return (name,)
    return name, "features." + name.split(".", 2)[2]


def _common(needed: _Shapes, found: Mapping[str, _Tensor]) -> int:
    """How many of the tensors that are needed a file has, of the right shape."""
    return sum(
        any(alias in found and found[alias].shape == shape for alias in _aliases(name))
        for name, shape in needed.items()
    )


def _compare(needed: _Shapes, found: Mapping[str, _Tensor]) -> tuple[dict[str, str], list[str]]:
    """What each tensor is called in the file, and what is wrong with the file, a line each."""
    names: dict[str, str] = {}
    faults: list[str] = []
    unknown = [name for name in found if not name.startswith(_IGNORED)]
    for name, shape in needed.items():
        present = [alias for alias in _aliases(name) if alias in found]
        unknown = [other for other in unknown if other not in present]
        if not present:
            faults.append(f"lacks {' or '.join(_aliases(name))}, {list(shape)}")
            continue
        if len(present) > 1:
            faults.append(f"holds both {' and '.join(present)}, which are the same tensor")
        names[name] = present[0]
        tensor = found[present[0]]
        if tensor.shape != shape:
            faults.append(f"has {present[0]} {list(tensor.shape)}, which must be {list(shape)}")
        elif tensor.dtype not in _FLOATS:
            faults.append(f"has {present[0]} of type {tensor.dtype}; give {', '.join(_FLOATS)}")
    faults += [f"holds {name} {list(found[name].shape)}, unknown" for name in unknown[:_LISTED]]
    if len(unknown) > _LISTED:
        faults.append(f"holds {len(unknown) - _LISTED} more unknown tensors")
    return names, faults


def _assemble(network: _Network, weights: Mapping[str, Array], sha256: str) -> LPIPS:
    like = eqx.filter_eval_shape(lambda: network(key=jax.random.key(0)))
    arrays = [array for name, array in weights.items() if name.startswith("net.")]
    filled = eqx.tree_at(
        lambda net: [
            part for slice_ in net.slices for conv in slice_ for part in (conv.weight, conv.bias)
        ],
        like,
        arrays,
    )
    heads = tuple(weights[f"lin{i}.model.1.weight"].reshape(-1) for i in range(len(like.channels)))
    return LPIPS(filled, heads, sha256)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    # NumPy reads a header as Python: what it raises for bytes that are none has no end.
    except Exception as error:
        raise ModelFileError(
            f"{path} is damaged, or no {path.suffix} file ({error}); make it again"
        ) from error


def _safetensors(path: Path) -> dict[str, _Tensor]:
    # Read, not mapped: mapped pages would change with the file.
    file = safe_open(path, framework="np", backend="pread")
    tensors: dict[str, _Tensor] = {}
    for name in file.keys():  # noqa: SIM118
        part = file.get_slice(name)
        dtype = str(part.get_dtype())
        dtype = _SAFETENSORS.get(dtype, dtype)
        read = functools.partial(file.get_tensor, name)
        tensors[name] = _Tensor(tuple(part.get_shape()), dtype, read)
    return tensors


def _npz(path: Path) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            shape, dtype = _npy_header(archive, member)
            read = functools.partial(_read_npy, path, member)
            tensors[member.removesuffix(".npy")] = _Tensor(shape, dtype, read)
    return tensors


def _npy_header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], str]:
    """Shape and type, without the numbers: a small file can claim, and unpack to, very many."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"{member} is of format version {version}")
        shape, _, dtype = readers[version](file)
    return shape, str(dtype)


def _read_npy(path: Path, member: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


_READERS: dict[str, Callable[[Path], dict[str, _Tensor]]] = {
    ".safetensors": _safetensors,
    ".npz": _npz,
}
