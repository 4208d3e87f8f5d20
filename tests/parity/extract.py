"""Makes `data/` from the reference values: `python tests/parity/extract.py FOLDER`.

The folder holds `{fsq,vae}_golden.npz`, `{fsq,vae}_params_fp32`, `{fsq,vae}_params_bf16` and
`{fsq,vae}_config.json`. Checkpoints are kept whole, byte for byte; of each array that is compared
within a tolerance, every `stride`-th number.
"""

import hashlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
# Tuned for arrays of float32, whose four bytes have their own statistics each.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 1, "lp": 2, "pb": 2}]
SCENARIOS = ("whole", "single", "single_b1", "packA_pos", "packM_pos", "padded", "hidden0")
LAYERS = (
    "enc_in_proj",
    "enc_layers",
    "enc_blocks",
    "enc_ln_f",
    "z_bounded",
    "dec_post_quant",
    "dec_layers",
    "dec_blocks",
    "dec_ln_f",
    "out_proj",
)
SAMPLED = (
    "cached/recon",
    "cached/cache",
    "cached_packA_posreset/recon",
    "fixed9/",
    "grad/params",
    "opt/params_after4",
    "recon_fn/recon_uint8",
    "whole_sampled/recon",
    "whole_sampled/z_",
)


def main() -> None:
    source = Path(sys.argv[1])
    DATA.mkdir(exist_ok=True)
    for variant in ("fsq", "vae"):
        golden = dict(np.load(source / f"{variant}_golden.npz"))
        params = (source / f"{variant}_params_fp32").read_bytes()
        packed = lzma.compress(params, format=lzma.FORMAT_XZ, filters=FILTERS)
        (DATA / f"{variant}_params_fp32.xz").write_bytes(packed)
        config = json.loads((source / f"{variant}_config.json").read_text())
        (DATA / f"{variant}_config.json").write_text(json.dumps(config, indent=1) + "\n")
        kept: dict[str, np.ndarray] = {}
        half = (source / f"{variant}_params_bf16").read_bytes()
        kept["bf16_sha256"] = np.frombuffer(hashlib.sha256(half).digest(), np.uint8)
        for name, array in golden.items():
            if exact(name, array.dtype.kind in "iu"):
                kept[name] = compact(array)
            elif near(name):
                kept[f"{name}:sample"] = sample(array, budget(name))
        (DATA / f"{variant}_golden.xz").write_bytes(pack(kept))


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """A line of JSON that says what follows, then the arrays; an archive's heads would be larger
    than most of them."""
    index = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    content = b"".join([json.dumps(index).encode(), b"\n", *(a.tobytes() for a in arrays.values())])
    return lzma.compress(content, format=lzma.FORMAT_XZ, filters=FILTERS)


def exact(name: str, integer: bool) -> bool:
    """Inputs, integers and single numbers. The VAE's `code_idx` are its latents once more."""
    top, _, leaf = name.partition("/")
    if name in ("video_uint8", "keep_counts", "encoding_mask"):
        return True
    if top in SCENARIOS:
        return leaf in ("encoding_mask", "attention_mask", "segment_ids", "position_ids") or (
            (leaf == "code_idx" and integer) or leaf.startswith("stat_")
        )
    if top == "whole_sampled":
        return leaf in ("noise", "stat_aux_loss")
    if top == "opt" and "params_after4" not in name:
        return True
    return name.endswith(("/block_loss", "recon_fn/recon_loss")) or (
        top in ("grad", "grad_ring") and leaf in ("loss", "mse", "aux")
    )


def near(name: str) -> bool:
    """Arrays that are compared within a tolerance."""
    top, _, leaf = name.partition("/")
    if top in SCENARIOS:
        return leaf in ("recon", "z_pre", "z_masked", "token_mse") or (
            top in ("whole", "single", "single_b1") and leaf in LAYERS
        )
    return name.startswith(SAMPLED)


def budget(name: str) -> int:
    return 100 if name.startswith(("grad/", "opt/")) else 160


def compact(array: np.ndarray) -> np.ndarray:
    """The same numbers in a smaller type, where they are integers."""
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() < 2**16:
        return array.astype(np.uint8 if array.max() < 256 else np.uint16)
    return array


def sample(array: np.ndarray, most: int) -> np.ndarray:
    """Every `stride`-th number, the stride odd, so that all rows and columns have their turn."""
    stride = max(1, array.size // most) | 1
    return array.reshape(-1)[::stride].astype(np.float32)


if __name__ == "__main__":
    main()
