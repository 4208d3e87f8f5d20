"""`elastictok zoo`: which models and quantizers there are. No weights are made for it."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax

from elastictok.models import (
    AbstractTailDrop,
    ConditionDropout,
    ElasticTok,
    FixedDrop,
    Preset,
    WithFull,
    count_parameters,
    model_card,
)
from elastictok.models.presets import PRESETS
from elastictok.quantizers import AbstractDiscreteQuantizer, AbstractQuantizer

from ._commands import Zoo
from ._models import QUANTIZERS, TAIL_DROPS, find_preset, takes_quantizer

_WIDTH = 100  # of a table on a screen that has them, and in a file
_INDENT = "    "


def zoo(command: Zoo) -> None:
    """Prints all presets and quantizers, or the card of one preset."""
    presets = PRESETS
    if command.preset is not None:
        presets = {command.preset: find_preset(command.preset)}
    models = {name: _shapes(preset) for name, preset in presets.items()}
    quantizers = {
        name: eqx.filter_eval_shape(kind.make, jax.random.key(0))
        for name, kind in QUANTIZERS.items()
    }
    if command.json is not None:
        figures = {
            "presets": {name: _figures(presets[name], model) for name, model in models.items()},
            "quantizers": {
                name: _quantizer_figures(quantizer) | {"source": QUANTIZERS[name].source}
                for name, quantizer in quantizers.items()
            },
        }
        text = json.dumps(figures, indent=1, ensure_ascii=False)
        command.json.write_text(text + "\n", encoding="utf-8")
    if command.preset is not None:
        print(_card(command.preset, presets[command.preset], models[command.preset]))
        return
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
    print("Models: elastictok train NAME ...; elastictok zoo NAME says all about one\n")
    print(table(_PRESET_HEADER, [_preset_row(n, presets[n], m) for n, m in models.items()], width))
    print("\nQuantizers: elastictok train ... --quantizer NAME\n")
    print(table(_QUANTIZER_HEADER, [_quantizer_row(n, q) for n, q in quantizers.items()], width))


class Row(NamedTuple):
    """A line of cells, and below it what takes more words."""

    cells: Sequence[str]
    note: str = ""


_PRESET_HEADER = ("name", "parameters", "tokens", "frames x size", "quantizer", "tail-drop")
_QUANTIZER_HEADER = ("name", "class", "codes of a token", "bits of a token", "source")


def table(header: Sequence[str], rows: Sequence[Row], width: int) -> str:
    """Rows as text.

    **Arguments:**

    - `width`: columns that there are. Where a line of cells does not fit, they are listed below the
        first one, wrapped.
    """
    widths = [max(len(row.cells[i]) for row in [Row(header), *rows]) for i in range(len(header))]
    fits = sum(widths) + 2 * (len(widths) - 1) <= width
    lines = [_line(header, widths), _line(["-" * n for n in widths], widths)] if fits else []
    for row in rows:
        if fits:
            lines.append(_line(row.cells, widths))
        else:
            name, *cells = row.cells
            pairs = zip(header[1:], cells, strict=True)
            named = "; ".join(f"{title} {cell.strip()}" for title, cell in pairs)
            lines += [name, *_wrapped(named, width)]
        lines += _wrapped(row.note, width)
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(n) for cell, n in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, 20),
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_on_hyphens=False,
    )


def _shapes(preset: Preset) -> ElasticTok:
    return eqx.filter_eval_shape(lambda: preset.make(key=jax.random.key(0)))


def _preset_row(name: str, preset: Preset, model: ElasticTok) -> Row:
    height, width = model.size
    cells = (
        name,
        f"{count_parameters(model):>11,}",
        f"{model.min_tokens}-{model.max_tokens}",
        f"{model.frames_per_block} x {height}x{width}",
        type(model.quantizer).__name__,
        _policy(preset.tail_drop),
    )
    source = f"[{preset.source}]" if preset.source else ""
    return Row(cells, " ".join(filter(None, (preset.about, source))))


def _quantizer_row(name: str, quantizer: AbstractQuantizer) -> Row:
    codes, bits = "continuous", f"{quantizer.latent_dim} numbers"
    if isinstance(quantizer, AbstractDiscreteQuantizer):
        streams = f"{quantizer.streams} x " if quantizer.streams > 1 else ""
        codes, bits = f"{streams}{quantizer.codebook_size:,}", f"{quantizer.bits_per_token:.4g}"
    return Row((name, type(quantizer).__name__, codes, bits, QUANTIZERS[name].source))


def _policy(policy: AbstractTailDrop) -> str:
    """In the words of the command line."""
    if isinstance(policy, FixedDrop):
        return f"fixed, {policy.length}"
    if isinstance(policy, ConditionDropout):
        return f"{_policy(policy.inner)}, {policy.share:.0%} untold"
    if isinstance(policy, WithFull):
        return f"{_policy(policy.inner)}, {policy.share:.0%} full"
    names = (name for name, known in TAIL_DROPS.items() if repr(known) == repr(policy))
    return next(names, type(policy).__name__)


def _figures(preset: Preset, model: ElasticTok) -> dict[str, Any]:
    return {
        "parameters": count_parameters(model),
        "min_tokens": model.min_tokens,
        "max_tokens": model.max_tokens,
        "frames_per_block": model.frames_per_block,
        "size": list(model.size),
        "context": model.context,
        "quantizer": _quantizer_figures(model.quantizer),
        "takes_quantizer": takes_quantizer(preset),
        "tail_drop": repr(preset.tail_drop),
        "about": preset.about,
        "source": preset.source,
    }


def _quantizer_figures(quantizer: AbstractQuantizer) -> dict[str, Any]:
    discrete = isinstance(quantizer, AbstractDiscreteQuantizer)
    return {
        "class": type(quantizer).__name__,
        "codebook_size": quantizer.codebook_size if discrete else None,
        "codes_per_token": quantizer.streams if discrete else None,
        "bits_per_token": quantizer.bits_per_token,
        "latent_dim": quantizer.latent_dim,
    }


def _card(name: str, preset: Preset, model: ElasticTok) -> str:
    """The card of the model folder that training leaves, without what is for machines."""
    also = " and --quantizer" if takes_quantizer(preset) else ""
    source = f" Source: {preset.source}." if preset.source else ""
    about = textwrap.fill(
        f"The preset {name}. {preset.about}{source} Its weights are random until `elastictok train "
        f"{name} --data FOLDER --out RUN` has trained them: with the tail-drop policy "
        f"`{preset.tail_drop!r}`, unless --tail-drop{also} asked for something else.",
        _WIDTH,
        break_on_hyphens=False,
        break_long_words=False,
    )
    card = model_card(model, about=about)
    if card.startswith("---\n"):
        card = card.partition("\n---\n")[2]
    return card.strip()
