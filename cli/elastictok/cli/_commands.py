"""What can be asked of the command line: one frozen dataclass per sub-command.

Nothing here imports jax, or any package that does: importing it takes over a second, and help must
not. What a command does is in the module of its name, imported when it runs.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

Output = Annotated[Path, arg(aliases=("-o",))]
Precision = Literal["float32", "bfloat16"]
Remat = Literal["layers", "attention", "products", "none"]
StrategyName = Literal["binary", "secant", "k-ary", "binned", "warm-start", "encode-once"]
QuantizerName = Literal[
    "fsq",
    "vae",
    "vq",
    "simvq",
    "lfq",
    "bsq",
    "residual",
    "grouped",
    "projected",
    "identity",
]
TailDropName = Literal["uniform", "log-uniform", "power-of-two", "information", "fixed"]
Code = Annotated[tuple[Path, ...], UseAppendAction]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small model on photographs, show what it does on others: about four minutes.

    The photographs come with scikit-image; clips are made from them. Leaves the trained model,
    token files, reconstructions and report.html in the output folder.
    """

    out: Output = Path("elastictok-demo")
    """Folder for everything; must not exist or be empty."""
    steps: int = 1100
    """Training steps. Fewer are faster and worse."""
    seed: int = 0
    """Of the weights, the order of the data and the kept lengths."""

    def run(self) -> None:
        from ._demo import demo

        demo(self)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on folders of pictures and clips."""

    preset: Positional[str]
    """Model to train: demo, small or another of those that `elastictok zoo` lists; or FILE.py:NAME
    for a preset of your own, a function of `key` in a Python file, which is imported."""
    data: tuple[str, ...]
    """Folders of pictures (jpg, png, webp) and clips (mp4, webm, avi, mov), nested as you like, or
    data sets made by `data build`. FOLDER:0.3 for each gives every one that share of the blocks."""
    out: Output
    """Run folder: metrics.jsonl, pictures, checkpoints and the model itself."""
    steps: int | None = None
    """Steps in all, 20000 by default; a resumed run counts those it has."""
    batch_size: int = 8
    """Sequences per step, of all devices; a sequence has as many blocks as the model's context."""
    stages: tuple[str, ...] = ()
    """Train in stages, each CONTEXT:STEPS[:IMAGE_SHARE[:LEARNING_RATE]], such as 1:10000:0.9:0.02
    4:5000:0.5:0.01; each starts from the weights that the last one ended with."""
    learning_rate: float | None = None
    """Peak learning rate: of Muon for the matrices (default 0.02), or of AdamW (1e-3)."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices and Adam for the rest, or AdamW for all."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate, after the warm-up."""
    warmup: int | None = None
    """Steps of warm-up; by default a twentieth of all, at most 2000."""
    quantizer: QuantizerName | None = None
    """Another quantizer than the preset's, in the rest of the same model; `elastictok zoo` says
    what they are."""
    context: int | None = None
    """Blocks that a sequence holds; the preset's by default."""
    tail_drop: TailDropName | None = None
    """How kept lengths are drawn; by default as the preset says. uniform, every octave alike
    (log-uniform), powers of two, by what is hard to reconstruct (information), or always --length
    tokens (fixed)."""
    length: int | None = None
    """With --tail-drop fixed: tokens of each block."""
    condition_dropout: float = 0.0
    """In this share of the blocks, do not tell the encoder how many tokens are kept: `encode` and
    `eval` can then run it once for each block (--encode-once)."""
    loss: Literal["mse", "l1"] = "mse"
    """Of the reconstruction."""
    perceptual: Path | None = None
    """File of LPIPS weights (.safetensors or .npz): adds that loss on a random frame of each
    sequence."""
    perceptual_weight: float = 0.1
    """Of the perceptual loss."""
    precision: Precision = "float32"
    """Of the transformers' products and attention; everything else is float32."""
    mesh: str | None = None
    """Devices along the axes data, fsdp, tensor and sequence, such as data=2,fsdp=2,sequence=2; by
    default every device takes a share of each batch."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, for less memory."""
    remat: Remat | None = None
    """What of a layer the backward pass keeps: only its input (layers), attention besides
    (attention), all products (products) or everything (none). By default as the preset says."""
    average: float | None = None
    """Keep an average of the weights with this decay, such as 0.999: it becomes the model."""
    overfit_one: bool = False
    """Learn a single batch by heart with all tokens (1000 steps by default) and fail unless its
    mean squared error falls below 0.001: whether model, data and optimizer work at all."""
    fps: float = 8.0
    """Frames per second that clips are read at."""
    image_share: float = 0.5
    """Of the blocks that a folder with both kinds gives, the share of pictures."""
    whole_clips: bool = False
    """Use clips from beginning to end, going on from one sequence to the next, instead of a random
    stretch each time."""
    aspect_buckets: bool = False
    """Train on frames of five aspects, from 9:16 to 16:9 and of about the model's area, each file
    in the nearest; the step is compiled for each."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics."""
    seed: int = 0
    """Of the weights, the order of the data and the kept lengths."""
    workers: int = 0
    """Processes that read data; 0 reads in a thread."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder, if there is one."""
    init_from: Path | None = None
    """Model or run folder, or hf:owner/name, to start from instead of random weights."""
    code: Code = ()
    """With --init-from: Python file with classes of your own that the model is made of, which is
    imported; may be given several times."""
    validation: tuple[Path, ...] = ()
    """Folders of pictures and clips to measure the model on at every checkpoint; the best one on
    them becomes the model."""
    validation_items: int = 32
    """Use no more than so many pictures, and as many clips, of those folders."""
    pictures_every: int = 500
    """Steps between pictures of reconstructions in the run folder; 0 draws none."""
    threshold: float = 0.01
    """Mean squared error that the bars of tokens in those pictures, and validation, ask of a
    block."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, on plain machines; every process gets the same
    command but for --process. TPU pods, SLURM and Kubernetes need none of it."""
    processes: int | None = None
    """How many there are, with --coordinator."""
    process: int | None = None
    """Which one this is, from 0."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these (extras tensorboard and wandb)."""

    def run(self) -> None:
        from ._train import train

        train(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a training step needs, on machines that need not be here: memory, products, what
    devices send to each other, and the least time it takes.

    Compiles the real step for the devices, which takes minutes for a large model, and needs the
    extra aot for TPUs.
    """

    preset: Positional[str]
    """Model: demo, small or another of those that `elastictok zoo` lists, or FILE.py:NAME."""
    topology: str
    """Devices: v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1 or the like, or cpu:8."""
    mesh: str | None = None
    """Devices along the axes data, fsdp, tensor and sequence, such as fsdp=4,sequence=4; by default
    every device takes a share of each batch."""
    sequence_length: int | None = None
    """Tokens in a sequence, a whole number of blocks."""
    context: int | None = None
    """The same in blocks; the preset's by default."""
    batch_size: int | None = None
    """Sequences per step, of all devices; by default as few as the mesh takes."""
    precision: Precision = "bfloat16"
    """Of the transformers' products and attention; everything else is float32."""
    quantizer: QuantizerName | None = None
    """Another quantizer than the preset's, in the rest of the same model."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Muon keeps one average of each matrix, AdamW two of everything."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, for less memory."""
    remat: Remat | None = None
    """What of a layer the backward pass keeps: only its input (layers), attention besides
    (attention), all products (products) or everything (none). By default as the preset says."""
    average: bool = False
    """Keep an average of the weights, too."""
    json: Path | None = None
    """File to write the figures to."""

    def run(self) -> None:
        from ._plan import plan

        plan(self)


@dataclasses.dataclass(frozen=True)
class Zoo:
    """List the models that can be trained by name, and the quantizers to put into them; or say all
    about one model."""

    preset: Positional[str | None] = None
    """Only this one, or FILE.py:NAME; all by default."""
    json: Path | None = None
    """File to write the figures to."""

    def run(self) -> None:
        from ._zoo import zoo

        zoo(self)


@dataclasses.dataclass(frozen=True)
class ImportOfficial:
    """Turn a checkpoint of the official implementation into a model folder."""

    input: Positional[Path]
    """The checkpoint: params of a released model, or a streaming_params or streaming_train_state
    that the official training left."""
    variant: Literal["fsq", "vae"]
    """The discrete or the continuous model."""
    out: Output
    """Model folder to make."""
    config: Path | None = None
    """JSON file with the official options of a model of another size than the released one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the folder: float32 to train on, bfloat16 for half the size."""
    sha256: str | None = None
    """What the checkpoint must have, since its format has no checksum of its own."""

    def run(self) -> None:
        from ._official import import_official

        import_official(self)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Who decides how many tokens a block gets: give --threshold or --length."""

    threshold: float | None = None
    """Give each block the fewest tokens whose mean squared error, pixels in [-1, 1], is at most
    this: 0.02 is 23 dB, 0.003 is 31 dB."""
    length: int | None = None
    """Give each block this many tokens."""
    search: Literal["warm-start", "binary", "exhaustive"] = "warm-start"
    """With a threshold: from the length of the block before, by bisection, or by trying every
    length, which alone finds the fewest tokens where more of them can make a block worse."""
    encode_once: bool = False
    """Run the encoder once for each block; for models trained with --condition-dropout."""
    regressor: Path | None = None
    """Folder that `train-regressor` made: take the lengths that it predicts for the threshold."""
    alpha: float | None = None
    """With --regressor: share of clips that may miss the threshold. Predictions are padded so far,
    by its calibration; without, they are taken as they are."""
    unverified: bool = False
    """With --regressor: decode nothing, so that losses are not known."""


@dataclasses.dataclass(frozen=True)
class Encode:
    """Turn a picture or clip into a token file."""

    input: Positional[Path]
    """Picture or clip."""
    model: Path
    """Model or run folder, or hf:owner/name."""
    out: Output
    """Token file to write, .safetensors."""
    lengths: Lengths = Lengths()
    fps: float | None = None
    """Frames per second to read a clip at; its own by default."""
    max_frames: int | None = None
    """Read no more than the first so many frames."""
    native: bool = False
    """Keep the frames' size; by default the short side is resized to the model's."""
    window: int | None = None
    """Blocks that a block sees, itself included; the model's context by default. Memory for as many
    as the clip has is reserved, so choose fewer for a large model and a long clip."""
    code: Code = ()
    """Python file with classes of your own that the model is made of, which is imported; may be
    given several times."""

    def run(self) -> None:
        from ._tokens import encode

        encode(self)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Turn a token file back into a picture or clip."""

    input: Positional[Path]
    """Token file."""
    model: Path
    """Model or run folder that encoded it, or hf:owner/name."""
    out: Output
    """Picture (.png, .jpg, .webp) or clip (.mp4) to write."""
    length: int | None = None
    """Use at most so many tokens of each block."""
    code: Code = ()
    """Python file with classes of your own that the model is made of, which is imported; may be
    given several times."""

    def run(self) -> None:
        from ._tokens import decode

        decode(self)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Say what is in a token file."""

    input: Positional[Path]
    """Token file."""

    def run(self) -> None:
        from ._tokens import inspect

        inspect(self)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measure a model on folders of pictures and clips, beside trivial coders."""

    model: Path
    """Model or run folder, or hf:owner/name."""
    data: tuple[Path, ...]
    """Folders of pictures and clips that the model was not trained on."""
    out: Output
    """Folder for report.html and the measurements as JSON."""
    threshold: tuple[float, ...] = (0.015, 0.003)
    """Mean squared errors to search lengths for."""
    baseline_data: tuple[Path, ...] = ()
    """Folders that the patch PCA and the block DCT are fitted to. Without them, they are fitted to
    the very pictures they are measured on, which flatters them; the report says so."""
    max_items: int = 200
    """Evaluate no more than so many pictures, and as many clips, evenly chosen."""
    max_frames: int = 64
    """Use no more than the first so many frames of a clip."""
    fps: float | None = 8.0
    """Frames per second to read clips at."""
    strategies: tuple[StrategyName, ...] = (
        "binary",
        "k-ary",
        "binned",
        "warm-start",
        "encode-once",
    )
    """Allocation strategies to compare with the exhaustive optimum, at every threshold and at some
    in between."""
    regressor: Path | None = None
    """Folder that `train-regressor` made, to compare as well: its predictions as they are, and with
    --alpha."""
    alpha: float | None = None
    """With --regressor: share of clips that may miss the threshold that it was calibrated for."""
    strategy_items: int | None = None
    """Compare them on no more than so many pictures, and as many clips, evenly chosen; 0 leaves it
    out. By default 4, or as many as the exhaustive optimum is done with in ten minutes."""
    strategy_frames: int = 16
    """Compare them on no more than the first so many frames of a clip."""
    code: Code = ()
    """Python file with classes of your own that the model is made of, which is imported; may be
    given several times."""

    def run(self) -> None:
        from ._eval import evaluate_folders

        evaluate_folders(self)


@dataclasses.dataclass(frozen=True)
class TrainRegressor:
    """Train a small network that says how many tokens each block needs, without a search.

    Leaves scorer.safetensors and calibration.json in the output folder, for Regressor.load.
    """

    model: Path
    """Model or run folder, or hf:owner/name."""
    data: tuple[Path, ...]
    """Folders of pictures and clips to learn from."""
    out: Output
    """Folder to write."""
    threshold: float = 0.003
    """Mean squared error, pixels in [-1, 1], that a block has to meet."""
    alpha: float = 0.1
    """Share of the pictures and clips that may miss it in some block although all tokens would
    meet it."""
    calibration_data: tuple[Path, ...] = ()
    """Folders of other pictures and clips, of the kind to be encoded later, that decide how far
    predictions are padded to keep to alpha. By default a share of the data is held out."""
    held_out: float = 0.3
    """That share."""
    context: int = 2
    """Blocks that the network sees, the one at hand included."""
    max_items: int = 200
    """Use no more than so many pictures, and as many clips, evenly chosen."""
    max_frames: int = 32
    """Use no more than the first so many frames of a clip."""
    fps: float | None = 8.0
    """Frames per second to read clips at."""
    steps: int = 800
    """Training steps."""
    seed: int = 0
    """Of the weights, the order of the data, crops and what is held out."""
    code: Code = ()
    """Python file with classes of your own that the model is made of, which is imported; may be
    given several times."""

    def run(self) -> None:
        from ._regressor import train_regressor

        train_regressor(self)


@dataclasses.dataclass(frozen=True)
class DataBuild:
    """Make a data set of folders of pictures and clips, for training: shards of records and an
    index. Called again after an interruption, it goes on."""

    folders: Positional[tuple[Path, ...]]
    """Folders of pictures and clips, nested as you like."""
    out: Output
    """Folder to make. Names what could not be used in rejected.tsv and damaged.tsv."""
    resolution: int | None = None
    """Scale down what has a longer short side, in pixels, and encode it anew. Without it, and
    without --fps, the bytes of the files are kept as they are."""
    fps: float | None = None
    """Resample clips of more frames per second, and encode them anew."""
    workers: int = 0
    """Processes; 0 works in this one."""
    shard: str = "0/1"
    """I/N: do part I of N, counted from 0, for arrays of jobs on machines with a common file
    system. The part that ends last completes the data set."""
    shard_megabytes: int | None = None
    """Of files that go into one shard file; by default a 32nd of all, between 4 and 256."""
    source: str = ""
    """Where the files are from; kept in every record."""
    licence: str = ""
    """Under which licence; kept in every record."""
    table: Path | None = None
    """File of tab-separated columns path, source, licence that says so for single files."""
    runner: str | None = None
    """Run the parts as a pipeline of Apache Beam instead (extra beam): DirectRunner,
    DataflowRunner, FlinkRunner, ..."""
    runner_options: tuple[str, ...] = ()
    """More options for Beam and its runner, such as direct_num_workers=2."""

    def run(self) -> None:
        from ._data import build_data

        build_data(self)


@dataclasses.dataclass(frozen=True)
class DataShow:
    """Say what is in a data set that was built, and draw a sheet of pictures from it."""

    data: Positional[Path]
    """The folder that was built."""
    sheet: Path | None = None
    """PNG to write; by default contact-sheet.png in the data set."""

    def run(self) -> None:
        from ._data import show_data

        show_data(self)


@dataclasses.dataclass(frozen=True)
class DataTokenize:
    """Turn a data set, or a folder of pictures and clips, into a data set of tokens, to train
    another model on. Called again after an interruption, it goes on."""

    data: Positional[Path]
    """The folder that data build made, or one of pictures and clips."""
    out: Positional[Path]
    """Folder to make. Names what could not be used in rejected.tsv and damaged.tsv."""
    model: Path
    """Model or run folder, or hf:owner/name."""
    lengths: Lengths = Lengths()
    fps: float | None = None
    """Frames per second to read clips at; their own by default."""
    max_frames: int | None = None
    """Read no more than the first so many frames of a clip."""
    native: bool = False
    """Keep the frames' size; by default the short side is resized to the model's."""
    window: int | None = None
    """Blocks that a block sees, itself included; the model's context by default."""
    batch_size: int = 16
    """The most pictures and clips that are encoded at once, on each device."""
    shard: str = "0/1"
    """I/N: do part I of N, counted from 0, for arrays of jobs on machines with a common file
    system. The part that ends last completes the data set."""
    shard_items: int | None = None
    """Pictures and clips that go into one shard file; by default a 32nd of all, between 16 and
    1024."""
    code: Code = ()
    """Python file with classes of your own that the model is made of, which is imported; may be
    given several times."""

    def run(self) -> None:
        from ._tokenize import tokenize_data

        tokenize_data(self)


@dataclasses.dataclass(frozen=True)
class Data:
    """Build data sets, look at them, and turn them into tokens."""

    command: (
        Annotated[DataBuild, subcommand("build")]
        | Annotated[DataShow, subcommand("show")]
        | Annotated[DataTokenize, subcommand("tokenize")]
    )

    def run(self) -> None:
        self.command.run()


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Make published results again from nothing: trains, measures, and writes tables and pictures.

    zoo-small: every small tokenizer (elastic_*, register_*, coord_*), all trained with equally many
    floating-point operations on photographs that come with scikit-image and clips made from them,
    then measured on others: about 20 minutes on two cores. Called again, it goes on.
    """

    what: Positional[str]
    """Which results: zoo-small."""
    out: Output
    """Folder for tables (zoo-small.md, zoo-small.json), pictures (gallery.md) and models."""
    budget: float = 2.0
    """Training of each tokenizer, in units of 10^12 floating-point operations (matrix products of
    the compiled step): 2 is about 40 seconds on two cores. Twice as much takes twice as long to
    train, and the same time to compile and measure, about 25 seconds a tokenizer."""
    presets: tuple[str, ...] = ()
    """Only these tokenizers; all by default."""
    seed: int = 0
    """Of the weights, the order of the data, the kept lengths and the photographs' crops."""

    def run(self) -> None:
        from ._reproduce import reproduce

        reproduce(self)


COMMANDS = {
    "demo": Demo,
    "zoo": Zoo,
    "data": Data,
    "train": Train,
    "plan": Plan,
    "import-official": ImportOfficial,
    "encode": Encode,
    "decode": Decode,
    "inspect": Inspect,
    "eval": Eval,
    "train-regressor": TrainRegressor,
    "reproduce": Reproduce,
}
