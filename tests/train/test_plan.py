"""Plans say what steps need: exactly where that can be known, and else close to what they took."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from tiny_training import OPTIMIZER, tiny_model

from elastictok.attention import BlockCausal, Reference
from elastictok.models import (
    Local,
    Patching,
    RankRotary,
    Raster,
    UniformDrop,
    presets,
    trainable,
    with_compute_dtype,
)
from elastictok.quantizers import FSQ
from elastictok.train import (
    CHIPS,
    MSE,
    Average,
    Plan,
    blocks_of,
    init_state,
    make_mesh,
    plan,
    topology_devices,
)
from elastictok.train import _plan as module
from elastictok.train._program import read_program
from elastictok.train._step import batch_losses, step_keys

HERE = Path(__file__).parent
GB = 10**9


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def shapes(**options):
    return eqx.filter_eval_shape(lambda: tiny_model(**options))


def size_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


@pytest.fixture(scope="module")
def planned():
    before = [x.nbytes for x in jax.live_arrays()]
    found = plan(shapes(), one_device(), batch_size=6, optimizer=OPTIMIZER, average=Average(0.9))
    assert sum(x.nbytes for x in jax.live_arrays()) - sum(before) < 1000  # no array of the model
    return found


def test_what_is_known_exactly(planned):
    model = tiny_model()
    state = init_state(model, OPTIMIZER, jax.random.key(0), average=True)
    assert planned.parameters == size_of(model)
    assert planned.parameter_count == planned.parameters / 4
    assert planned.optimizer == size_of(state.opt_state)
    assert planned.average == size_of(state.average)
    assert planned.batch == 6 * 2 * (16 * 16 * 3 + 4 + 1)
    given = planned.parameters + planned.optimizer + planned.average + planned.batch
    assert planned.temporaries > 0
    assert (
        given < planned.total - planned.temporaries < given + 2000
    )  # numbers of steps and the like
    assert planned.total <= planned.memory
    assert planned.fits


@pytest.mark.heavy
def test_what_saves_memory_is_planned_for(planned):
    """Parts, one after the other, and layers that are computed again."""
    parts = plan(shapes(), one_device(), batch_size=6, optimizer=OPTIMIZER, accumulate=3)
    assert parts.temporaries < 0.9 * planned.temporaries
    assert parts.flops == pytest.approx(planned.flops, rel=0.01)
    policy = jax.checkpoint_policies.nothing_saveable
    again = plan(shapes(), one_device(), batch_size=6, optimizer=OPTIMIZER, remat=policy)
    assert again.flops > 1.1 * planned.flops
    assert again.model_flops == planned.model_flops


def test_a_cpu_has_no_time(planned):
    assert planned.chip is None
    assert planned.seconds is planned.mfu is None
    text = str(planned)
    assert "There are no peak rates of 'cpu'" in text
    assert "MFU" not in text
    assert "does not fit" not in text


def test_it_can_be_written(planned):
    found = json.loads(json.dumps(planned.as_dict()))
    assert found["total"] == planned.total
    assert found["fits"] is True
    assert found["mesh"] == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


def test_the_batch_is_as_small_as_it_can_be_by_default(monkeypatch):
    monkeypatch.setattr(module, "CompiledStep", Refusing)
    assert plan(shapes(), one_device(), optimizer=OPTIMIZER).batch_size == 1
    assert plan(shapes(), one_device(), optimizer=OPTIMIZER, accumulate=3).batch_size == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 3, "accumulate": 2}, "in 2 parts; choose a multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context": 0}, "context is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
    ],
)
def test_what_cannot_be_split_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        plan(shapes(), one_device(), **options)


def test_sequences_are_whole_blocks():
    model = shapes()  # four tokens in a block
    assert blocks_of(model, 8) == 2
    with pytest.raises(ValueError, match="blocks of 4 tokens; take 8 or 12"):
        blocks_of(model, 10)
    with pytest.raises(ValueError, match=r"take 4$"):
        blocks_of(model, 3)


def test_topologies_that_there_are_not(monkeypatch):
    assert topology_devices("cpu:1") == tuple(jax.devices("cpu"))
    with pytest.raises(RuntimeError, match="needs 8 CPU devices and this process has 1; set XLA_F"):
        topology_devices("cpu:8")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install "elastictok\[aot\]"'):
        topology_devices("v5e:4x4")


class Refusing:
    """A compiler of a chip whose memory does not suffice."""

    said = "Ran out of memory on HBM, the total memory required (18.36G) exceeds 15.75G"

    def __init__(self, *arguments):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.said}.\n\nA long list")


def test_what_does_not_fit_is_a_plan_all_the_same(monkeypatch):
    monkeypatch.setattr(module, "CompiledStep", Refusing)
    found = plan(shapes(), one_device(), optimizer=OPTIMIZER)
    assert found.fits is False
    assert found.total is found.flops is found.seconds is None
    assert found.parameters == size_of(tiny_model())
    text = str(found)
    assert f"does not fit. The compiler: {Refusing.said}" in text
    assert "long list" not in text
    assert "--accumulate" in text
    json.dumps(found.as_dict())


def test_other_errors_of_the_compiler_are_errors(monkeypatch):
    class Broken:
        def __init__(self, *arguments):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(module, "CompiledStep", Broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        plan(shapes(), one_device(), optimizer=OPTIMIZER)


def on_a_chip(name: str, **others) -> Plan:
    """Of eight devices of the chip; what they do is a second's work for a chip by default."""
    (chip,) = (chip for chip in CHIPS if chip.name == name)
    figures = {
        "device_kind": chip.device_kind,
        "devices": 8,
        "mesh": {"data": 8},
        "batch_size": 8,
        "accumulate": 1,
        "context": 2,
        "tokens": 100,
        "dtype": "bfloat16",
        "parameter_count": 10,
        "parameters": 1 * GB,
        "optimizer": 2 * GB,
        "average": 0,
        "batch": 0,
        "activations": 3 * GB,
        "model_flops": 2 * chip.bf16_flops,
        "memory": chip.memory_bytes / chip.devices,
        "chip": chip,
        "compile_seconds": 1.0,
        "temporaries": 4 * GB,
        "code": 0,
        "total": 7 * GB,
        "flops": chip.bf16_flops,
        "traffic": chip.hbm_bytes_per_second,
        "sent": {"all-gather over data": chip.link_bytes_per_second},
    }
    return Plan(**(figures | others))


