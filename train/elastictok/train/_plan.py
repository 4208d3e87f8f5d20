"""What a training step needs, before there is anything to run it on.

The real step is compiled ahead of time for the devices of a mesh, which need not be here, from
shapes alone: no array is ever made. Memory is what the compiler says, time is a bound.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from elastictok.attention import PallasTPU, TileKey, TPUTileSizes, tile_sizes
from elastictok.eval import Table, TableRow, format_table
from elastictok.models import (
    AbstractExecution,
    ElasticTok,
    Local,
    UniformDrop,
    trainable,
)

from ._chips import Chip, chip_of
from ._devices import CompiledStep
from ._fit import default_optimizer, default_quantizer_weight
from ._losses import MSE
from ._program import Program, read_program
from ._sharding import execution_on, pixels_spec, shardings
from ._step import (
    Average,
    DeviceBatch,
    Loss,
    TailDrop,
    TrainState,
    batch_losses,
    init_state,
    step_keys,
    train_step,
)

_MSE = MSE()
_UNIFORM = UniformDrop()
_EXAMPLES = ("v4:2x2x1", "v5e:2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "cpu:8")
# Products of two arrays in each kernel of attention.
_PRODUCTS = {
    "elastictok_attention_forward": 2,
    "elastictok_attention_dq": 3,
    "elastictok_attention_dkv": 4,
}


def topology_devices(name: str) -> tuple[jax.Device, ...]:
    """The devices of a piece of a TPU pod, none of which need be here, or the CPUs that are.

    **Arguments:**

    - `name`: such as `v5e:4x4`, or `cpu:8` for that many CPU devices of this process.

    **Raises:** `ValueError` if there is no such topology; `RuntimeError` without `libtpu`, or with
        another number of CPU devices.
    """
    if cpus := re.fullmatch(r"cpu:(\d+)", name):
        wanted, here = int(cpus[1]), jax.devices("cpu")
        if wanted != len(here):
            raise RuntimeError(
                f"{name} needs {wanted} CPU devices and this process has {len(here)}; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} before jax is imported"
            )
        return tuple(here)
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f'the compiler for {name} is missing: pip install "elastictok[aot]" (it needs no TPU)'
        )
    # Read when libtpu is loaded: there is no TPU to ask, and other processes may have loaded it.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),  # any silences a warning; the topology decides
    ):
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(
            f"there is no topology {name!r} ({str(error).strip()}); write it as in "
            f"{', '.join(_EXAMPLES)}"
        ) from None
    return tuple(found)


def blocks_of(model: ElasticTok, tokens: int) -> int:
    """Blocks in a sequence of so many tokens.

    **Raises:** `ValueError` with the nearest lengths if they are no whole number of blocks.
    """
    blocks, rest = divmod(tokens, model.max_tokens)
    if rest or not blocks:
        near = sorted({max(blocks, 1) * model.max_tokens, (blocks + 1) * model.max_tokens})
        raise ValueError(
            f"{tokens} tokens are no whole number of blocks of {model.max_tokens} tokens; take "
            f"{' or '.join(map(str, near))}"
        )
    return blocks


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step needs. Bytes and flops are of one device where nothing else is said.

    - `mesh`: devices along each axis; `devices` in all, of `device_kind`.
    - `batch_size`: sequences in a step, computed in `accumulate` parts; `context` blocks in a
        sequence, `tokens` in all of them.
    - `parameter_count`: of the model, whole.
    - `parameters`, `optimizer`, `average`, `batch`: bytes, exactly, by how they are split. The
        average is that of the weights, 0 without one.
    - `activations`: bytes that the backward pass keeps: an estimate.
    - `temporaries`: bytes of all that a step needs besides what it is given, activations included.
    - `code`: bytes of the program.
    - `total`: bytes that a device holds at the worst moment.
    - `memory`: bytes that a device has, None if unknown.
    - `model_flops`: of the whole step, what the model needs: each matrix product once forward and
        twice backward, attention over visible pairs only.
    - `flops`: that the busiest device carries out: recomputation, and waiting for the last part of
        a sequence, which sees the most, included.
    - `traffic`: bytes to and from the memory: an estimate.
    - `sent`: bytes to other devices by kind of collective and the mesh axes that it goes along.
    - `kernels`: calls of kernels for attention in the program's text; `endless` loops in it whose
        rounds nobody knows before it runs, and that are counted once.
    - `refused`: what the compiler said instead of compiling; then all that only it knows is None.
    - `chip`: None if its figures are unknown; then there are no times.
    """

    device_kind: str
    devices: int
    mesh: Mapping[str, int]
    batch_size: int
    accumulate: int
    context: int
    tokens: int
    dtype: str
    parameter_count: int
    parameters: int
    optimizer: int
    average: int
    batch: int
    activations: int
    model_flops: float
    memory: float | None
    chip: Chip | None
    compile_seconds: float
    temporaries: int | None = None
    code: int | None = None
    total: int | None = None
    flops: float | None = None
    traffic: float | None = None
    sent: Mapping[str, float] | None = None
    kernels: int = 0
    endless: int = 0
    refused: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether a device has the memory; None if nobody knows how much it has."""
        if self.refused is not None:
            return False
        if self.memory is None or self.total is None:
            return None
        return self.total <= self.memory

    @property
    def compute_seconds(self) -> float | None:
        """Of the products, at the chip's peak for bfloat16."""
        return self._seconds(self.flops, "bf16_flops")

    @property
    def memory_seconds(self) -> float | None:
        """Of the traffic to and from the memory, at its full rate."""
        return self._seconds(self.traffic, "hbm_bytes_per_second")

    @property
    def link_seconds(self) -> float | None:
        """Of what is sent to others, over all of a chip's links at once."""
        sent = None if self.sent is None else sum(self.sent.values(), 0.0)
        return self._seconds(sent, "link_bytes_per_second")

    @property
    def seconds(self) -> float | None:
        """The least that a step takes: the largest of the three, as if they hid each other."""
        terms = (self.compute_seconds, self.memory_seconds, self.link_seconds)
        known = [term for term in terms if term is not None]
        return max(known) if len(known) == len(terms) else None

    @property
    def mfu(self) -> float | None:
        """Model flops utilisation in a step that takes no longer: the highest there can be."""
        seconds = self.seconds
        if seconds is None or self.chip is None:
            return None
        peak = self.devices * self.chip.bf16_flops / self.chip.devices
        return self.model_flops / (seconds * peak)

    def _seconds(self, amount: float | None, rate: str) -> float | None:
        if self.chip is None or amount is None:
            return None
        return amount / (getattr(self.chip, rate) / self.chip.devices)

    def as_dict(self) -> dict[str, Any]:
        """All figures, derived ones included, as JSON can hold them."""
        derived = (
            "fits",
            "compute_seconds",
            "memory_seconds",
            "link_seconds",
            "seconds",
            "mfu",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    def tables(self) -> tuple[Table, ...]:
        """For people."""
        return (self._memory_table(), *([] if self.flops is None else [self._time_table()]))

    def __str__(self) -> str:
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1)
        parts = f", in {self.accumulate} parts" if self.accumulate > 1 else ""
        return "\n\n".join(
            [
                f"{self.devices} x {self.device_kind}" + (f": {axes}" if axes else ""),
                f"{self.parameter_count:,} parameters, products in {self.dtype}\n"
                f"{self.batch_size} x {self.tokens:,} tokens in a step ({self.context} blocks each)"
                + parts,
                *(format_table(table) for table in self.tables()),
                self._verdict(),
            ]
        )

    def _memory_table(self) -> Table:
        def row(name: str, size: float | int | None) -> TableRow:
            share = "" if not self.memory or size is None else f"{100 * size / self.memory:.1f} %"
            return TableRow((name, "-" if size is None else f"{size / 1e9:.3f}", share))

        rest = None if self.temporaries is None else max(self.temporaries - self.activations, 0)
        rows = [
            row("parameters", self.parameters),
            row("optimizer", self.optimizer),
            *([row("average of the weights", self.average)] if self.average else []),
            row("batch", self.batch),
            row("activations", self.activations),
            row("other temporaries", rest),
            row("program", self.code),
            row("total", self.total),
            *([] if self.memory is None else [row("there is", self.memory)]),
        ]
        note = (
            "Activations, what the backward pass keeps, are an estimate; together with the other "
            "temporaries they are what the compiler says."
        )
        return Table("Memory of a device", ("", "GB", "share"), tuple(rows), note)

    def _time_table(self) -> Table:
        def row(name: str, amount: float, unit: str, seconds: float | None) -> TableRow:
            said = "-" if seconds is None else f"{seconds:.3g}"
            return TableRow((name, f"{_number(amount)} {unit}", said))

        assert self.flops is not None
        assert self.traffic is not None
        assert self.sent is not None
        sent = sum(self.sent.values(), 0.0)
        rows = [
            row("products", self.flops / 1e12, "Tflop", self.compute_seconds),
            row("to and from memory", self.traffic / 1e9, "GB", self.memory_seconds),
            row("sent to others", sent / 1e9, "GB", self.link_seconds),
            *(
                TableRow((f"  {name}", f"{_number(size / 1e9)} GB", ""))
                for name, size in self.sent.items()
                if size >= 0.001 * sent
            ),
        ]
        note = (
            "Products are the busiest device's, with what is computed again; traffic to and from "
            "memory is an estimate."
        )
        if self.chip is not None:
            note += " Times are at the chip's peak rates, for bfloat16 and over all links at once."
            if self.dtype == "float32":
                note += " Products of float32 take several times as long."
        if self.endless:
            note += (
                f" {self.endless} loops, such as those of attention over visible tiles, go round "
                "as often as only running tells: they are counted once."
            )
        return Table("A step of a device", ("", "amount", "seconds"), tuple(rows), note)

    def _verdict(self) -> str:
        lines = [f"The model needs {_number(self.model_flops / 1e12)} Tflop for a step."]
        if self.seconds is not None and self.mfu is not None:
            rate = self.batch_size * self.tokens / self.seconds
            lines.append(
                f"A step takes at least {self.seconds:.3g} s: at most {rate:,.0f} tokens per "
                f"second, {100 * self.mfu:.0f} % of the peak (MFU)."
            )
        elif self.refused is None:
            lines.append(
                f"There are no peak rates of {self.device_kind!r} to tell a time and a utilisation "
                "by."
            )
        if self.fits is False:
            said = f" The compiler: {self.refused}" if self.refused else ""
            lines.append(
                f"It does not fit.{said}\nTry more devices along fsdp or sequence, a smaller batch "
                "or more of --accumulate, or --remat layers."
            )
        return "\n".join(lines)


