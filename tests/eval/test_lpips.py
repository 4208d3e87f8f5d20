"""LPIPS against NumPy and, where they are installed, PyTorch and the package `lpips` itself.

Weights here are random ones: what is tested is the arithmetic and the reading of files.
"""

import dataclasses
import functools
import io
import pickle
import re
import zipfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from elastictok.eval import (
    LPIPS,
    VGG16,
    AbstractFeatures,
    AlexNet,
    LPIPSLoss,
    load_lpips,
    requirement,
)
from elastictok.models import ModelFileError, file_sha256

README = Path(__file__).parents[2] / "eval" / "README.md"


@dataclasses.dataclass(frozen=True)
class Net:
    """A network as torchvision lists it in `features`, and the places that LPIPS looks at.

    - `layers`: `(channels, side, stride, padding)` of a convolution, with its ReLU at the next
        place, or the window of a max-pooling with stride 2.
    - `taps`: the places of the ReLUs.
    """

    kind: type
    layers: tuple
    taps: tuple[int, ...]
    size: tuple[int, int]
    option: str

    def walk(self):
        place = 0
        for layer in self.layers:
            yield place, layer
            place += 2 if isinstance(layer, tuple) else 1


def vgg_layers():
    for channels, count in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        yield from [(channels, 3, 1, 1)] * count
        yield 2


VGG = Net(VGG16, tuple(vgg_layers()), (3, 8, 15, 22, 29), (33, 48), "vgg")
ALEX = Net(
    AlexNet,
    ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
    (1, 4, 7, 9, 11),
    (71, 64),
    "alex",
)
NETS = pytest.mark.parametrize("net", [VGG, ALEX], ids=["VGG16", "AlexNet"])


@functools.cache
def tensors(net) -> dict[str, np.ndarray]:
    """A state dict of random weights, with the names of the package `lpips`."""
    rng = np.random.default_rng(7)
    found, inputs, widths = {}, 3, []
    for place, layer in net.walk():
        if isinstance(layer, tuple):
            channels, side, _, _ = layer
            prefix = f"net.slice{1 + sum(place > tap for tap in net.taps)}.{place}"
            std = np.sqrt(2 / (inputs * side * side))
            shape = (channels, inputs, side, side)
            found[f"{prefix}.weight"] = rng.normal(0, std, shape).astype(np.float32)
            found[f"{prefix}.bias"] = rng.normal(0, 0.2, channels).astype(np.float32)
            inputs = channels
            if place + 1 in net.taps:
                widths.append(channels)
    for i, channels in enumerate(widths):
        head = rng.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32)
        found[f"lin{i}.model.1.weight"] = head
    return found


