"""The training loop, top to bottom."""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, PyTree

from elastictok.data import Batch, BatchIterator
from elastictok.models import ElasticTok, UniformDrop, trainable

from ._batches import Batches
from ._checkpoints import Checkpoints, latest_step
from ._devices import CompiledStep, place
from ._errors import DataError, NonFiniteError
from ._folder import RunFolder
from ._losses import MSE
from ._metrics import Meter
from ._optimizers import Cosine, muon
from ._pictures import Pictures
from ._processes import any_process, is_first_process, of_all_processes
from ._progress import display
from ._sharding import (
    AXES,
    data_mesh,
    data_share,
    execution_on,
    gather,
    put,
    replicated,
    shardings,
)
from ._signals import StopRequest
from ._step import (
    Average,
    DeviceBatch,
    Loss,
    Metrics,
    TailDrop,
    TrainState,
    Weight,
    train_step,
)
from ._trackers import AbstractTracker
from ._watch import StepWatch

_MSE = MSE()
_UNIFORM = UniformDrop()

Validate = Callable[[ElasticTok], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run: its own data, length of sequences and optimizer.

    **Arguments:**

    - `data`: as of [`fit`][].
    - `steps`: of this stage.
    - `optimizer`: starts anew, warm-up included; `default_optimizer(steps)` if None.
    - `context`: blocks that a sequence of `data` holds, which the model then records as its own;
        None leaves it.
    """

    data: Iterable[Batch]
    steps: int
    optimizer: optax.GradientTransformation | None = None
    context: int | None = None


def fit(
    model: ElasticTok,
    data: Iterable[Batch],
    *,
    steps: int,
    out: str | os.PathLike[str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss = _MSE,
    tail_drop: TailDrop = _UNIFORM,
    quantizer_weight: Weight | None = None,
    seed: int = 0,
    resume: bool = False,
    save_every: int = 1000,
    log_every: int = 10,
    validate: Validate | None = None,
    pictures: Pictures | None = None,
    trackers: Sequence[AbstractTracker] = (),
    progress: bool = True,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    average: Average | None = None,
    remat: Callable[..., Any] | None = None,
) -> ElasticTok:
    """Trains a model; with `out`, into a run folder that can be resumed and is a model folder.

    On several processes (`jax.distributed`), every one makes the same call, with its share of the
    data (see [`data_share`][]) and the same `out` on a file system that they share.

    **Arguments:**

    - `model`: where to start. Left as it is: steps work on a copy. [`init_sharded`][] makes one
        that no single device could hold.
    - `data`: batches of equal shapes, but for the buckets of a [`PackedDataset`][]: the step is
        compiled once for each of its sizes. To be resumable, its iterator needs `get_state` and
        `set_state` like those of `elastictok.data`; for a try-out any iterable of batches will do.
    - `steps`: in all, those of earlier sessions included.
    - `out`: the run folder; None writes nothing.
    - `optimizer`: any optax transformation; `default_optimizer(steps)` if None.
    - `loss`: of the reconstruction: `MSE()`, `L1()`, `Sum(...)` or any callable like
        `AbstractLoss`.
    - `tail_drop`: draws the kept lengths; `UniformDrop()` as in the paper.
    - `quantizer_weight`: of the quantizer's loss, a number or a function of the step;
        `default_quantizer_weight(model)` if None.
    - `seed`: of lengths and sampling. A resumed run goes on with the one that it started with.
    - `resume`: goes on from the newest good checkpoint in `out`: bit for bit on the same mesh of
        the same kind of devices, and equal up to rounding on another one. Starts from `model` if
        `out` holds none, so that a job can always be given it.
    - `save_every`: steps between checkpoints (the newest two are kept). There is one at the end,
        too, and one when SIGINT or SIGTERM ends the run early. They are written while training goes
        on; one that fails is tried again, and then ends the run.
    - `log_every`: steps that a line of metrics is the mean of.
    - `validate`: called with the model whenever a checkpoint is due. Its numbers are logged as
        `validation_<name>`, and its `loss` decides which model is the best so far. Without it, the
        running training loss decides. The arrays of the model it gets are gone afterwards.
        [`Validation`][] measures as `elastictok eval` does.
    - `pictures`: drawn and measured now and then, see [`Pictures`][].
    - `trackers`: get every line of metrics, and are closed at the end.
    - `progress`: a live line on a terminal, plain lines elsewhere, on standard error.
    - `mesh`: from [`make_mesh`][]; by default each device takes an equal share of every batch.
    - `accumulate`: parts that a batch is computed in, one after the other, for less memory.
    - `average`: keeps an average of the weights; what is validated, drawn, written as the folder's
        model and returned is then the averaged model.
    - `remat`: what the backward pass keeps of each layer, one of `jax.checkpoint_policies`; None
        leaves it to the model.

    **Returns:** the model after the last step, on one device. (The run folder's is the best one.)

    **Raises:**

    - `RunFolderError`: `out` holds a run and `resume` is false.
    - `CheckpointError`: a checkpoint could not be written, or is of another model or optimizer.
    - `NonFiniteError`: names the metric, the step and the documents of its batch. The checkpoints
        from before are kept.
    - `DataError`: the data ended, cannot be resumed, or cannot be split over the devices.
    - `RecompilationError`: a batch has other shapes than the first one.
    """
    return fit_stages(
        model,
        [Stage(data, steps, optimizer)],
        out=out,
        loss=loss,
        tail_drop=tail_drop,
        quantizer_weight=quantizer_weight,
        seed=seed,
        resume=resume,
        save_every=save_every,
        log_every=log_every,
        validate=validate,
        pictures=pictures,
        trackers=trackers,
        progress=progress,
        mesh=mesh,
        accumulate=accumulate,
        average=average,
        remat=remat,
    )


def fit_stages(
    model: ElasticTok,
    stages: Sequence[Stage],
    *,
    out: str | os.PathLike[str] | None = None,
    loss: Loss = _MSE,
    tail_drop: TailDrop = _UNIFORM,
    quantizer_weight: Weight | None = None,
    seed: int = 0,
    resume: bool = False,
    save_every: int = 1000,
    log_every: int = 10,
    validate: Validate | None = None,
    pictures: Pictures | None = None,
    trackers: Sequence[AbstractTracker] = (),
    progress: bool = True,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    average: Average | None = None,
    remat: Callable[..., Any] | None = None,
) -> ElasticTok:
    """Trains a model in stages, such as ever longer contexts (arXiv 2410.08368, section 4), in one
    run folder that can be resumed anywhere.

    Each stage starts from the weights that the one before ended with. Steps are counted through;
    which model is the best so far is decided within a stage. The step is compiled once per stage.

    **Arguments:** `stages`; the others, what is returned and raised as of [`fit`][].
    """
    for name, value in (
        ("save_every", save_every),
        ("log_every", log_every),
        ("accumulate", accumulate),
        ("the number of stages", len(stages)),
        *(("steps", stage.steps) for stage in stages),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    mesh = data_mesh() if mesh is None else mesh
    if set(mesh.axis_names) != set(AXES):
        raise ValueError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}; make it by make_mesh, with "
            f"{', '.join(AXES)}"
        )
    execution = execution_on(mesh, remat)
    if quantizer_weight is None:
        quantizer_weight = default_quantizer_weight(model)
    ends = list(itertools.accumulate(stage.steps for stage in stages))
    steps = ends[-1]

    with contextlib.ExitStack() as stack:
        if is_first_process():
            for tracker in trackers:
                stack.callback(tracker.close)
        stop = stack.enter_context(StopRequest())

        # 1. The state at step 0; a checkpoint, if there is one to resume, replaces all of it.
        run: RunFolder | None = None
        newest = None
        if out is not None:
            run = RunFolder(Path(out), resume=resume)
            stack.callback(run.close)
            newest = run.checkpoints.newest()
        current = 0 if newest is None else min(bisect.bisect_left(ends, newest), len(ends) - 1)
        stage = stages[current]
        state = _placed_state(
            _of_stage(model, stage), _optimizer(stage), jax.random.key(seed), mesh, average
        )
        data_states, meter, best = None, Meter(), {}
        if run is not None and newest is not None:
            state, loop = run.checkpoints.restore(newest, state)
            data_states, meter, best = loop["data"], Meter(loop["meter"]), loop["best"]
        step = saved = int(state.step)

        show = display(progress=progress and is_first_process(), start=step, steps=steps)
        stack.callback(show.close)
        if resume:
            show.say(f"resuming at step {step}" if step else "nothing to resume: starting anew")
        if step >= steps:
            show.say(f"all {steps} steps are done")
            return gather(state.averaged(), mesh)

        stack.enter_context(_advice(run))
        stopping = False
        batches: Batches | None = None
        for number in range(current, len(stages)):
            stage, last = stages[number], ends[number]
            first = last - stage.steps
            if step >= last:
                continue
            batches_open = stack.enter_context(contextlib.ExitStack())

            # 2. A stage that begins: the weights so far, everything else anew.
            optimizer = _optimizer(stage)
            if step == first > 0:
                state = _next_state(_of_stage(state, stage), optimizer, mesh)
                data_states, best = None, {}
            if len(stages) > 1:
                show.say(f"stage {number + 1} of {len(stages)}: to step {last}")

            # 3. The data, from where the checkpoint left it, and the step, compiled for its shapes.
            data_state = _own_data_state(data_states, mesh, out) if step > first else None
            batches = Batches(stage.data, functools.partial(place, mesh=mesh), data_state)
            batches_open.callback(batches.close)
            show.say("compiling the training step")
            began = time.perf_counter()
            one_step = CompiledStep(
                functools.partial(
                    train_step,
                    optimizer=optimizer,
                    loss=loss,
                    tail_drop=tail_drop,
                    quantizer_weight=quantizer_weight,
                    accumulate=accumulate,
                    average=average,
                    execution=execution,
                ),
                state,
                batches.peek(),
                _sizes(batches.iterator),
                mesh,
            )
            show.say(f"compiled in {time.perf_counter() - began:.1f} s")
            tokens = _tokens(state.model, batches.peek())

            # 4. The folder's files, now that nothing stands in the way of the first step.
            if run is not None and not run.begun:
                settings = {
                    "steps": steps,
                    "stages": [stage.steps for stage in stages],
                    "seed": seed,
                    "save_every": save_every,
                    "log_every": log_every,
                    "loss": repr(loss),
                    "tail_drop": repr(tail_drop),
                    "quantizer_weight": repr(quantizer_weight)
                    if callable(quantizer_weight)
                    else quantizer_weight,
                    "accumulate": accumulate,
                    "average": repr(average),
                    "mesh": dict(mesh.shape),
                }
                run.begin(step, settings)
                if step == 0:
                    run.save_model(gather(state.averaged(), mesh))  # one that cannot be: fail now

            # 5. The loop.
            clock, watch = _Clock(step, batches.seconds_waited, tokens), StepWatch()
            criterion = "running_loss" if validate is None else "validation_loss"
            under_way: Metrics | None = None
            shown: dict[str, float] = {}
            while step < last and not stopping:
                started, waited = time.perf_counter(), batches.seconds_waited
                state, metrics = one_step(state, batches.next())
                step += 1
                # The device has the next step to do while this one's is prepared, and no more than
                # that: what the terminal says is true, and a signal is answered soon.
                jax.block_until_ready(under_way)
                under_way = metrics
                meter.add(step, metrics, batches.names)
                show.step(step)
                computed, saving = time.perf_counter(), 0.0

                # A line of metrics, then the best model, then the checkpoint: after a crash in
                # between, the run resumes from the checkpoint before and does all of it again.
                logged = step % log_every == 0 or step == last
                drawn = pictures is not None and (step % pictures.every == 0 or step == last)
                due = step % save_every == 0 or step == last
                again = run is not None and _failed(run.checkpoints, logged or due)
                if logged or drawn or due or again:
                    meter.fetch()
                    line: dict[str, float] = {}
                    if logged:
                        line |= meter.means() | clock.lap(step, batches.seconds_waited)
                    if step % log_every == 0:
                        meter.clear()
                    pause = time.perf_counter()
                    if pictures is not None and drawn:
                        numbers, picture = pictures.measure(state.averaged(), mesh, execution)
                        line |= numbers
                        if run is not None and is_first_process():
                            pictures.write(picture, run.path, step)
                    shown |= line
                    if logged:
                        show.metrics(step, shown)
                    if due or again:
                        _refuse_non_finite(state, step)
                    if due and validate is not None:
                        line |= _validation(validate, gather(state.averaged(), mesh), step)
                    if line and is_first_process():
                        for tracker in trackers:
                            tracker.log(step, line)
                    if line and run is not None:
                        run.write(step, line)
                    if (due or again) and run is not None:
                        score = line.get("validation_loss", meter.running_loss)
                        if due and score <= best.get(criterion, math.inf):
                            best = {criterion: score}
                            run.save_model(gather(state.averaged(), mesh))
                        writing = time.perf_counter()
                        keep = run.checkpoints.save if again else run.checkpoints.start
                        keep(state, _loop_state(batches, meter, best, mesh))
                        saved, saving = step, time.perf_counter() - writing
                    clock.skip(time.perf_counter() - pause)
                said = watch.add(
                    step,
                    data=batches.seconds_waited - waited,
                    compute=computed - started - (batches.seconds_waited - waited),
                    saving=saving,
                )
                if said is not None:
                    show.say(said)
                stopping = _asked_to_stop(stop, step, log_every)
            batches_open.close()
            if stopping:
                break

        # 6. Asked to stop early: what was done is kept, and no time is spent on more.
        if step < steps:
            show.say(f"{stop.name or 'a signal'}: stopping after step {step} of {steps}")
        if run is not None and batches is not None:
            run.checkpoints.wait()
            if step > saved or any_process(run.checkpoints.failed()):
                meter.fetch()
                _refuse_non_finite(state, step)
                if not best:
                    run.save_model(gather(state.averaged(), mesh))
                run.checkpoints.save(state, _loop_state(batches, meter, best, mesh))
            if step < steps:
                show.say(f"saved in {run.path}; go on with resume=True (--resume)")
        return gather(state.averaged(), mesh)


def default_optimizer(steps: int) -> optax.GradientTransformation:
    """Muon over a cosine of `steps` steps, with a twentieth of them (at most 2000) of warm-up."""
    return muon(schedule=Cosine(steps, warmup=min(steps // 20, 2000)))


def default_quantizer_weight(model: ElasticTok) -> float:
    """What `fit` multiplies the quantizer's loss with, which is a sum over the tokens of a block.

    1e-8 for continuous latents, whose loss is the divergence from a standard normal (the paper's
    weight). For codes, whose loss is the commitment of latents to them, one over the tokens of a
    block: a mean over tokens, beside a reconstruction loss that is a mean over pixels. Entropy
    penalties (`batch_loss`) have weights of their own and are added as they are.
    """
    return 1e-8 if model.quantizer.bits_per_token is None else 1 / model.max_tokens


class _Clock:
    """Speed since the last line, without the time that was spent on checkpoints."""

    def __init__(self, step: int, waited: float, tokens: int):
        self._step = step
        self._since = time.perf_counter()
        self._waited = waited
        self._tokens = tokens

    def lap(self, step: int, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate = (step - self._step) / seconds
        lap = {
            "steps_per_second": rate,
            "tokens_per_second": rate * self._tokens,
            "waiting_for_data": (waited - self._waited) / seconds,
        }
        self._step, self._since, self._waited = step, now, waited
        return lap

    def skip(self, seconds: float) -> None:
        self._since += seconds


def _optimizer(stage: Stage) -> optax.GradientTransformation:
    return default_optimizer(stage.steps) if stage.optimizer is None else stage.optimizer


_HasModel = TypeVar("_HasModel", ElasticTok, TrainState)


def _of_stage(tree: _HasModel, stage: Stage) -> _HasModel:
    """The same model or state with the stage's context."""
    if stage.context is None:
        return tree
    if isinstance(tree, TrainState):
        average = None if tree.average is None else _of_stage(tree.average, stage)
        return dataclasses.replace(tree, model=_of_stage(tree.model, stage), average=average)
    return dataclasses.replace(tree, context=stage.context)


def _placed_state(
    model: ElasticTok,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    mesh: Mesh,
    average: Average | None,
) -> TrainState:
    """`init_state` with every array where it belongs; none is whole on a device that it is split
    over."""
    arrays, static = eqx.partition(model, eqx.is_array)
    model = eqx.combine(put(arrays, shardings(arrays, mesh)), static)
    start = put((jnp.zeros((), jnp.int32), key), (replicated(mesh), replicated(mesh)))
    params = eqx.filter(model, trainable(model))
    averaged = None if average is None else put(params, shardings(params, mesh))
    return TrainState(model, _first_opt_state(optimizer, params, mesh), *start, averaged)


def _next_state(
    state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The same weights, step and average with the state of another optimizer."""
    params = eqx.filter(state.model, trainable(state.model))
    opt_state = _first_opt_state(optimizer, params, mesh)
    return dataclasses.replace(state, opt_state=opt_state)


def _first_opt_state(optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh) -> PyTree:
    def init(params: PyTree) -> PyTree:
        # Copies: some optimizers begin with the parameters themselves, and steps donate both.
        return jax.tree.map(jnp.copy, optimizer.init(params))

    where = shardings(jax.eval_shape(init, params), mesh)
    return jax.jit(init, out_shardings=where)(params)


def _sizes(data: Iterator[Batch]) -> tuple[tuple[int, int], ...]:
    """Of the frames of all buckets, where the data has such."""
    return data.geometry.sizes if isinstance(data, BatchIterator) else ()


def _tokens(model: ElasticTok, batch: DeviceBatch) -> int:
    """Tokens of a batch, dropped ones and padding included: what is computed."""
    examples, blocks, _, height, width, _ = batch.pixels.shape
    return examples * blocks * model.tokens_per_block(height, width)


def _own_data_state(states: list[Any] | None, mesh: Mesh, out: object) -> Any:
    """This process's of the data's states in a checkpoint, one for each process."""
    if not states or states[0] is None:
        raise DataError(
            f"{out} was trained on data that cannot say where it was: it cannot be resumed; "
            "start a new run from its weights"
        )
    number, shares = data_share(mesh)
    found = {state["share"][0]: state["state"] for state in states}
    if len(found) != shares:
        raise DataError(
            f"{out} was trained with its data in {len(found)} shares, one for each group of "
            f"processes, and this mesh reads it in {shares}; resume with {len(found)}, or start a "
            "new run from its weights"
        )
    return found[number]


def _loop_state(
    batches: Batches, meter: Meter, best: dict[str, float], mesh: Mesh
) -> dict[str, Any]:
    """What the loop needs besides the training state, to go on as if it had not stopped."""
    own = None if batches.state is None else {"share": data_share(mesh), "state": batches.state}
    return {"data": of_all_processes(own), "meter": meter.state(), "best": best}


def _failed(checkpoints: Checkpoints, all_are_here: bool) -> bool:
    """Whether a checkpoint must be written again. Several processes agree when they meet anyway."""
    if jax.process_count() == 1:
        return checkpoints.failed()
    return all_are_here and any_process(checkpoints.failed())


def _asked_to_stop(stop: StopRequest, step: int, log_every: int) -> bool:
    if jax.process_count() == 1:
        return stop.name is not None
    return step % log_every == 0 and any_process(stop.name is not None)


def _validation(validate: Validate, model: ElasticTok, step: int) -> dict[str, float]:
    numbers = {f"validation_{name}": float(number) for name, number in validate(model).items()}
    if "validation_loss" not in numbers:
        raise ValueError(
            f"validate returned {sorted(numbers)} without 'loss', which decides the best model; "
            "return a mapping with 'loss' in it, lower is better"
        )
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value} at step {step}")
    return numbers


@jax.jit
def _all_finite(arrays: list[Array]) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()


def _refuse_non_finite(state: TrainState, step: int) -> None:
    """A gradient can be finite and the step it leads to not: such a state must not be saved."""
    arrays = jax.tree.leaves(eqx.filter((state.model, state.opt_state), eqx.is_inexact_array))
    if not _all_finite(arrays):
        raise NonFiniteError(f"a weight of the model or optimizer is not finite after step {step}")


@contextlib.contextmanager
def _advice(run: RunFolder | None) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        if run is not None:
            run.checkpoints.wait()
        newest = latest_step(run.path) if run is not None else None
        kept = "nothing was saved" if newest is None else f"checkpoint {newest} was saved before it"
        raise NonFiniteError(
            f"{error}; {kept}. Lower the learning rate or the clipping norm"
        ) from None