def _number(value: float | int) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plan(
    model: ElasticTok,
    mesh: Mesh,
    *,
    batch_size: int | None = None,
    context: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    accumulate: int = 1,
    remat: Callable[..., Any] | None = None,
    loss: Loss = _MSE,
    tail_drop: TailDrop = _UNIFORM,
    average: Average | None = None,
) -> Plan:
    """Compiles the training step for the devices of a mesh, and reads what it needs.

    **Arguments:**

    - `model`: with arrays or, better, with shapes: `eqx.filter_eval_shape(make)`.
    - `mesh`: from [`make_mesh`][], of devices that are here or of [`topology_devices`][].
    - `batch_size`: sequences in a step, on all devices; as few as the mesh takes by default.
    - `context`: blocks in a sequence; the model's by default.
    - `optimizer`, `accumulate`, `remat`, `loss`, `tail_drop`, `average`: as of [`fit`][].

    **Returns:** a [`Plan`][]; one that says so if the compiler finds that it does not fit.

    **Raises:** `ValueError` for a batch that cannot be split.
    """
    began = time.perf_counter()
    context = model.context if context is None else context
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    examples: int = rows * accumulate if batch_size is None else batch_size
    sizes = {"context": context, "accumulate": accumulate, "batch_size": examples}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if examples % (rows * accumulate):
        raise ValueError(
            f"a batch of {examples} sequences cannot be split over {rows} devices (data x fsdp) "
            f"in {accumulate} parts; choose a multiple of {rows * accumulate}"
        )
    optimizer = default_optimizer(1000) if optimizer is None else optimizer
    device = mesh.devices.flat[0]
    inner = PallasTPU(chip=device.device_kind) if device.platform == "tpu" else None
    execution = execution_on(mesh, remat, inner)
    state = _state(model, optimizer, mesh, average is not None)
    batch = _batch(model, examples, context)
    # All of a batch lie as its pixels do.
    split = NamedSharding(mesh, pixels_spec(batch.pixels.shape, mesh))
    batch = _placed(batch, jax.tree.map(lambda _: split, batch))
    step = functools.partial(
        train_step,
        optimizer=optimizer,
        loss=loss,
        tail_drop=tail_drop,
        quantizer_weight=default_quantizer_weight(model),
        accumulate=accumulate,
        average=average,
        execution=execution,
    )
    refused, program, memory = None, None, {}
    # Kernels ask what they are compiled for, and without a mesh they would ask this machine.
    with jax.set_mesh(mesh):
        kept = _kept(model, context, Local(implementation=inner, remat=remat), loss, tail_drop)
        try:
            compiled = CompiledStep(step, state, batch, (), mesh).compiled
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = str(error).removeprefix("RESOURCE_EXHAUSTED:").strip().splitlines()[0]
        else:
            program = read_program(compiled.as_text() or "")
            memory = _memory(compiled, device.platform)
    model_dtype = model.encoder.transformer.dtype
    chip = chip_of(device.device_kind)
    known: dict[str, Any] = memory
    if program is not None:
        shards = mesh.shape["sequence"]
        block = model.encoder.positions(model.grid(*model.size))
        share = _busiest_share(context, block, shards)
        known |= {
            "flops": program.flops + sum(share * k.flops * k.times for k in program.kernels),
            "traffic": program.traffic + share * _read_again(program, model, device.device_kind),
            "sent": _sent(program, mesh),
            "kernels": len(program.kernels),
            "endless": program.endless,
        }
    params = state.model
    return Plan(
        device_kind=device.device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=examples,
        accumulate=accumulate,
        context=context,
        tokens=context * model.max_tokens,
        dtype=jnp.dtype(model_dtype).name,
        parameter_count=sum(math.prod(leaf.shape) for leaf in _shapes(params)),
        parameters=_bytes_here(params),
        optimizer=_bytes_here(state.opt_state),
        average=_bytes_here(state.average),
        batch=_bytes_here(batch),
        activations=kept * examples // (rows * accumulate * mesh.shape["sequence"]),
        model_flops=model_flops(model, context) * examples,
        memory=_device_memory(device, chip, mesh),
        chip=chip,
        compile_seconds=time.perf_counter() - began,
        refused=refused,
        **known,
    )


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _shapes(tree: PyTree) -> list[jax.ShapeDtypeStruct]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_shape(leaf)]