@functools.cache
def loaded(net, folder: Path) -> LPIPS:
    path = folder / f"{net.option}.safetensors"
    save_file(tensors(net), path)
    return load_lpips(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lpips")


def pictures(size, seed=0):
    """A picture and a worse copy."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, (*size, 3))
    b = np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1)
    return a.astype(np.float32), b.astype(np.float32)


def windows(x, side, stride):
    return np.lib.stride_tricks.sliding_window_view(x, (side, side), (0, 1))[::stride, ::stride]


def numpy_features(net, image):
    """Feature maps in float64, by nothing but NumPy."""
    convolutions = {
        name.split(".", 2)[2]: value.astype(np.float64)
        for name, value in tensors(net).items()
        if name.startswith("net.")
    }
    mean, deviation = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    x = (image.astype(np.float64) - mean) / deviation
    maps = []
    for place, layer in net.walk():
        if isinstance(layer, tuple):
            _, side, stride, padding = layer
            x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
            weight, bias = convolutions[f"{place}.weight"], convolutions[f"{place}.bias"]
            x = np.tensordot(windows(x, side, stride), weight, ([2, 3, 4], [1, 2, 3])) + bias
            x = np.maximum(x, 0)
            if place + 1 in net.taps:
                maps.append(x)
        else:
            x = windows(x, layer, 2).max((-1, -2))
    return maps


def numpy_lpips(net, a, b):
    total = 0.0
    for i, (x, y) in enumerate(zip(numpy_features(net, a), numpy_features(net, b), strict=True)):
        x, y = (m / (np.sqrt(np.sum(m * m, -1, keepdims=True)) + 1e-10) for m in (x, y))
        total += np.mean(np.sum((x - y) ** 2 * tensors(net)[f"lin{i}.model.1.weight"].ravel(), -1))
    return total


@eqx.filter_jit
def distance(lpips, a, b):
    return lpips(jnp.asarray(a), jnp.asarray(b))


@eqx.filter_jit
def gradient(lpips, a, b):
    return jax.grad(lambda image: lpips(image, jnp.asarray(b)))(jnp.asarray(a))


@NETS
def test_equal_to_numpy(net, folder):
    lpips = loaded(net, folder)
    a, b = pictures(net.size)
    assert isinstance(lpips.network, net.kind)
    found = eqx.filter_jit(lambda lpips, a: lpips.features(a))(lpips, jnp.asarray(a))
    expected = numpy_features(net, a)
    assert [m.shape for m in found] == [m.shape for m in expected]
    for x, y in zip(found, expected, strict=True):
        assert y.std() > 0.01
        np.testing.assert_allclose(np.asarray(x), y, rtol=1e-3, atol=1e-4 * y.max())
    for one, other in [(a, b), pictures(net.size, seed=1), (a, np.full_like(a, 0.5))]:
        expected = numpy_lpips(net, one, other)
        assert expected > 0.01
        assert float(distance(lpips, one, other)) == pytest.approx(expected, rel=1e-5)


@NETS
def test_the_gradient_is_the_slope(net, folder):
    a, b = pictures(net.size)
    slopes = np.asarray(gradient(loaded(net, folder), a, b), np.float64)
    # Along itself, where it is far above what rounding does.
    direction = slopes / np.linalg.norm(slopes)
    ahead, behind = (numpy_lpips(net, a + step * direction, b) for step in (1e-4, -1e-4))
    assert np.linalg.norm(slopes) == pytest.approx((ahead - behind) / 2e-4, rel=1e-3)


@NETS
def test_equal_to_pytorch(net, folder):
    torch = pytest.importorskip("torch")
    nn = torch.nn.functional

    def plain(image):
        return torch.tensor(image).permute(2, 0, 1)[None]

    def features(image):
        x = (image - plain([[[-0.030, -0.088, -0.188]]])) / plain([[[0.458, 0.448, 0.450]]])
        named = {name.split(".", 2)[2]: torch.tensor(v) for name, v in tensors(net).items()}
        for place, layer in net.walk():
            if isinstance(layer, tuple):
                _, _, stride, padding = layer
                weight, bias = named[f"{place}.weight"], named[f"{place}.bias"]
                x = nn.relu(nn.conv2d(x, weight, bias, stride, padding))
                if place + 1 in net.taps:
                    yield x
            else:
                x = nn.max_pool2d(x, layer, 2)

    a, b = pictures(net.size)
    ours, theirs = plain(a).requires_grad_(), plain(b)
    total = torch.zeros(())
    for i, (x, y) in enumerate(zip(features(ours), features(theirs), strict=True)):
        x, y = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (x, y))
        head = torch.tensor(tensors(net)[f"lin{i}.model.1.weight"])
        total = total + nn.conv2d((x - y).square(), head).mean()
    total.backward()
    expected = ours.grad[0].permute(1, 2, 0).numpy()
    lpips = loaded(net, folder)
    assert float(distance(lpips, a, b)) == pytest.approx(total.item(), rel=1e-4)
    error = np.linalg.norm(np.asarray(gradient(lpips, a, b)) - expected)
    assert error < 1e-4 * np.linalg.norm(expected)


@NETS
def test_the_recipe_makes_a_file_of_the_package_lpips_that_is_read(net, tmp_path, monkeypatch):
    reference = pytest.importorskip("lpips")
    torch = pytest.importorskip("torch")
    made = []

    def random(net):  # as the recipe, but it fetches no weights
        made.append(original(net=net, pnet_rand=True, verbose=False))
        return made[-1]

    original = reference.LPIPS
    monkeypatch.setattr(reference, "LPIPS", random)
    monkeypatch.chdir(tmp_path)
    (recipe,) = re.findall(r"```py\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    exec(recipe.replace('"vgg"', f'"{net.option}"'), {"__name__": "recipe"})
    (path,) = tmp_path.iterdir()
    lpips = load_lpips(path)
    a, b = pictures(net.size)
    with torch.no_grad():
        expected = made[0](*(torch.tensor(x).permute(2, 0, 1)[None] for x in (a, b))).item()
    assert float(distance(lpips, a, b)) == pytest.approx(expected, rel=1e-4)


@NETS
def test_a_distance(net, folder):
    lpips = loaded(net, folder)
    a, b = pictures(net.size)
    # The two sides may be compiled, and so rounded, in two ways.
    assert 0 <= float(distance(lpips, a, a)) < 1e-12
    assert float(distance(lpips, a, b)) == pytest.approx(float(distance(lpips, b, a)), rel=1e-6)
    little = a + 0.1 * (b - a)
    assert 0 < float(distance(lpips, a, little)) < float(distance(lpips, a, b))


def flat(value):
    return np.broadcast_to(np.asarray(value, np.float32), (*ALEX.size, 3))


# The last of these is zero after scaling.
@pytest.mark.parametrize("value", [0, 1, -1, (-0.030, -0.088, -0.188)], ids=str)
@pytest.mark.parametrize("bias", [None, 0.0, -1e3], ids=["random", "zero", "dead"])
def test_gradients_are_finite_on_flat_pictures(value, bias, folder):
    lpips = loaded(ALEX, folder)
    if bias is not None:
        lpips = eqx.tree_at(
            lambda tree: [c.bias for slice_ in tree.network.slices for c in slice_],
            lpips,
            replace_fn=lambda array: jnp.full_like(array, bias),
        )
    picture, noise = flat(value), pictures(ALEX.size)[0]
    for a, b in [(picture, picture), (picture, noise), (noise, picture), (noise, noise)]:
        assert np.isfinite(float(distance(lpips, a, b)))
        slopes = np.asarray(gradient(lpips, a, b))
        assert np.isfinite(slopes).all()
        if bias == -1e3:
            assert not slopes.any()
        if a is b:
            assert np.abs(slopes).max() < 1e-8


class Colours(AbstractFeatures):
    """Features without a ReLU, which would hide a gradient that is not finite where they are 0."""

    channels: tuple[int, ...] = (3,)
    smallest: int = 1

    def features(self, image):
        return (image,)


def test_the_gradient_is_finite_where_features_are_zero():
    lpips = LPIPS(Colours(), (jnp.ones(3),))
    picture = np.broadcast_to(np.array([-0.030, -0.088, -0.188], np.float32), (2, 2, 3))
    assert not np.any(lpips.features(jnp.asarray(picture))[0])
    # The distance of a vector of length 0 from one of length 1.
    assert float(distance(lpips, picture, np.zeros_like(picture))) == pytest.approx(1)
    for other in (picture, np.zeros_like(picture)):
        assert np.isfinite(np.asarray(gradient(lpips, picture, other))).all()


def test_no_gradient_reaches_the_weights(folder):
    a, b = (jnp.asarray(x) for x in pictures(ALEX.size))
    slopes = eqx.filter_grad(lambda lpips: lpips(a, b))(loaded(ALEX, folder))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))
    assert len(jax.tree.leaves(slopes)) == 15


def test_random_weights():
    network = AlexNet(key=jax.random.key(0))
    a, b = pictures(ALEX.size)
    lpips = LPIPS(network, tuple(jnp.ones(width) for width in network.channels))
    assert lpips.sha256 is None
    assert float(distance(lpips, a, b)) > 0
    with pytest.raises(ValueError, match=r"heads are of \(64,\) channels.*AlexNet"):
        LPIPS(network, (jnp.ones(64),))


def test_as_a_criterion_for_searches():
    network = AlexNet(key=jax.random.key(0))
    lpips = LPIPS(network, tuple(jnp.ones(width) for width in network.channels))
    rng = np.random.default_rng(0)
    truth, other = rng.integers(0, 256, (2, 3, *ALEX.size, 3), np.uint8)
    criterion = LPIPSLoss(lpips, 0.1)
    assert criterion(truth, truth) == pytest.approx(0, abs=1e-9)
    pairs = zip(truth / 127.5 - 1, other / 127.5 - 1, strict=True)
    each = [distance(lpips, a, b) for a, b in pairs]
    assert criterion(truth, other) == pytest.approx(float(np.mean(each)), rel=1e-4)
    assert criterion.meets(0.05)
    assert not criterion.meets(0.2)
    assert requirement(criterion) == "LPIPS ≤ 0.1"
    with pytest.raises(ValueError, match="LPIPSLoss threshold is -1"):
        LPIPSLoss(lpips, -1)


@pytest.mark.parametrize(("kind", "least"), [(VGG16, 16), (AlexNet, 31)])
def test_the_smallest_picture(kind, least):
    # Shapes are all that is asked about.
    network = eqx.filter_eval_shape(lambda: kind(key=jax.random.key(0)))
    heads = tuple(jax.ShapeDtypeStruct((width,), jnp.float32) for width in network.channels)

    def shapes(side):
        picture = jax.ShapeDtypeStruct((side, 99, 3), jnp.float32)

        def features(network, heads, picture):
            return LPIPS(network, heads).features(picture)

        return eqx.filter_eval_shape(features, network, heads, picture)

    assert shapes(least)[-1].shape[0] == 1
    with pytest.raises(
        ValueError, match=rf"{least - 1}x99 pixels is too small for {kind.__name__}"
    ):
        shapes(least - 1)


def test_two_sizes(folder):
    with pytest.raises(ValueError, match=r"\(40, 40, 3\) and \(40, 41, 3\).*resize or crop"):
        loaded(ALEX, folder)(jnp.zeros((40, 40, 3)), jnp.zeros((40, 41, 3)))


def same(one: LPIPS, other: LPIPS, tolerance: float = 0.0) -> bool:
    """Whether all weights are the same; where they come from may differ."""
    one, other = (dataclasses.replace(x, sha256=None) for x in (one, other))
    return bool(eqx.tree_equal(one, other, rtol=tolerance, atol=tolerance))


def torchvision(name: str) -> str:
    return re.sub(r"^net\.slice\d\.", "features.", name)


def test_every_way_to_write_the_file_gives_the_same(folder, tmp_path):
    expected = loaded(ALEX, folder)
    weights = tensors(ALEX)
    renamed = {torchvision(name): value for name, value in weights.items()}
    more = weights | {
        "scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32),
        "lins.0.model.1.weight": weights["lin0.model.1.weight"],
        "classifier.1.weight": np.zeros((2, 2), np.float32),
    }
    for i, content in enumerate([weights, renamed, more]):
        save_file(content, tmp_path / f"{i}.safetensors")
        np.savez(tmp_path / f"{i}.npz", **content)
        np.savez_compressed(tmp_path / f"{i}c.npz", **content)
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    save_file(wide, tmp_path / "wide.SAFETENSORS")
    assert len(list(tmp_path.iterdir())) == 10
    for path in tmp_path.iterdir():
        found = load_lpips(path)
        assert same(found, expected)
        assert found.sha256 == file_sha256(path)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {name: value.astype(dtype) for name, value in weights.items()}
        save_file(half, tmp_path / "half.safetensors")
        found = load_lpips(tmp_path / "half.safetensors")
        assert not same(found, expected)
        assert same(found, expected, tolerance=0.01)


def test_the_sha256(folder):
    path = folder / "alex.safetensors"
    lpips = loaded(ALEX, folder)
    right = file_sha256(path)
    assert right in repr(lpips)
    assert len(repr(lpips)) < 200
    assert load_lpips(path, right.upper() + "\n").sha256 == right
    with pytest.raises(ModelFileError, match=f"sha256 {right}, not {'0' * 64}"):
        load_lpips(path, sha256="0" * 64)
    # Compared first: the bytes of another file are not looked at.
    (folder / "other.npz").write_bytes(b"?")
    with pytest.raises(ModelFileError, match="sha256"):
        load_lpips(folder / "other.npz", right)


def failure(content: dict[str, np.ndarray], path: Path) -> str:
    save_file(content, path)
    with pytest.raises(ModelFileError) as caught:
        load_lpips(path)
    return str(caught.value)


@NETS
def test_every_tensor_that_is_wrong_is_named(net, tmp_path):
    weights = dict(tensors(net))
    first, last = f"net.slice1.0.weight {list(weights['net.slice1.0.weight'].shape)}", "lin4.model"
    del (
        weights["lin4.model.1.weight"],
        weights["net.slice2.5.bias" if net is VGG else "net.slice2.3.bias"],
    )
    weights["net.slice1.0.weight"] = np.zeros((64, 3, 7, 7), np.float32)
    weights["lin0.model.1.weight"] = np.zeros((1, 64, 1, 1), np.int32)
    weights["lin1.model.1.weight"] = weights["lin1.model.1.weight"].reshape(-1)
    weights["net.slice9.0.weight"] = np.zeros(5, np.float32)
    message = failure(weights, tmp_path / "x.safetensors")
    width = weights["lin1.model.1.weight"].size
    assert net.kind.__name__ in message
    for line in [
        f"has net.slice1.0.weight [64, 3, 7, 7], which must be {first.split(' ', 1)[1]}",
        f"lacks {last}.1.weight, [1, {512 if net is VGG else 256}, 1, 1]",
        f"lacks net.slice2.{5 if net is VGG else 3}.bias or features.{5 if net is VGG else 3}.bias",
        "has lin0.model.1.weight of type I32",
        f"has lin1.model.1.weight [{width}], which must be [1, {width}, 1, 1]",
        "holds net.slice9.0.weight [5], unknown",
        "save_model(lpips.LPIPS",
    ]:
        assert line in message
    assert sum(line.startswith("  ") for line in message.splitlines()) == 6 + 3


def test_other_contents(tmp_path):
    path = tmp_path / "x.safetensors"
    weights = tensors(ALEX)
    both = weights | {"features.0.bias": weights["net.slice1.0.bias"]}
    assert "holds both net.slice1.0.bias and features.0.bias" in failure(both, path)
    many = weights | {f"more{i}": np.zeros(1, np.float32) for i in range(99)}
    assert "79 more unknown tensors" in failure(many, path)
    # In the place of the first slice's bias, that of the second: the shapes alone do not fit.
    moved = {re.sub(r"slice2", "slice3", name): value for name, value in weights.items()}
    assert "lacks net.slice2.3.weight" in failure(moved, path)
    for wrong in (np.nan, np.inf):
        broken = weights["lin2.model.1.weight"].copy()
        broken[0, 3] = wrong
        message = failure(weights | {"lin2.model.1.weight": broken}, path)
        assert "lin2.model.1.weight holds numbers that are not finite" in message
    assert "lacks lin0.model.1.weight" in failure({}, path)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_files_that_are_cut_short(ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    save_file(tensors(ALEX), path) if ending == "safetensors" else np.savez(path, **tensors(ALEX))
    whole = path.read_bytes()
    for length in [0, 1, 9, 500, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match="damaged"):
            load_lpips(path)


def test_a_flipped_bit_in_an_npz_is_found(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **tensors(ALEX))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged"):
        load_lpips(path)


@given(data=st.data())
def test_a_header_that_is_none(data, folder):
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1, 64, 1, 1)}
    np.lib.format.write_array_header_1_0(file, header)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(6, len(content) - 1))
        content[place] = data.draw(st.sampled_from(b"(){}[],:'0L- \n\0\xff"))
    with zipfile.ZipFile(folder / "header.npz", "w") as archive:
        archive.writestr("lin0.model.1.weight.npy", bytes(content))
    with pytest.raises(ModelFileError):
        load_lpips(folder / "header.npz")


class Payload:
    """What must not run."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def test_pickles_are_refused(tmp_path):
    witness = tmp_path / "it ran"
    content = pickle.dumps(Payload(witness))
    for name in ("x.pth", "x.pt", "x.PT", "x.bin"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError, match=r"pickle(.|\n)*save_model\(lpips\.LPIPS"):
            load_lpips(tmp_path / name)
    for name in ("x.npz", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError, match="damaged"):
            load_lpips(tmp_path / name)
    # NumPy's own way to hold one.
    objects = np.empty((64, 3, 11, 11), object)
    objects[0, 0, 0, 0] = Payload(witness)
    hidden = tensors(ALEX) | {"net.slice1.0.weight": objects}
    np.savez(tmp_path / "x.npz", allow_pickle=True, **hidden)
    with pytest.raises(ModelFileError, match=r"net\.slice1\.0\.weight of type object"):
        load_lpips(tmp_path / "x.npz")
    assert not witness.exists()
    pickle.loads(content)  # noqa: S301  ours: the witness works
    assert witness.exists()


def test_a_header_is_not_believed(tmp_path):
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("lin0.model.1.weight.npy", file.getvalue())
    with pytest.raises(ModelFileError, match=r"has lin0.model.1.weight \[1048576, 1048576\]"):
        load_lpips(tmp_path / "x.npz")


def test_paths(tmp_path):
    with pytest.raises(ModelFileError, match=r"is missing(.|\n)*save_model\(lpips\.LPIPS"):
        load_lpips(tmp_path / "absent.safetensors")
    with pytest.raises(ModelFileError, match=r"no file of tensors(.|\n)*safetensors"):
        load_lpips(tmp_path / "x.h5")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_lpips(str(tmp_path / "folder.npz"))


def test_the_file_of_vgg_is_as_large_as_the_real_one(folder):
    loaded(VGG, folder)
    count = sum(value.size for value in load_file(folder / "vgg.safetensors").values())
    assert count == 14_714_688 + 1_472
