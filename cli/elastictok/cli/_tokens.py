"""`elastictok encode`, `decode` and `inspect`."""

import numpy as np
from rich.console import Console
from rich.table import Table

from elastictok.data import CLIPS, read_media, write_clip, write_picture
from elastictok.inference import FixedLength, TokenFile, TokenIndex, Tokenizer, Tokens

from ._commands import Decode, Encode, Inspect
from ._lengths import check_lengths, make_strategy
from ._user import load_model

_DEFAULT_FPS = 8.0


def encode(command: Encode) -> None:
    """Writes the token file of a picture or clip, and says what it took."""
    if command.out.suffix != ".safetensors":
        raise ValueError(
            f"{command.out} does not end in .safetensors; token files do: give another name"
        )
    lengths = command.lengths
    check_lengths(lengths)
    model = load_model(command.model, command.code)
    strategy = make_strategy(lengths, model, command.window)
    tokenizer = Tokenizer(model, strategy, window=command.window, native=command.native)
    clip = read_media(command.input, fps=command.fps, max_frames=command.max_frames)
    tokens = tokenizer.encode(clip.frames, clip.fps)
    tokens.save(command.out)
    print(f"{command.out}: {_summary(tokens.index)}")
    missed = int(np.sum(~tokens.met & tokens.measured))
    if lengths.threshold is not None and missed:
        limit = "" if lengths.regressor else " even with all their tokens"
        print(
            f"{missed} of {tokens.blocks} blocks miss the threshold of {lengths.threshold:g}{limit}"
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
    tokenizer = Tokenizer(
        load_model(command.model, command.code), FixedLength(length=1), window=tokens.window
    )
    frames = tokenizer.decode(tokens)
    if clip:
        write_clip(command.out, frames, tokens.fps or _DEFAULT_FPS)
    else:
        write_picture(command.out, frames[0])
    count, height, width, _ = frames.shape
    print(f"{command.out}: {count} frame{'s' * (count > 1)} of {width}x{height}")


def inspect(command: Inspect) -> None:
    """Prints what a token file says of itself, and its tokens per block.

    Codes and latents are not read, so a file may have any size.
    """
    with TokenFile(command.input) as file:
        index = file.index
    size = command.input.stat().st_size
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "file": f"{command.input}, {size:,} bytes, {8 * size / _pixels(index):.4f} bits per pixel",
        "content": _content(index),
        "original size": f"{index.original_width}x{index.original_height}",
        "model": index.fingerprint,
        "blocks": f"{index.blocks} of {index.frames_per_block} frames, window {index.window}",
        "tokens": _lengths(index),
        "values": _values(index),
        "bits": _bits(index),
        "loss": _losses(index),
        "measured": _measured(index),
        "network passes": f"{int(index.evaluations.sum())}",
    }
    if index.first_block:
        rows["first block"] = f"{index.first_block}: a part of a stream, counted from 0"
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(_bar(index))


def _summary(tokens: TokenIndex) -> str:
    blocks = "1 block" if tokens.blocks == 1 else f"{tokens.blocks} blocks"
    losses = _losses(tokens)
    return f"{int(tokens.lengths.sum())} tokens in {blocks}, {_bits(tokens)}, {losses}"


def _content(tokens: TokenIndex) -> str:
    size = f"{tokens.width}x{tokens.height}"
    if tokens.picture:
        return f"picture, {size}"
    rate = "frames/s not known"
    if tokens.fps is not None:
        rate = f"{tokens.fps:g} frames/s, {tokens.frames / tokens.fps:.2f} seconds"
    return f"clip of {tokens.frames} frames, {size}, {rate}"


def _pixels(tokens: TokenIndex) -> int:
    return tokens.frames * tokens.height * tokens.width


def _lengths(tokens: TokenIndex) -> str:
    lengths = tokens.lengths
    return (
        f"{int(lengths.sum())} of {tokens.blocks * tokens.tokens_per_block}: "
        f"{lengths.min()} to {lengths.max()} per block, mean {lengths.mean():.1f}, "
        f"{tokens.shortest} to {tokens.tokens_per_block} allowed"
    )


def _values(tokens: TokenIndex) -> str:
    if tokens.codebook_size is None:
        return f"latents of {tokens.row[0]} numbers, not quantized"
    streams = tokens.row[0] if tokens.row else 1
    each = "" if streams == 1 else f"{streams} per token, each "
    return f"codes, {each}one of {tokens.codebook_size:,}"


def _bits(tokens: TokenIndex) -> str:
    if tokens.bits is None:
        return "bits per pixel n/a (not quantized)"
    return f"{tokens.bits:,.0f} bits, {tokens.bits / _pixels(tokens):.4f} bits per pixel"


def _losses(tokens: TokenIndex) -> str:
    measured = tokens.losses[np.isfinite(tokens.losses)]
    if not len(measured):
        return "loss not measured"
    return f"mean loss of a block {measured.mean():.5f}, {int(tokens.met.sum())} met"


def _measured(tokens: TokenIndex) -> str:
    count = int(tokens.measured.sum())
    rest = tokens.blocks - count
    return f"{count} of {tokens.blocks} blocks" + (f", {rest} not" if rest else "")


def _bar(tokens: TokenIndex) -> str:
    """One line of the tokens per block, for clips that fit into it."""
    if tokens.blocks < 2:
        return ""
    levels = " ▁▂▃▄▅▆▇█"
    shares = tokens.lengths[:200] / tokens.tokens_per_block
    bar = "".join(levels[max(1, round(share * (len(levels) - 1)))] for share in shares)
    return f"tokens per block |{bar}|" + (" ..." if tokens.blocks > len(shares) else "")
