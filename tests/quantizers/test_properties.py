"""What every quantizer must do, on latents that hypothesis draws. Add yours to `CASES`.

The properties themselves are in `elastictok.quantizers.testing`.
"""

import dataclasses
import math
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    AbstractQuantizer,
    GaussianVAE,
    Gradient,
    Grouped,
    Identity,
    KMeansStart,
    Projected,
    Residual,
    RotationTrick,
    SimVQ,
    UniformGrid,
)
from elastictok.quantizers.testing import GradientOracle, Sample, elementwise, properties, unchanged

TOKENS = 12
README = Path(__file__).parents[2] / "quantizers" / "README.md"


def readme_quantizer() -> AbstractDiscreteQuantizer:
    """The quantizer that the README tells users to write."""
    [block] = [
        b
        for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
        if "class Ternary" in b
    ]
    names = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    return names["Ternary"](4)


def fsq(levels: tuple[int, ...]) -> GradientOracle:
    """The derivative of the bounding function, written out."""

    def slope(z):
        half = (np.array(levels) - 1) * 0.999 / 2
        offset = np.array([0.5 if level % 2 == 0 else 0.0 for level in levels])
        step = np.array([level // 2 for level in levels])
        return half / np.cosh(z + np.tan(offset / half)) ** 2 / step

    return elementwise(slope)


def sphere(z: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """What the normalisation of each row does to the gradient; nothing passes a row of zeros."""
    zero = np.abs(z).max(axis=-1, keepdims=True) <= 1e-12
    length = np.where(zero, 1, np.linalg.norm(z, axis=-1, keepdims=True))
    unit = z / length
    along = np.sum(unit * cotangent, axis=-1, keepdims=True)
    return np.where(zero, 0, (cotangent - unit * along) / length)


def parts(inner: GradientOracle, n: int) -> GradientOracle:
    """The same gradient in each of `n` parts."""

    def gradient(z, cotangent):
        cut = zip(np.split(z, n, axis=-1), np.split(cotangent, n, axis=-1), strict=True)
        return np.concatenate([inner(*part) for part in cut], axis=-1)

    return gradient


def rotated(entries: np.ndarray) -> GradientOracle:
    """By the rotation that takes each latent to its entry, and as much longer as the entry is."""

    def gradient(z, cotangent):
        out = np.array(cotangent, np.float64)
        for row in np.flatnonzero(np.linalg.norm(z, axis=-1) > 1e-6):
            point = entries[np.sum((entries - z[row]) ** 2, axis=-1).argmin()]
            long, other = np.linalg.norm(z[row]), np.linalg.norm(point)
            a, b = z[row] / long, point / other
            turn = np.outer(b, a) - np.outer(a, b)
            matrix = np.eye(len(a)) + turn + turn @ turn / (1 + a @ b)
            out[row] = other / long * matrix.T @ cotangent[row]
        return out

    return gradient


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A quantizer and what the suite cannot know about it: see `properties`."""

    quantizer: AbstractQuantizer
    gradient: GradientOracle = unchanged
    exact: bool = True
    nearest: bool = True


def projected(case: Case, in_dim: int = 5, out_dim: int = 9) -> Case:
    """The case between two maps."""
    inner = case.quantizer
    assert isinstance(inner, AbstractDiscreteQuantizer)
    quantizer = Projected(in_dim, inner, out_dim, key=jax.random.key(5))
    w_in, w_out = (np.asarray(w, np.float64) for w in (quantizer.w_in, quantizer.w_out))

    def gradient(z, cotangent):
        return case.gradient(z @ w_in, cotangent @ w_out.T) @ w_in.T

    return Case(quantizer, gradient, exact=case.exact, nearest=False)


KEY = jax.random.key(0)
ENTRIES = np.asarray(VQ(64, 4, key=KEY).codebook, np.float64)
CASES = {
    "fsq": Case(FSQ((8, 8, 8, 5, 5, 5)), fsq((8, 8, 8, 5, 5, 5))),
    "fsq_odd": Case(FSQ((6, 7, 11)), fsq((6, 7, 11))),
    "fsq_two": Case(FSQ((2, 2)), fsq((2, 2))),
    "fsq_fine": Case(FSQ((1001, 3)), fsq((1001, 3))),
    "fsq_large": Case(FSQ((1001, 1000, 999)), fsq((1001, 1000, 999)), nearest=False),
    "grid": Case(UniformGrid((4, 5), (3, 7))),
    "grid_large": Case(UniformGrid((1000, 1001), (2**20, 2**19 + 1)), nearest=False),
    "vq": Case(VQ(64, 4, key=KEY)),
    "vq_gradient": Case(VQ(64, 4, key=KEY, book=Gradient(0.7), revival=0.1)),
    "vq_cosine": Case(VQ(64, 4, key=KEY, cosine=True), sphere),
    "vq_cosine_gradient": Case(
        VQ(64, 4, key=KEY, cosine=True, book=Gradient(), start=KMeansStart(2)), sphere
    ),
    "vq_start": Case(VQ(64, 4, key=KEY, start=KMeansStart(1))),
    "vq_rotation": Case(VQ(64, 4, key=KEY, estimator=RotationTrick()), rotated(ENTRIES)),
    "simvq": Case(SimVQ(64, 4, key=KEY)),
    "simvq_rotation": Case(SimVQ(64, 4, key=KEY, estimator=RotationTrick()), rotated(ENTRIES / 2)),
    "lfq": Case(LFQ(10)),
    "lfq_large": Case(LFQ(30), nearest=False),
    "bsq": Case(BSQ(10, temperature=0.3), sphere),
    "bsq_one": Case(BSQ(1), sphere),
    "bsq_large": Case(BSQ(30), sphere, nearest=False),
    "residual_fsq": Case(Residual(FSQ((6, 7)), 3), fsq((6, 7)), nearest=False),
    "residual_fsq_fine": Case(Residual(FSQ((1001,)), 2), fsq((1001,)), nearest=False),
    "residual_vq": Case(Residual(VQ(16, 4, key=KEY), 3)),
    "residual_vq_large": Case(Residual(VQ(300, 4, key=KEY), 2), exact=False, nearest=False),
    "residual_vq_start": Case(
        Residual(VQ(16, 4, key=KEY, start=KMeansStart(), book=Gradient()), 3)
    ),
    "residual_simvq": Case(Residual(SimVQ(16, 4, key=KEY), 3)),
    "residual_lfq": Case(Residual(LFQ(4), 4), nearest=False),
    "grouped_fsq": Case(Grouped(FSQ((6, 7)), 2), parts(fsq((6, 7)), 2)),
    "grouped_lfq": Case(Grouped(LFQ(3), 2)),
    "grouped_bsq": Case(Grouped(BSQ(3), 2), parts(sphere, 2)),
    "grouped_vq": Case(Grouped(VQ(16, 2, key=KEY), 3)),
    "grouped_residual": Case(Grouped(Residual(VQ(8, 2, key=KEY), 2), 2)),
    "grouped_one_stage": Case(Grouped(Residual(LFQ(3), 1), 1)),
    "vae": Case(GaussianVAE(3), lambda z, c: np.concatenate([c, np.zeros_like(c)], axis=-1)),
    "identity": Case(Identity(5)),
    "readme": Case(readme_quantizer(), elementwise(lambda z: 1.5 / np.cosh(z) ** 2)),
}
CASES |= {
    "projected_fsq": projected(CASES["fsq_odd"], in_dim=2, out_dim=3),
    "projected_lfq": projected(CASES["grouped_lfq"]),
    "projected_vq": projected(CASES["vq"], in_dim=30, out_dim=17),
    "projected_residual": projected(CASES["residual_vq"]),
    "grouped_projected": Case(
        Grouped(projected(Case(LFQ(3))).quantizer, 2),
        parts(projected(Case(LFQ(3))).gradient, 2),
        nearest=False,
    ),
}
PROPERTIES = {
    (name, check): run
    for name, case in CASES.items()
    for check, run in properties(
        case.quantizer, gradient=case.gradient, exact=case.exact, nearest=case.nearest
    ).items()
}
# Of those that are much like another one, which the plain run has.
HEAVY = {
    "vq_cosine_gradient",
    "residual_simvq",
    "residual_vq_start",
    "simvq_rotation",
    "bsq_one",
    "grouped_one_stage",
    "fsq_two",
    "fsq_fine",
    "fsq_large",
    "grid_large",
    "lfq_large",
    "bsq_large",
    "residual_fsq_fine",
    "residual_vq_large",
    "residual_lfq",
    "grouped_fsq",
    "grouped_lfq",
    "grouped_bsq",
    "grouped_residual",
    "projected_lfq",
    "projected_vq",
    "projected_residual",
    "grouped_projected",
}
# They draw little or nothing, or run without a compiler.
FEW = {
    "bits_per_token_fit_the_codes": 1,
    "codes_survive_the_round_trip": 5,
    "constants_are_finite": 3,
    "jit_equals_eager": 3,
    "nothing_kept_changes_nothing": 1,
    "points_have_the_same_bits_in_every_program": 5,
    "trainable_marks_the_structure": 1,
    "vmap_equals_a_loop": 3,
    "wrong_width_is_refused": 1,
}


def samples(width: int) -> st.SearchStrategy[Sample]:
    numbers = st.floats(-4, 4, width=32, allow_subnormal=False)
    return st.builds(
        Sample,
        latents=hnp.arrays(np.float32, (TOKENS, width), elements=numbers),
        keep=hnp.arrays(np.bool_, TOKENS),
        seed=st.integers(0, 2**31 - 1),
    )


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, marks=[pytest.mark.heavy] if name in HEAVY else [])
        for name, check in PROPERTIES
    ],
)
def test_property(name, check):
    strategy = samples(CASES[name].quantizer.input_dim)
    few = settings(max_examples=min(FEW.get(check, 8), settings.default.max_examples))
    few(given(sample=strategy)(lambda sample: PROPERTIES[name, check](sample)))()


def sizes_in(jaxpr) -> list[int]:
    """The number of elements of every value that a jaxpr computes, inner jaxprs included."""
    sizes = [math.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars]
    params = jax.tree.leaves([eqn.params for eqn in jaxpr.eqns], is_leaf=is_jaxpr)
    for inner in filter(is_jaxpr, params):
        sizes += sizes_in(inner)
    return sizes


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")


@pytest.mark.parametrize(
    "quantizer",
    [
        FSQ((8, 8, 8, 5, 5, 5)),
        FSQ((1001, 1001, 1001)),
        LFQ(30),
        BSQ(30),
        Residual(FSQ((8, 8, 8, 8)), 4),
        Residual(LFQ(30), 3),
        Grouped(LFQ(30), 3),
    ],
    ids=["fsq", "fsq_large", "lfq", "bsq", "residual_fsq", "residual_lfq", "grouped_lfq"],
)
def test_nothing_as_large_as_the_codebook_exists(quantizer):
    """Training, the entropy penalty and codes both ways need a few numbers per latent."""

    def step(z, keep):
        out = quantizer(z, keep)
        round_trip = quantizer.from_codes(quantizer.to_codes(out.latents))
        return jnp.sum(round_trip) + jnp.sum(out.latents) + quantizer.batch_loss(out.statistics)

    z = jnp.zeros((TOKENS, quantizer.input_dim))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(step))(z, jnp.ones(TOKENS, bool))
    sizes = sizes_in(jaxpr)
    assert len(sizes) > 20
    assert max(sizes) <= z.size * quantizer.streams


def test_sizes_in_sees_inner_values():
    inner = jax.jit(lambda x: jnp.sum(jnp.outer(x, x)))
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.map(inner, x))(jnp.zeros((3, 50)))
    assert max(sizes_in(jaxpr)) == 2500


@pytest.mark.parametrize(
    "name", ["fsq_odd", "grid", "residual_fsq", "residual_vq", "projected_fsq"]
)
def test_whole_codebook_has_the_same_bits_in_every_program(name):
    """The book as constants, as arguments, and in an addition that the compiler may fuse."""
    quantizer = CASES[name].quantizer
    assert isinstance(quantizer, AbstractDiscreteQuantizer)
    size, n = quantizer.codebook_size, quantizer.streams
    codes = np.stack(np.unravel_index(np.arange(size**n), (size,) * n), -1).astype(np.int32)
    if name in ("fsq_odd", "grid", "projected_fsq"):
        codes = codes[:, 0]
    latents = np.asarray(eqx.filter_jit(lambda q, c: q.from_codes(c))(quantizer, codes))
    np.testing.assert_array_equal(latents, quantizer.from_codes(jnp.asarray(codes)))
    constant = jax.jit(lambda c: quantizer.from_codes(c) + 1)(codes)
    np.testing.assert_array_equal(constant, latents + np.float32(1))
