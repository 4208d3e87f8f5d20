"""The kernels lower for TPUs on any machine: one call forward, three with the gradient, whatever
the batch. From there test_aot.py goes on, with the compiler that TPUs have.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from elastictok.attention import (
    BlockCausal,
    Contiguous,
    KeyValid,
    PallasTPU,
    Ring,
    Segments,
    ZigZag,
    attention,
)

CHIP = "TPU v5 lite"
TOKENS, HEADS, KV_HEADS, BLOCK = 600, 4, 2, 256
TILES = 3  # the block is the tile
ARGUMENTS = (
    jax.ShapeDtypeStruct((TOKENS, HEADS, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((TOKENS, KV_HEADS, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((TOKENS, KV_HEADS, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((), jnp.int32),
    jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    jax.ShapeDtypeStruct((TOKENS,), jnp.bool_),
)
KERNELS = PallasTPU(chip=CHIP)


def call(q, k, v, at, ids, valid, implementation=KERNELS):
    mask = BlockCausal(BLOCK, at) & Segments(ids) & KeyValid(valid)
    return attention(q, k, v, mask, implementation=implementation)


def gradient(run):
    def of_sum(*arguments):
        return jnp.sum(run(*arguments).astype(jnp.float32) ** 2)

    return jax.grad(of_sum, (0, 1, 2))


def mesh(**axes: int) -> AbstractMesh:
    device = AbstractDevice(device_kind=CHIP, num_cores=1, platform="tpu")
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types, abstract_device=device)


def batch(*sizes: int):
    return [jax.ShapeDtypeStruct((*sizes, *x.shape), x.dtype) for x in ARGUMENTS]


def lowered(run, arguments, over: AbstractMesh) -> str:
    with jax.sharding.use_abstract_mesh(over):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def kernels(text: str) -> list[str]:
    return re.findall(r'@tpu_custom_call\(.*kernel_name = "elastictok_attention_(\w+)"', text)


def grids(run, arguments) -> set[tuple[int, ...]]:
    with jax.sharding.use_abstract_mesh(mesh(x=1)):
        text = str(jax.make_jaxpr(run)(*arguments))
    return {tuple(map(int, grid)) for grid in re.findall(r"\bgrid=\((\d+), (\d+), (\d+)\)", text)}


FORWARD = {
    "one": (call, ()),
    "vmap": (jax.vmap(call), (5,)),
    "vmap of vmap": (jax.vmap(jax.vmap(call)), (2, 3)),
}
BACKWARD = {
    "one": (gradient(call), ()),
    "grad of vmap": (gradient(jax.vmap(call)), (5,)),
    "vmap of grad": (jax.vmap(gradient(call)), (5,)),
    "vmap of grad of vmap": (jax.vmap(gradient(jax.vmap(call))), (2, 3)),
}


def examples(sizes: tuple[int, ...]) -> int:
    return {(): 1, (5,): 5, (2, 3): 6}[sizes]


@pytest.mark.parametrize("how", FORWARD)
def test_forward_is_one_call_with_the_batch_in_its_grid(how):
    run, sizes = FORWARD[how]
    assert kernels(lowered(run, batch(*sizes), mesh(x=1))) == ["forward"]
    assert grids(run, batch(*sizes)) == {(examples(sizes), HEADS, TILES)}


@pytest.mark.parametrize("how", BACKWARD)
def test_the_gradient_takes_two_more(how):
    run, sizes = BACKWARD[how]
    assert kernels(lowered(run, batch(*sizes), mesh(x=1))) == ["forward", "dq", "dkv"]
    size = examples(sizes)
    assert grids(run, batch(*sizes)) == {(size, HEADS, TILES), (size, KV_HEADS, TILES)}


def test_what_the_batch_shares_is_not_repeated():
    axes = (0, 0, 0, None, None, None)
    text = lowered(jax.vmap(call, axes), (*batch(5)[:3], *ARGUMENTS[3:]), mesh(x=1))
    (operands,) = re.findall(r"@tpu_custom_call\(.* : \((.*)\) -> ", text)
    shapes = re.findall(r"tensor<([\dx]+)x\w+>", operands)
    assert [shape.split("x")[0] for shape in shapes] == ["1", "1", "1", "5", "1", "5", "5"]


@pytest.mark.parametrize("layout", [Contiguous(), ZigZag()], ids=["contiguous", "zig-zag"])
def test_a_ring_has_one_call_in_its_loop_and_the_batch_stays_split(layout):
    ring = Ring("sequence", layout, PallasTPU(chip=CHIP))

    def run(*arguments):
        return jax.vmap(
            lambda *example: call(*example, implementation=ring), spmd_axis_name="data"
        )(*arguments)

    over = mesh(data=2, sequence=4)
    assert kernels(lowered(run, batch(6), over)) == ["forward"]
    text = lowered(gradient(run), batch(6), over)
    assert kernels(text) == ["forward", "dq", "dkv"]
    # Each of the two loops, forward and back, runs with a part of the batch and of the tokens.
    loops = re.findall(r"sdy.manual_computation\(.*", text)
    assert len(loops) == 2
    for loop in loops:
        axes = '{"data"}, {"sequence"}, {}, {}'
        assert loop.count(f"[{axes}]") >= 4
        assert f"tensor<3x{TOKENS // 4}x{HEADS}x64xbf16>" in loop
        assert "[{}" not in loop