@pytest.mark.parametrize(("name", "seconds"), [("v5e", 1), ("v5p", 1), ("v4", 2), ("tpu7x", 2)])
def test_devices_share_a_chip(name, seconds):
    found = on_a_chip(name)
    assert found.compute_seconds == pytest.approx(seconds)
    assert found.memory_seconds == pytest.approx(seconds)
    assert found.link_seconds == pytest.approx(seconds)
    assert found.seconds == pytest.approx(seconds)
    # Two chips' work of a second, by eight devices in that time.
    assert found.mfu == pytest.approx(2 / 8)


@pytest.mark.parametrize("term", ["flops", "traffic", "sent"])
def test_the_slowest_decides(term):
    found = on_a_chip("v5e")
    slow = getattr(found, term)
    slow = {"all-reduce over data": 3 * sum(slow.values())} if term == "sent" else 3 * slow
    found = dataclasses.replace(found, **{term: slow})
    assert found.seconds == pytest.approx(3)
    assert found.mfu == pytest.approx(2 / 8 / 3)
    assert "at least 3 s" in str(found)
    assert "267 tokens per second" in str(found)


def test_the_table_adds_up():
    text = str(on_a_chip("v5e"))
    rows = {line[:20].strip(): line.split()[-3:] for line in text.splitlines()}
    assert rows["activations"][0] == "3.000"
    assert rows["other temporaries"][0] == "1.000"
    assert rows["total"] == ["7.000", "41.4", "%"]
    assert "8 x TPU v5 lite: data 8" in text
    assert "all-gather over data" in text
    sent = {"all-gather over data": 1e9, "all-reduce over data": 1e5}
    assert "all-reduce" not in str(on_a_chip("v5e", sent=sent))
    assert "counted once" not in text
    assert "4 loops" in str(on_a_chip("v5e", endless=4))
    assert "several times" in str(on_a_chip("v5e", dtype="float32"))


def test_too_much_does_not_fit():
    found = on_a_chip("v5e", total=20 * GB)
    assert found.fits is False
    assert "It does not fit.\nTry" in str(found)


# --- activations ---------------------------------------------------------------------------------


def kept(remat=None, context=2):
    return module._kept(shapes(), context, Local(remat=remat), MSE(), UniformDrop())


def test_what_the_backward_pass_keeps():
    everything = kept()
    inputs = kept(jax.checkpoint_policies.nothing_saveable)
    tokens, dim = 2 * 4, 16
    # A layer's input on each side at least; and less than everything.
    assert 2 * tokens * dim * 4 <= inputs < 0.7 * everything
    assert kept(jax.checkpoint_policies.everything_saveable) == everything
    # Twice the tokens, twice as much.
    assert kept(context=4) == pytest.approx(2 * everything, rel=0.05)


def test_activations_are_those_of_a_part(planned, monkeypatch):
    monkeypatch.setattr(module, "CompiledStep", Refusing)
    assert planned.activations == 6 * kept()
    parts = plan(shapes(), one_device(), batch_size=6, optimizer=OPTIMIZER, accumulate=3)
    assert parts.activations == 2 * kept()


