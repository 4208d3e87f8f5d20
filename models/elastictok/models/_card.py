"""Model cards: what somebody who finds a model folder should know."""

import jax

from elastictok.quantizers import AbstractDiscreteQuantizer

from ._decoder import AbstractDecoder
from ._elastictok import ElasticTok
from ._encoder import AbstractEncoder
from ._transformer import CrossTransformer, Transformer, count_parameters

# The last line of a card that may be written again.
MARK = "<!-- Written by elastictok. Remove this line to keep what you change. -->"


def model_card(model: ElasticTok, *, about: str | None = None) -> str:
    """A README for a model folder, in the form that the Hugging Face hub reads.

    **Arguments:**

    - `model`: arrays, or `jax.ShapeDtypeStruct`s in their place.
    - `about`: a paragraph on where the model is from: data, training, licence. None says that
      nobody told.
    """
    height, width = model.size
    patching, quantizer = model.patching, model.quantizer
    bits = quantizer.bits_per_token
    rows = {
        "parameters": f"{count_parameters(model):,}",
        "quantizer": f"{type(quantizer).__name__}, {_values(model)}",
        "bits per token": "not quantized" if bits is None else f"{bits:.2f}",
        "block": f"{model.frames_per_block} frame{'s' * (model.frames_per_block > 1)}",
        "tokens per block": f"{model.min_tokens} to {model.max_tokens}",
        "patch": f"{patching.frames} x {patching.height} x {patching.width}, frames first",
        "token order": type(model.order).__name__,
        "trained size": f"{height} x {width} pixels",
        "context": f"{model.context} block{'s' * (model.context > 1)}",
        "encoder": _side(model.encoder),
        "decoder": _side(model.decoder),
        "computes in": f"{model.encoder.transformer.dtype}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    origin = about or (
        "Nobody has written down yet what this model was trained on, for how long, and under\n"
        "which licence it may be used."
    )
    return f"""\
---
library_name: elastictok
tags:
- image-tokenization
- video-tokenization
- adaptive-tokenization
---

# ElasticTok model

An image and video tokenizer whose blocks keep any prefix of their tokens: as many as the content
needs. It follows ElasticTok ([arXiv 2410.08368](https://arxiv.org/abs/2410.08368)).

| | |
|---|---|
{table}

## Where it is from

{origin}

## Use

```python
from elastictok.inference import MSE, Binary, Tokenizer
from elastictok.models import load

tokenizer = Tokenizer(load("."), Binary(MSE(0.003)))  # this folder, or "hf:owner/name"
tokens = tokenizer.encode(frames)  # uint8 [frames height width 3]
frames = tokenizer.decode(tokens)
```

```bash
elastictok encode clip.mp4 --model . --threshold 0.003 -o clip.safetensors
elastictok decode clip.safetensors --model . -o again.mp4
```

`config.json` holds every setting and the sha256 of the weights, which is checked when they are
loaded.
"""


def _side(side: AbstractEncoder | AbstractDecoder) -> str:
    kinds = (Transformer, CrossTransformer)
    nodes = jax.tree.leaves(side, is_leaf=lambda node: isinstance(node, kinds))
    depths = [node.depth for node in nodes if isinstance(node, kinds)]
    return (
        f"{type(side).__name__}, {count_parameters(side):,} parameters, "
        f"{' + '.join(map(str, depths))} layer{'s' * (sum(depths) > 1)} of width "
        f"{side.transformer.dim}"
    )


def _values(model: ElasticTok) -> str:
    quantizer = model.quantizer
    if isinstance(quantizer, AbstractDiscreteQuantizer):
        return f"{quantizer.codebook_size:,} codes"
    return f"{quantizer.latent_dim} numbers per token"
