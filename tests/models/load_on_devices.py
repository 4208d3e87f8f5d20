"""Loads a model folder onto a mesh of eight devices; a program, since jax counts them once."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from elastictok.models import load, load_shapes


def main() -> None:
    folder = sys.argv[1]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        matrix = leaf.ndim >= 2 and leaf.shape[-2] % 4 == 0 and leaf.shape[-1] % 2 == 0
        spec = (None,) * (leaf.ndim - 2) + ("fsdp", "tensor") if matrix else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    shapes = load_shapes(folder)
    shardings = jax.tree.map(rule, shapes)
    model = load(folder, shardings=shardings, dtype=jnp.bfloat16)
    plain = load(folder, dtype=jnp.bfloat16)
    for leaf, sharding, whole in zip(
        jax.tree.leaves(model), jax.tree.leaves(shardings), jax.tree.leaves(plain), strict=True
    ):
        assert leaf.sharding == sharding
        assert leaf.dtype == jnp.bfloat16
        assert (jax.device_get(leaf) == jax.device_get(whole)).all()
    query = model.encoder.transformer.layers.attention.query.weight
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 4, 8)}
    replicated = NamedSharding(mesh, PartitionSpec())
    everywhere = load(folder, shardings=replicated)
    assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(everywhere))
    assert eqx.tree_equal(jax.device_get(everywhere), jax.device_get(load(folder)))
    uneven = NamedSharding(mesh, PartitionSpec("fsdp"))
    try:
        load(folder, shardings=uneven)
    except ValueError as error:
        assert "encoder.place.weight does not fit its sharding" in str(error), error
    else:
        raise AssertionError("19 rows cannot be cut into four parts")
    print(f"loaded onto {len(jax.devices())} devices")


main()
