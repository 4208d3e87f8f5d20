"""`elastictok plan`."""

import json
import os
import re

from ._commands import Plan


def plan(command: Plan) -> None:
    """Compiles the step that the command speaks of and prints what it needs.

    jax is imported here: how many CPU devices there are is settled when it is.

    **Raises:** `ValueError` for a topology, mesh, length or batch that there cannot be.
    """
    _prepare(command.topology)

    import equinox as eqx
    import jax.numpy as jnp

    from elastictok.models import with_compute_dtype
    from elastictok.train import (
        Average,
        adamw,
        blocks_of,
        make_mesh,
        muon,
        parse_mesh,
        plan,
        topology_devices,
    )

    from ._models import find_preset, make_model, remat_policy

    if command.sequence_length is not None and command.context is not None:
        raise ValueError(
            "--sequence-length and --context say the same, in tokens and in blocks; give one"
        )
    model = eqx.filter_eval_shape(
        lambda: with_compute_dtype(
            make_model(command.preset, quantizer=command.quantizer, context=None, seed=0),
            jnp.dtype(command.precision),
        )
    )
    context = command.context
    if command.sequence_length is not None:
        context = blocks_of(model, command.sequence_length)
    devices = topology_devices(command.topology)
    axes = {"data": len(devices)} if command.mesh is None else parse_mesh(command.mesh)
    found = plan(
        model,
        make_mesh(**axes, devices=devices),
        batch_size=command.batch_size,
        context=context,
        optimizer=adamw(1e-3) if command.optimizer == "adamw" else muon(),
        accumulate=command.accumulate,
        tail_drop=find_preset(command.preset).tail_drop,
        remat=None if command.remat is None else remat_policy(command.remat),
        average=Average(0.999) if command.average else None,
    )
    if command.json is not None:
        figures = {"preset": command.preset, "topology": command.topology} | found.as_dict()
        command.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{command.preset} on {command.topology}, compiled in {found.compile_seconds:.0f} s")
    print(found)


def _prepare(topology: str) -> None:
    """What must be said before jax is imported."""
    # Nothing is run: no accelerator of this machine need be woken, or taken from who uses it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if count := re.fullmatch(r"cpu:([1-9]\d*)", topology):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count[1]}"
