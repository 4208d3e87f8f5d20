"""`elastictok encode`, `decode` and `inspect`."""

import numpy as np
from rich.console import Console
from rich.table import Table

from elastictok.data import CLIPS, read_media, write_clip, write_picture
from elastictok.inference import (
    MSE,
    AbstractStrategy,
    Binary,
    FixedLength,
    Full,
    Tokenizer,
    Tokens,
)
from elastictok.models import load

from ._commands import Decode, Encode, Inspect

_DEFAULT_FPS = 8.0


def encode(command: Encode) -> None:
    """Writes the token file of a picture or clip, and says what it took."""
    strategy = _strategy(command)
    if command.out.suffix != ".safetensors":
        raise ValueError(
            f"{command.out} does not end in .safetensors; token files do: give another name"
        )
    tokenizer = Tokenizer(
        load(command.model), strategy, window=command.window, native=command.native
    )
    clip = read_media(command.input, fps=command.fps, max_frames=command.max_frames)
    tokens = tokenizer.encode(clip.frames, clip.fps)
    tokens.save(command.out)
    print(f"{command.out}: {_summary(tokens)}")
    missed = int(np.sum(~tokens.met))
    if command.threshold is not None and missed:
        print(
            f"{missed} of {tokens.blocks} blocks miss the threshold of {command.threshold:g} even "
            "with all their tokens"
        )


def _strategy(command: Encode) -> AbstractStrategy:
    if command.length is not None and command.threshold is None:
        return FixedLength(length=command.length)
    if command.threshold is not None and command.length is None:
        search = Full if command.exhaustive else Binary
        return search(MSE(command.threshold))
    raise ValueError(
        "give either --threshold (fewest tokens that meet a mean squared error, such as 0.02) or "
        "--length (tokens of each block, such as 40)"
    )


def decode(command: Decode) -> None:
    """Writes the picture or clip that a token file holds."""
    tokens = Tokens.load(command.input)
    clip = command.out.suffix.lower() in CLIPS
    if not clip and not tokens.picture:
        raise ValueError(
            f"{command.input} holds a clip of {tokens.frames} frames, and {command.out} is a "
            "picture; write an .mp4"
        )
    if command.length is not None:
        tokens = tokens.truncate(command.length)
    tokenizer = Tokenizer(load(command.model), FixedLength(length=1), window=tokens.window)
    frames = tokenizer.decode(tokens)
    if clip:
        write_clip(command.out, frames, tokens.fps or _DEFAULT_FPS)
    else:
        write_picture(command.out, frames[0])
    count, height, width, _ = frames.shape
    print(f"{command.out}: {count} frame{'s' * (count > 1)} of {width}x{height}")


def inspect(command: Inspect) -> None:
    """Prints what a token file says of itself, and its tokens per block."""
    tokens = Tokens.load(command.input)
    size = command.input.stat().st_size
    kind = "picture" if tokens.picture else f"clip of {tokens.frames} frames"
    fps = "" if tokens.fps is None else f", {tokens.fps:g} frames/s"
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "file": f"{command.input}, {size:,} bytes",
        "content": f"{kind}, {tokens.width}x{tokens.height}{fps}",
        "original size": f"{tokens.original_width}x{tokens.original_height}",
        "model": tokens.fingerprint,
        "blocks": f"{tokens.blocks} of {tokens.frames_per_block} frames, window {tokens.window}",
        "tokens": _lengths(tokens),
        "values": _values(tokens),
        "bits": _bits(tokens),
        "loss": _losses(tokens),
        "network passes": f"{int(tokens.evaluations.sum())}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(_bar(tokens))


def _summary(tokens: Tokens) -> str:
    blocks = "1 block" if tokens.blocks == 1 else f"{tokens.blocks} blocks"
    losses = _losses(tokens)
    return f"{int(tokens.lengths.sum())} tokens in {blocks}, {_bits(tokens)}, {losses}"


def _lengths(tokens: Tokens) -> str:
    lengths = tokens.lengths
    return (
        f"{int(lengths.sum())} of {tokens.blocks * tokens.tokens_per_block}: "
        f"{lengths.min()} to {lengths.max()} per block, mean {lengths.mean():.1f}, "
        f"{tokens.shortest} to {tokens.tokens_per_block} allowed"
    )


def _values(tokens: Tokens) -> str:
    if tokens.codebook_size is None:
        return f"latents of {tokens.values.shape[1]} numbers, not quantized"
    streams = 1 if tokens.values.ndim == 1 else tokens.values.shape[1]
    each = "" if streams == 1 else f"{streams} per token, each "
    return f"codes, {each}one of {tokens.codebook_size:,}"


def _bits(tokens: Tokens) -> str:
    if tokens.bits is None:
        return "bits per pixel n/a (not quantized)"
    pixels = tokens.frames * tokens.height * tokens.width
    return f"{tokens.bits:,.0f} bits, {tokens.bits / pixels:.4f} bits per pixel"


def _losses(tokens: Tokens) -> str:
    measured = tokens.losses[np.isfinite(tokens.losses)]
    if not len(measured):
        return "loss not measured"
    return f"mean loss of a block {measured.mean():.5f}, {int(tokens.met.sum())} met"


def _bar(tokens: Tokens) -> str:
    """One line of the tokens per block, for clips that fit into it."""
    if tokens.blocks < 2:
        return ""
    levels = " ▁▂▃▄▅▆▇█"
    shares = tokens.lengths[:200] / tokens.tokens_per_block
    bar = "".join(levels[max(1, round(share * (len(levels) - 1)))] for share in shares)
    return f"tokens per block |{bar}|" + (" ..." if tokens.blocks > len(shares) else "")
