"""`elastictok data tokenize`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, final

import jax

from elastictok.data import Clip, TokenRecord, tokenize
from elastictok.inference import SCORER_FILE, Tokenizer, Tokens
from elastictok.models import file_sha256

from ._commands import DataTokenize
from ._data import Teller, parse_shard
from ._lengths import check_lengths, make_strategy
from ._user import load_model


def tokenize_data(command: DataTokenize) -> None:
    """Tokenizes on all devices of this machine, tells how far it is, and says what there is in the
    end."""
    shard = parse_shard(command.shard)
    check_lengths(command.lengths)
    devices = jax.local_devices()
    # A device that is not named is the only one.
    encoders = [_Encoder(command, device) for device in (devices if len(devices) > 1 else [None])]
    settings = _settings(command, encoders[0].tokenizer)
    teller = Teller()
    try:
        made = tokenize(
            command.data,
            command.out,
            encoders,
            settings=settings,
            fps=command.fps,
            max_frames=command.max_frames,
            batch_size=command.batch_size,
            shard=shard,
            shard_items=command.shard_items,
            progress=teller,
        )
    except KeyboardInterrupt:
        teller.end()
        print("stopped; run the same command to go on", file=sys.stderr)
        raise
    teller.end()
    print(made)


@final
class _Encoder:
    """A tokenizer that works on one device."""

    def __init__(self, command: DataTokenize, device: jax.Device | None):
        self._device = device
        with jax.default_device(device):
            self.tokenizer = _tokenizer(command)

    def __call__(self, batch: Sequence[tuple[str, Clip]]) -> list[TokenRecord]:
        # The context is one of this thread.
        with jax.default_device(self._device):
            made = self.tokenizer.encode_batch([clip.frames for _, clip in batch])
        return [_record(key, clip, tokens) for (key, clip), tokens in zip(batch, made, strict=True)]


def _tokenizer(command: DataTokenize) -> Tokenizer:
    model = load_model(command.model, command.code)
    strategy = make_strategy(command.lengths, model, command.window)
    return Tokenizer(model, strategy, window=command.window, native=command.native)


def _settings(command: DataTokenize, tokenizer: Tokenizer) -> dict[str, Any]:
    """Whatever changes the tokens."""
    lengths: dict[str, Any] = dataclasses.asdict(command.lengths)
    if lengths["regressor"] is not None:  # what it is, and not where
        lengths["regressor"] = file_sha256(lengths["regressor"] / SCORER_FILE)
    return {
        "model": tokenizer.codec.fingerprint,
        **lengths,
        "window": tokenizer.window,
        "native": command.native,
    }


def _record(key: str, clip: Clip, tokens: Tokens) -> TokenRecord:
    return TokenRecord(
        key=key,
        kind="picture" if clip.picture else "clip",
        codes=tokens.codes,
        latents=tokens.latents,
        lengths=tokens.lengths,
        losses=tokens.losses,
        frames=tokens.frames,
        height=tokens.height,
        width=tokens.width,
        original_height=tokens.original_height,
        original_width=tokens.original_width,
        tokens_per_block=tokens.tokens_per_block,
        frames_per_block=tokens.frames_per_block,
        window=tokens.window,
        fps=clip.fps,
        missing=clip.missing,
        codebook_size=tokens.codebook_size,
        fingerprint=tokens.fingerprint,
    )
