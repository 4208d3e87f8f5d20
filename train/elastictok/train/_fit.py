"""The training loop, top to bottom."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from elastictok.data import Batch, BatchIterator, PackedDataset
from elastictok.models import ElasticTok, UniformDrop

from ._batches import Batches
from ._checkpoints import latest_step
from ._devices import CompiledStep, data_mesh, place, replicated
from ._errors import DataError, NonFiniteError
from ._folder import RunFolder
from ._losses import MSE
from ._metrics import Meter
from ._optimizers import Cosine, muon
from ._progress import display
from ._signals import StopRequest
from ._step import Loss, Metrics, TailDrop, TrainState, init_state, train_step
from ._trackers import AbstractTracker

_MSE = MSE()
_UNIFORM = UniformDrop()

Validate = Callable[[ElasticTok], Mapping[str, float]]


def fit(
    model: ElasticTok,
    data: Iterable[Batch],
    *,
    steps: int,
    out: str | os.PathLike[str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss = _MSE,
    tail_drop: TailDrop = _UNIFORM,
    quantizer_weight: float | int | None = None,
    seed: int = 0,
    resume: bool = False,
    save_every: int = 1000,
    log_every: int = 10,
    validate: Validate | None = None,
    trackers: Sequence[AbstractTracker] = (),
    progress: bool = True,
    mesh: Mesh | None = None,
) -> ElasticTok:
    """Trains a model; with `out`, into a run folder that can be resumed and is a model folder.

    **Arguments:**

    - `model`: where to start. Left as it is: steps work on a copy.
    - `data`: batches of equal shapes, but for the buckets of a [`PackedDataset`][]: the step is
        compiled once for each of its sizes. To be resumable, its iterator needs `get_state` and
        `set_state` like those of `elastictok.data`; for a try-out any iterable of batches will do.
    - `steps`: in all, those of earlier sessions included.
    - `out`: the run folder; None writes nothing.
    - `optimizer`: any optax transformation; `default_optimizer(steps)` if None.
    - `loss`: of the reconstruction: `MSE()`, `L1()` or any callable like `AbstractLoss`.
    - `tail_drop`: draws the kept lengths; `UniformDrop()` as in the paper.
    - `quantizer_weight`: of the quantizer's loss; `default_quantizer_weight(model)` if None.
    - `seed`: of lengths and sampling. A resumed run goes on with the one that it started with.
    - `resume`: goes on from the newest good checkpoint in `out`, bit for bit on the same machine.
        Starts from `model` if `out` holds none, so that a job can always be given it.
    - `save_every`: steps between checkpoints (the newest two are kept). There is one at the end,
        too, and one when SIGINT or SIGTERM ends the run early.
    - `log_every`: steps that a line of metrics is the mean of.
    - `validate`: called with the model whenever a checkpoint is due. Its numbers are logged as
        `validation_<name>`, and its `loss` decides which model is the best so far. Without it, the
        running training loss decides. The arrays of the model it gets are gone afterwards.
    - `trackers`: get every line of metrics, and are closed at the end.
    - `progress`: a live line on a terminal, plain lines elsewhere, on standard error.
    - `mesh`: with the one axis `data`; all local devices by default. Each takes an equal share of
        every batch.

    **Returns:** the model after the last step. (The run folder's is the best so far.)

    **Raises:**

    - `RunFolderError`: `out` holds a run and `resume` is false.
    - `CheckpointError`: a checkpoint could not be written, or is of another model or optimizer.
    - `NonFiniteError`: names the metric and the step. The checkpoints from before are kept.
    - `DataError`: the data ended, cannot be resumed, or cannot be split over the devices.
    - `RecompilationError`: a batch has other shapes than the first one.
    """
    for name, value in (("steps", steps), ("save_every", save_every), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    mesh = data_mesh() if mesh is None else mesh
    optimizer = default_optimizer(steps) if optimizer is None else optimizer
    if quantizer_weight is None:
        quantizer_weight = default_quantizer_weight(model)

    with contextlib.ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.close)
        stop = stack.enter_context(StopRequest())

        # 1. The state at step 0; a checkpoint, if there is one to resume, replaces all of it.
        state = jax.device_put(init_state(model, optimizer, jax.random.key(seed)), replicated(mesh))
        data_state, meter, best = None, Meter(), {}
        run: RunFolder | None = None
        if out is not None:
            run = RunFolder(Path(out), resume=resume)
            stack.callback(run.close)
            newest = run.checkpoints.newest()
            if newest is not None:
                state, loop = run.checkpoints.restore(newest, state)
                data_state, meter, best = loop["data"], Meter(loop["meter"]), loop["best"]
        step = saved = int(state.step)

        show = display(progress=progress, start=step, steps=steps)
        stack.callback(show.close)
        if resume:
            show.say(f"resuming at step {step}" if step else "nothing to resume: starting anew")
        if step >= steps:
            show.say(f"all {steps} steps are done")
            return _on_one_device(state.model, mesh)

        # 2. The data, from where the checkpoint left it, and the step, compiled for its shapes.
        if step > 0 and data_state is None:
            raise DataError(
                f"{out} was trained on data that cannot say where it was: it cannot be resumed; "
                "start a new run from its weights"
            )
        batches = Batches(data, functools.partial(place, mesh=mesh), data_state)
        stack.callback(batches.close)
        show.say("compiling the training step")
        began = time.perf_counter()
        one_step = CompiledStep(
            functools.partial(
                train_step,
                optimizer=optimizer,
                loss=loss,
                tail_drop=tail_drop,
                quantizer_weight=quantizer_weight,
            ),
            state,
            batches.peek(),
            data.geometry.sizes if isinstance(data, PackedDataset | BatchIterator) else (),
        )
        show.say(f"compiled in {time.perf_counter() - began:.1f} s")

        # 3. The folder's files, now that nothing stands in the way of the first step.
        if run is not None:
            settings = {
                "steps": steps,
                "seed": seed,
                "save_every": save_every,
                "log_every": log_every,
                "loss": repr(loss),
                "tail_drop": repr(tail_drop),
                "quantizer_weight": quantizer_weight,
            }
            run.begin(step, settings)
            if step == 0:
                run.save_model(state.model)  # a model that cannot be saved should fail now

        # 4. The loop.
        clock = _Clock(step, batches.seconds_waited)
        criterion = "running_loss" if validate is None else "validation_loss"
        under_way: Metrics | None = None
        stack.enter_context(_advice(run))
        while step < steps and stop.name is None:
            state, metrics = one_step(state, batches.next())
            step += 1
            # The device has the next step to do while this one's is prepared, and no more than
            # that: what the terminal says is true, and a signal is answered soon.
            jax.block_until_ready(under_way)
            under_way = metrics
            meter.add(step, metrics)
            show.step(step)

            # A line of metrics, then the best model, then the checkpoint: after a crash in between,
            # the run resumes from the checkpoint before and does all of it again.
            logged = step % log_every == 0 or step == steps
            due = step % save_every == 0 or step == steps
            if not (logged or due):
                continue
            meter.fetch()
            line: dict[str, float] = {}
            if logged:
                line |= meter.means() | clock.lap(step, batches.seconds_waited)
                show.metrics(step, line)
            if step % log_every == 0:
                meter.clear()
            pause = time.perf_counter()
            if due:
                _refuse_non_finite(state, step)
                if validate is not None:
                    line |= _validation(validate, _on_one_device(state.model, mesh), step)
            if line:
                for tracker in trackers:
                    tracker.log(step, line)
                if run is not None:
                    run.write(step, line)
            if due and run is not None:
                score = line.get("validation_loss", meter.running_loss)
                if score <= best.get(criterion, math.inf):
                    best = {criterion: score}
                    run.save_model(state.model)
                run.checkpoints.save(state, _loop_state(batches, meter, best))
                saved = step
            clock.skip(time.perf_counter() - pause)

        # 5. Asked to stop early: what was done is kept, and no time is spent on more.
        if stop.name is not None and step < steps:
            show.say(f"{stop.name}: stopping after step {step} of {steps}")
            if run is not None and step > saved:
                meter.fetch()
                _refuse_non_finite(state, step)
                if not best:
                    run.save_model(state.model)
                run.checkpoints.save(state, _loop_state(batches, meter, best))
                show.say(f"saved in {run.path}; go on with resume=True (--resume)")
        return _on_one_device(state.model, mesh)


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

    def __init__(self, step: int, waited: float):
        self._step = step
        self._since = time.perf_counter()
        self._waited = waited

    def lap(self, step: int, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        lap = {
            "steps_per_second": (step - self._step) / seconds,
            "waiting_for_data": (waited - self._waited) / seconds,
        }
        self._step, self._since, self._waited = step, now, waited
        return lap

    def skip(self, seconds: float) -> None:
        self._since += seconds


def _loop_state(batches: Batches, meter: Meter, best: dict[str, float]) -> dict[str, Any]:
    """What the loop needs besides the training state, to go on as if it had not stopped."""
    return {"data": batches.state, "meter": meter.state(), "best": best}


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


def _on_one_device(model: ElasticTok, mesh: Mesh) -> ElasticTok:
    """Whoever uses the model next should not need to know of the mesh."""
    arrays, rest = eqx.partition(model, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, mesh.devices.flat[0]), rest)


@contextlib.contextmanager
def _advice(run: RunFolder | None) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        newest = latest_step(run.path) if run is not None else None
        kept = "nothing was saved" if newest is None else f"checkpoint {newest} was saved before it"
        raise NonFiniteError(
            f"{error}; {kept}. Lower the learning rate or the clipping norm"
        ) from None