def _state(
    model: ElasticTok, optimizer: optax.GradientTransformation, mesh: Mesh, average: bool
) -> TrainState:
    """The shapes of `init_state`, where they belong."""
    made = eqx.filter_eval_shape(
        lambda model: init_state(model, optimizer, jax.random.key(0), average=average), model
    )
    arrays, static = eqx.partition(made, _is_shape)
    return eqx.combine(_placed(arrays, shardings(arrays, mesh)), static)


def _batch(model: ElasticTok, batch_size: int, context: int) -> DeviceBatch:
    """The shapes of a batch."""
    front = (batch_size, context)
    pixels = (*front, model.frames_per_block, *model.size, 3)
    return eqx.filter_eval_shape(
        lambda: DeviceBatch(
            jnp.zeros(pixels, jnp.uint8), jnp.zeros(front, jnp.int32), jnp.zeros(front, jnp.bool_)
        )
    )


def _placed(tree: PyTree, where: PyTree[NamedSharding]) -> PyTree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, where
    )


def _bytes_here(tree: PyTree) -> int:
    """Of one device's parts of arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in _shapes(tree)
        if leaf.sharding is not None
    )


def _sent(program: Program, mesh: Mesh) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in program.collectives:
        name = f"{each.kind} over {' x '.join(each.axes(mesh.shape))}"
        found[name] = found.get(name, 0.0) + each.sent
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _memory(compiled: jax.stages.Compiled, platform: str) -> dict[str, int]:
    said = compiled.memory_analysis()
    assert said is not None
    given = said.argument_size_in_bytes
    made = said.output_size_in_bytes - said.alias_size_in_bytes
    code = said.generated_code_size_in_bytes
    if platform == "tpu":
        # The figure that the compiler compares with what there is. `temp_size_in_bytes` is larger:
        # it has the memories of the core in it, and gaps.
        temporaries = said.peak_memory_in_bytes - given - made
    else:
        temporaries = said.temp_size_in_bytes  # reserved as one piece
    return {"temporaries": temporaries, "code": code, "total": given + made + temporaries + code}


def _device_memory(device: jax.Device, chip: Chip | None, mesh: Mesh) -> float | None:
    if chip is not None:
        return chip.memory_bytes / chip.devices
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / mesh.size
    return None


# --- what the backward pass keeps ----------------------------------------------------------------


def _kept(
    model: ElasticTok,
    context: int,
    execution: AbstractExecution,
    loss: Loss,
    tail_drop: TailDrop,
) -> int:
    """Bytes that `jax.vjp` keeps of an example: what two need more than one, so that what does not
    grow with the batch, such as the weights, is not among it."""

    def kept(examples: int) -> int:
        batch = _batch(model, examples, context)

        def residuals(model: ElasticTok, batch: DeviceBatch) -> Any:
            params, rest = eqx.partition(model, trainable(model))
            keys = step_keys(jax.random.key(0), 0, examples)

            def total(params: PyTree) -> Any:
                whole = eqx.combine(params, rest)
                errors = jnp.ones(batch.valid.shape)  # whatever they are, the shapes are these
                return batch_losses(whole, batch, loss, tail_drop, 1.0, keys, execution, errors)[0]

            return jax.vjp(total, params)[1]

        found = eqx.filter_eval_shape(residuals, model, batch)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in _shapes(found))

    return kept(2) - kept(1)


# --- what is computed ----------------------------------------------------------------------------


def visible_pairs(context: int, block: int, start: int = 0, stop: int | None = None) -> int:
    """Pairs of a query and a key it sees, of a sequence in which blocks see themselves and earlier
    ones.

    **Arguments:**

    - `context`, `block`: blocks in the sequence, and tokens in a block.
    - `start`, `stop`: the queries that are counted; all by default.
    """
    stop = context * block if stop is None else stop
    pairs = 0
    for number in range(start // block, -(-stop // block)):
        here = min(stop, (number + 1) * block) - max(start, number * block)
        pairs += here * (number + 1) * block
    return pairs


def _busiest_share(context: int, block: int, shards: int) -> float:
    """Of all pairs of a device's queries with keys, what it sees: of the last part of a sequence.

    A ring's layout is contiguous, so that the device with the last part has the most to do.
    """
    tokens = context * block
    first = tokens - tokens // shards
    return visible_pairs(context, block, first) / ((tokens - first) * tokens)


def model_flops(model: ElasticTok, context: int) -> float:
    """Floating-point operations that training on one sequence needs, by the usual count: each
    product of matrices once forward and twice backward, those of attention over visible pairs, and
    nothing that is computed again. What is not a matrix product of the encoder and the decoder
    (norms, the quantizer, an embedding of places, the optimizer) is not in it.

    **Arguments:**

    - `model`: with arrays or shapes.
    - `context`: blocks in the sequence.
    """
    grid = model.grid(*model.size)
    forward = model.encoder.flops(context, grid) + model.decoder.flops(context, grid)
    # Pixels have no gradient.
    spared = 2.0 * context * math.prod(grid) * math.prod(model.encoder.in_proj.weight.shape)
    return 3 * forward - spared


def _read_again(program: Program, model: ElasticTok, chip: str) -> float:
    """Bytes that the kernels of attention fetch beyond once: two arrays of the other side for each
    tile of their own. Of all pairs, as `Kernel.flops` has it."""
    total = 0.0
    stack = model.encoder.transformer
    dtype = jnp.dtype(stack.dtype)
    block = model.encoder.positions(model.grid(*model.size))
    key = TileKey("pallas_tpu", chip, dtype.name, stack.head_dim, block)
    tiles = tile_sizes(key).tiles
    assert isinstance(tiles, TPUTileSizes)
    own = {
        "elastictok_attention_forward": tiles.forward.queries,
        "elastictok_attention_dq": tiles.dq.queries,
        "elastictok_attention_dkv": tiles.dkv.keys,
    }
    for kernel in program.kernels:
        if kernel.name in own:
            # flops are 2 x products x pairs x width, what is fetched 2 x pairs / tile x width.
            fetched = kernel.flops * dtype.itemsize / (_PRODUCTS[kernel.name] * own[kernel.name])
            total += fetched * kernel.times
    return total
