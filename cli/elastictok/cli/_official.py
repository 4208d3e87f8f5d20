"""`elastictok import-official`."""

import dataclasses

import jax.numpy as jnp

from elastictok.models import (
    OFFICIAL_FSQ,
    OFFICIAL_VAE,
    OfficialConfig,
    count_parameters,
    file_sha256,
    load_official,
    model_card,
    save,
)

from ._commands import ImportOfficial


def import_official(command: ImportOfficial) -> None:
    """Writes the model folder, and says what is in it."""
    config = OFFICIAL_FSQ if command.variant == "fsq" else OFFICIAL_VAE
    if command.config is not None:
        config = OfficialConfig.read(command.config)
        if config.bottleneck_type != command.variant:
            raise ValueError(
                f"{command.config} is of the variant {config.bottleneck_type}, and --variant says "
                f"{command.variant}; one of them is wrong"
            )
    if (command.out / "config.json").exists():
        raise ValueError(f"{command.out} already holds a model; choose another folder")
    model = load_official(
        command.input, config, dtype=jnp.dtype(command.dtype), sha256=command.sha256
    )
    sha = file_sha256(command.input)
    foreign = "vae_bottleneck_dim" if command.variant == "fsq" else "fsq_quant_levels"
    options = "\n".join(
        f"- {name}: {value}"
        for name, value in dataclasses.asdict(config).items()
        if name != foreign
    )
    about = f"""\
Imported from a checkpoint of the official implementation
([LargeWorldModel/ElasticTok](https://github.com/LargeWorldModel/ElasticTok)),
`{command.input.name}` with the sha256 `{sha}`,
by these of its options:

{options}

Whoever made the checkpoint knows what it was trained on and under which licence it may be used."""
    save(model, command.out, card=model_card(model, about=about))
    print(
        f"{command.out}: {count_parameters(model):,} parameters, {command.variant}, from "
        f"{command.input} (sha256 {sha})"
    )
    print(f"elastictok encode PICTURE_OR_CLIP --model {command.out} --threshold 0.003 -o ...")
