"""What the chips that can be planned for are able to do, by Google's documentation."""

import dataclasses

_GB, _GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. All figures are of a chip, which jax may see as several devices.

    - `name`: as topologies have it, such as `v5e` in `v5e:4x4`.
    - `device_kind`: as `jax.Device.device_kind` has it.
    - `devices`: that jax lists for a chip in a topology.
    - `memory_bytes`: that a program may use, which is a little less than there is: what the
        compiler itself names when a program does not fit.
    - `bf16_flops`: per second, the peak of products of bfloat16.
    - `hbm_bytes_per_second`: between the chip and its memory.
    - `link_bytes_per_second`: that a chip can send to its neighbours over all its links together
        (the same again arrives at the same time): half of what the documentation calls the
        bidirectional bandwidth. An exchange along one axis of the torus has only some of the links.
    """

    name: str
    device_kind: str
    devices: int
    memory_bytes: float
    bf16_flops: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float


# Read in November 2026:
#   https://docs.cloud.google.com/tpu/docs/v4     275 Tflops, 32 GiB, 1200 GB/s
#   https://docs.cloud.google.com/tpu/docs/v5e    197 Tflops, 16 GB, 819 GB/s, links 400 GB/s
#   https://docs.cloud.google.com/tpu/docs/v5p    459 Tflops, 95 GB, 2765 GB/s, links 1200 GB/s
#   https://docs.cloud.google.com/tpu/docs/v6e    918 Tflops, 32 GB, 1638 GB/s, links 800 GB/s
#   https://docs.cloud.google.com/tpu/docs/tpu7x  2307 Tflops, 192 GiB, 7380 GB/s, links 1200 GB/s
# The links of v4 (six of 50 GB/s each way) are from https://arxiv.org/abs/2304.01433;
# the memory is what libtpu 0.0.42 leaves to a program (tests/train/test_plan_aot.py asks it).
CHIPS: tuple[Chip, ...] = (
    Chip("v4", "TPU v4", 2, 2 * 15.25 * _GIB, 275e12, 1200 * _GB, 300 * _GB),
    Chip("v5e", "TPU v5 lite", 1, 15.75 * _GIB, 197e12, 819 * _GB, 200 * _GB),
    Chip("v5p", "TPU v5", 1, 95.74 * _GIB, 459e12, 2765 * _GB, 600 * _GB),
    Chip("v6e", "TPU v6 lite", 1, 31.25 * _GIB, 918e12, 1638 * _GB, 400 * _GB),
    Chip("tpu7x", "TPU7x", 2, 2 * 94.75 * _GIB, 2307e12, 7380 * _GB, 600 * _GB),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a kind of device; None if it is not in the table."""
    return next((chip for chip in CHIPS if chip.device_kind == device_kind), None)
