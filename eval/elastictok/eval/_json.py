"""Evaluations and comparisons of strategies as JSON."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._comparison import StrategyComparison, StrategyResult
from ._files import write_atomic
from ._metrics import psnr
from ._results import Evaluation, Row

FORMAT = "elastictok-evaluation"
VERSION = 1

_FACTS = ("name", "searched", "loss", "threshold")
_SUMMED = (
    "rival",
    "tokens",
    "share_of_tokens",
    "bits_per_pixel",
    "bpp16",
    "mse",
    "psnr_per_frame",
    "psnr_per_clip",
    "psnr_dataset",
    "ssim_gaussian",
    "ssim_uniform",
    "blocks_met",
    "items_met",
    "blocks_measured",
    "encoder_evaluations",
    "decoder_evaluations",
    "encode_seconds",
    "decode_seconds",
)
_AGAINST_OPTIMUM = ("token_overhead", "met_difference", "fewer_evaluations", "faster")
_ORIGIN = ("name", "device", "fingerprint")


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, and numbers that JSON does not have as null."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(part) for name, part in fields.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _named(value: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: _plain(getattr(value, name)) for name in names}


def _row_facts(row: Row) -> dict[str, Any]:
    measurements = [
        {
            **_plain(m),
            "bits_per_pixel": m.bits_per_pixel,
            "bpp16": m.bpp16,
            "psnr_per_clip": _plain(psnr(m.mse)),
        }
        for m in row.measurements
    ]
    return {
        **_named(row, _FACTS),
        "summary": _named(row, _SUMMED),
        "usage": _plain(row.usage),
        "measurements": measurements,
    }


def _result_facts(result: StrategyResult) -> dict[str, Any]:
    return {
        **_named(result, ("strategy", "requirement")),
        "against_optimum": _named(result, _AGAINST_OPTIMUM),
        **_row_facts(result.row),
    }


def _comparison_facts(comparison: StrategyComparison) -> dict[str, Any]:
    return {
        **_named(comparison, (*_ORIGIN, "optimum")),
        "results": [_result_facts(result) for result in comparison.results],
        "fixed": [_row_facts(row) for row in comparison.fixed],
    }


def to_json(
    evaluations: Sequence[Evaluation], comparisons: Sequence[StrategyComparison] = ()
) -> str:
    """Evaluations as JSON: every row summed up and item by item; comparisons of strategies too.

    A PSNR is null where it is infinite (its MSE is 0); every other null is a number that does not
    apply.
    """
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "evaluations": [
            {**_named(each, _ORIGIN), "rows": [_row_facts(row) for row in each.rows]}
            for each in evaluations
        ],
        "comparisons": [_comparison_facts(each) for each in comparisons],
    }
    return json.dumps(facts, indent=1, allow_nan=False) + "\n"


def write_json(
    evaluations: Sequence[Evaluation],
    path: str | os.PathLike[str],
    comparisons: Sequence[StrategyComparison] = (),
) -> Path:
    """Writes `to_json` to a file, atomically; folders are made as needed."""
    target = Path(path)
    write_atomic(target, to_json(evaluations, comparisons))
    return target