# --- flops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "block"), [(1, 4), (3, 5), (4, 8)])
def test_visible_pairs(context, block):
    tokens = context * block
    assert module.visible_pairs(context, block) == BlockCausal(block).count(tokens, tokens)
    dense = BlockCausal(block).dense(tokens, tokens)
    for start, stop in ((0, tokens // 2), (tokens // 2, tokens), (1, tokens - 1)):
        assert module.visible_pairs(context, block, start, stop) == int(dense[start:stop].sum())


def test_the_last_part_of_a_sequence_sees_the_most():
    dense = BlockCausal(4).dense(16, 16)
    for shards in (1, 2, 4, 8):
        last = dense[-16 // shards :]
        assert module._busiest_share(4, 4, shards) == pytest.approx(float(last.mean()))


def products(jaxpr) -> int:
    """Flops of the matrix products in a program, loops multiplied."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (over, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in over)
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
        total += times * sum(products(getattr(x, "jaxpr", x)) for x in inner if is_program(x))
    return total


def is_program(node) -> bool:
    return hasattr(node, "eqns") or hasattr(node, "jaxpr")


def gradient(model, examples, context, remat=None):
    """A step's gradient with dense attention, as a function and what it is called with."""
    params, rest = eqx.partition(model, trainable(model))
    batch = module._batch(model, examples, context)

    def run(params, batch):
        def total(params):
            whole = eqx.combine(params, rest)
            execution = Local(implementation=Reference(), remat=remat)
            keys = step_keys(jax.random.key(0), 0, examples)
            return batch_losses(whole, batch, MSE(), UniformDrop(), 1.0, keys, execution)[0]

        return jax.grad(total)(params)

    return run, (params, batch)


@pytest.mark.parametrize("examples", [1, 3])
def test_flops_of_the_model_are_those_of_its_program(examples):
    """In a single block every token sees all, so that dense attention computes nothing in vain."""
    model = plain_model(layers=3)
    run, arguments = gradient(model, examples, 1)
    counted = module.model_flops(model, 1) * examples
    assert products(jax.make_jaxpr(run)(*arguments).jaxpr) == counted
    compiled = jax.jit(run).lower(*arguments).compile()
    assert read_program(compiled.as_text() or "").flops == counted


def test_flops_of_attention_are_those_of_what_is_seen():
    model = plain_model(layers=1)
    run, arguments = gradient(model, 1, 4)
    dense = products(jax.make_jaxpr(run)(*arguments).jaxpr)
    tokens = 4 * model.max_tokens
    hidden = tokens**2 - module.visible_pairs(4, model.max_tokens)
    assert module.model_flops(model, 4) == dense - 2 * 3 * 4 * hidden * 16


def test_what_is_computed_again_is_in_the_program_and_not_in_the_model():
    model = plain_model(layers=3)
    flops = {}
    for name, remat in (("kept", None), ("again", jax.checkpoint_policies.nothing_saveable)):
        run, arguments = gradient(model, 1, 1, remat)
        compiled = jax.jit(run).lower(*arguments).compile()
        flops[name] = read_program(compiled.as_text() or "").flops
    assert flops["kept"] == module.model_flops(model, 1) < flops["again"] < 4 / 3 * flops["kept"]


def plain_model(layers):
    """Without an embedding of places, whose products are not counted."""
    return presets.build(
        size=(16, 16),
        context=2,
        frames_per_block=1,
        min_tokens=1,
        patching=Patching(1, 4, 4),
        order=Raster(),
        quantizer=FSQ((5, 5, 5)),
        dim=16,
        hidden=24,
        layers=layers,
        heads=2,
        rotary=RankRotary(1e4),
        key=jax.random.key(0),
    )


def test_products_are_named_by_their_type(monkeypatch):
    monkeypatch.setattr(module, "CompiledStep", Refusing)
    model = with_compute_dtype(tiny_model(), jnp.bfloat16)
    assert plan(model, one_device(), optimizer=OPTIMIZER).dtype == "bfloat16"


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mesh", ["data=1", "data=2", "fsdp=2", "data=2,fsdp=2,sequence=2"])
def test_memory_is_what_a_step_takes(mesh):
    """On CPUs, resident memory: of all devices together, as they are in one process."""
    devices = math.prod(int(axis.split("=")[1]) for axis in mesh.split(","))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, HERE / "memory_on_devices.py", mesh],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(mesh, found)
    assert found["took"] > 1.2 * found["given"]  # most of it is the step's own
    assert found["planned"] == pytest.approx(found["took"], rel=0.25)
