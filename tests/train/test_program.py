"""What is read in compiled programs: in small ones written here, and in those of this compiler."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastictok.train._program import read_program

HERE = Path(__file__).parent


def program(*lines: str, more: str = "", devices: int = 8):
    body = "\n  ".join(lines)
    return read_program(
        f"HloModule jit_run, is_scheduled=true, num_partitions={devices}\n\n{more}\n"
        f"ENTRY %main (x: f32[64,32]) -> f32[64,32] {{\n"
        f"  %x = f32[64,32]{{1,0:T(8,128)}} parameter(0)\n  {body}\n}}\n"
    )


SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""
SIZE = 64 * 32 * 4  # bytes of the array


@pytest.mark.parametrize(
    ("line", "kind", "size", "sent"),
    [
        # What a device sends of an array in the ring algorithms, over 4 devices.
        (
            "ROOT %y = f32[256,32]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, "
            "dimensions={0}",
            "all-gather",
            4 * SIZE,
            3 * SIZE,
        ),
        (
            "ROOT %y = f32[64,32]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, "
            "to_apply=%sum",
            "all-reduce",
            SIZE,
            1.5 * SIZE,
        ),
        (
            "ROOT %y = f32[16,32]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], "
            "dimensions={0}, to_apply=%sum",
            "reduce-scatter",
            SIZE,
            0.75 * SIZE,
        ),
        (
            "ROOT %y = f32[64,32]{1,0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            "all-to-all",
            SIZE,
            0.75 * SIZE,
        ),
        (
            "ROOT %y = f32[64,32]{1,0} collective-permute(%x), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            SIZE,
            SIZE,
        ),
    ],
)
def test_what_collectives_send(line, kind, size, sent):
    found = program(line, more=SUM)
    (one,) = found.collectives
    assert (one.kind, one.size, one.times) == (kind, size, 1)
    assert found.sent == one.sent == sent


@pytest.mark.parametrize(
    ("written", "first", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4), ("a",)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4), ("a",)),
        ("[2,4]<=[8]", (0, 1, 2, 3), ("b",)),
        ("{}", tuple(range(8)), ("a", "b")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4), ("a",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3), ("b",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8)), ("a", "b")),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4), ("a",)),
        ("mesh['x'=8] {'x':(2)2}", (0, 2), ("b",)),
    ],
)
def test_who_exchanges(written, first, axes):
    (one,) = program(
        f"ROOT %y = f32[64,32]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={written}, "
        "use_global_device_ids=true, to_apply=%sum",
        more=SUM,
    ).collectives
    assert one.groups[0] == first
    assert sorted(i for group in one.groups for i in group) == list(range(8))
    assert one.axes({"a": 2, "b": 4}) == axes


def test_a_device_alone_sends_nothing():
    assert not program(
        "ROOT %y = f32[64,32]{1,0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%sum",
        more=SUM,
    ).collectives


def test_a_pair_of_start_and_done_counts_once():
    found = program(
        "%s = (f32[64,32]{1,0}, f32[256,32]{1,0}) all-gather-start(%x), "
        "replica_groups=[2,4]<=[8], dimensions={0}",
        "ROOT %y = f32[256,32]{1,0} all-gather-done(%s)",
    )
    assert found.sent == 3 * SIZE
    assert found.traffic == SIZE + 4 * SIZE  # read and written, once


def test_a_wrapped_pair_counts_once():
    wrapped = """
%wrapped (p: f32[64,32]) -> f32[16,32] {
  %p = f32[64,32]{1,0} parameter(0)
  ROOT %r = f32[16,32]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%sum
}
"""
    found = program(
        "%s = ((f32[64,32]{1,0}), f32[16,32]{1,0}, u32[]) async-start(%x), calls=%wrapped",
        "ROOT %y = f32[16,32]{1,0} async-done(%s), calls=%wrapped",
        more=SUM + wrapped,
    )
    assert found.sent == 0.75 * SIZE


def test_a_collective_that_is_spread_over_fusions_counts_once():
    """As the compiler for TPUs hides one behind other work."""
    parts = "".join(
        f"""
%part.{i} (p: f32[64,32]) -> f32[256,32] {{
  %p = f32[64,32]{{1,0}} parameter(0)
  ROOT %g = f32[256,32]{{1,0}} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], \
dimensions={{0}}, frontend_attributes={{chain_id="3"}}
}}
"""
        for i in range(3)
    )
    found = program(
        *(f"%y.{i} = f32[256,32]{{1,0}} fusion(%x), kind=kCustom, calls=%part.{i}" for i in (0, 1)),
        "ROOT %y.2 = f32[256,32]{1,0} fusion(%x), kind=kCustom, calls=%part.2",
        more=parts,
    )
    assert found.sent == 3 * SIZE


def test_a_reduce_scatter_in_a_fusion():
    """As TPUs have it: an all-reduce of which each device keeps a part."""
    scatter = """
%all-reduce-scatter (p: f32[64,32]) -> f32[16,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %r = f32[64,32]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum
  %i = u32[] constant(0)
  ROOT %part = f32[16,32]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16,32}
}
"""
    found = program(
        "ROOT %y = f32[16,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        more=SUM + scatter,
    )
    assert [(x.kind, x.sent) for x in found.collectives] == [("reduce-scatter", 0.75 * SIZE)]
    assert found.traffic == SIZE + SIZE / 4


def loop(limit: str, *, known: str = "", start: str = "constant(0)", direction: str = "LT"):
    """A loop around a product and an exchange, to be put around another one."""
    more = f"""{SUM}
%body (s: (s32[], f32[32,32], s32[])) -> (s32[], f32[32,32], s32[]) {{
  %s = (s32[], f32[32,32]{{1,0}}, /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = f32[32,32]{{1,0}} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %d = f32[32,32]{{1,0}} dot(%w, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %r = f32[32,32]{{1,0}} all-reduce(%d), replica_groups={{}}, to_apply=%sum
  ROOT %t = (s32[], f32[32,32]{{1,0}}, s32[]) tuple(%next, %r, %n)
}}

%condition (s: (s32[], f32[32,32], s32[])) -> pred[] {{
  %s = (s32[], f32[32,32]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] {limit}
  ROOT %less = pred[] compare(%i, %n), direction={direction}
}}

%outer (s: (s32[], f32[32,32], s32[])) -> (s32[], f32[32,32], s32[]) {{
  %s = (s32[], f32[32,32]{{1,0}}, s32[]) parameter(0)
  %zero = s32[] {start}
  %begin = s32[] copy(%zero)
  %w = f32[32,32]{{1,0}} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %state = (s32[], f32[32,32]{{1,0}}, s32[]) tuple(%begin, %w, %n)
  ROOT %inner = (s32[], f32[32,32]{{1,0}}, s32[]) while(%state), condition=%condition, \
body=%body, metadata={{op_name="while/body=%nothing"}}{known}
}}

%never (s: (s32[], f32[32,32], s32[])) -> pred[] {{
  %s = (s32[], f32[32,32]{{1,0}}, s32[]) parameter(0)
  ROOT %no = pred[] constant(false)
}}
"""
    return program(
        "%i = s32[] constant(0)",
        "%w = f32[32,32]{1,0} constant({...})",
        "%state = (s32[], f32[32,32]{1,0}, s32[]) tuple(%i, %w, %i)",
        "ROOT %o = (s32[], f32[32,32]{1,0}, s32[]) while(%state), condition=%never, body=%outer, "
        'backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}',
        more=more,
    )


PRODUCT = 2 * 32**3


@pytest.mark.parametrize(
    ("found", "rounds"),
    [
        # Written by the compiler, as on CPUs; or read in the condition, as for TPUs.
        (loop("constant(9)", known=', backend_config={"known_trip_count":{"n":"5"}}'), 5),
        (loop("constant(9)"), 9),
        (loop("constant(9)", start="constant(2)"), 7),
    ],
)
def test_loops_are_multiplied_within_loops(found, rounds):
    assert found.flops == 3 * rounds * PRODUCT
    assert [(x.kind, x.size, x.times) for x in found.collectives] == [
        ("all-reduce", 4096, 3 * rounds)
    ]
    assert found.endless == 0


@pytest.mark.parametrize(
    "found",
    [
        loop("get-tuple-element(%s), index=2"),  # known only when it runs
        loop("constant(9)", direction="GT"),
        loop("constant(9)", start="get-tuple-element(%s), index=0"),
    ],
)
def test_loops_that_nobody_knows_count_once(found):
    assert found.flops == 3 * PRODUCT
    assert found.collectives[0].times == 3
    assert found.endless == 1


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        (
            "ROOT %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={1}",
            2 * 64 * 64 * 32,
        ),
        # TPUs have their products as convolutions.
        (
            "ROOT %y = f32[64,64]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf",
            2 * 64 * 64 * 32,
        ),
        ("ROOT %y = f32[32,32]{1,0} convolution(%x, %x), dim_labels=fb_io->bf", 2 * 32 * 32 * 64),
        # A batch of 64 products of a row and a column, as a window that only meets itself.
        (
            "ROOT %y = f32[64,1,1]{2,1,0} convolution(%r, %c), window={size=64 stride=63 "
            "pad=0_0 lhs_dilate=64}, dim_labels=0bf_0io->0bf",
            2 * 64 * 32,
        ),
        # An ordinary one: the borders meet less of the window.
        (
            "ROOT %y = f32[1,64,4]{2,1,0} convolution(%s, %k), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f",
            2 * 4 * 32 * (62 * 3 + 2 * 2),
        ),
    ],
)
def test_products(line, flops):
    given = (
        "%r = f32[64,1,32]{2,1,0} bitcast(%x)",
        "%c = f32[64,32,1]{2,1,0} bitcast(%x)",
        "%s = f32[1,64,32]{2,1,0} bitcast(%x)",
        "%k = f32[3,32,4]{2,1,0} constant({...})",
    )
    assert program(*given, line).flops == flops


def test_a_kernel_says_what_it_computes():
    (kernel,) = program(
        "ROOT %attend.7 = f32[64,32]{1,0} custom-call(%x), custom_call_target="
        '"tpu_custom_call", metadata={op_name="jit(run)/while/body/attend/pallas_call"}, '
        'backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"123",'
        '"transcendentals":"4","bytes_accessed":"5"}}}'
    ).kernels
    assert (kernel.name, kernel.flops, kernel.times) == ("attend", 123, 1)


def test_what_goes_to_and_from_memory():
    cut = """
%cut (p: f32[64,32], i: s32[]) -> f32[1,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %flat = f32[64,32]{1,0} bitcast(%p)
  %z = s32[] constant(0)
  ROOT %row = f32[1,32]{1,0} dynamic-slice(%flat, %i, %z), dynamic_slice_sizes={1,32}
}

%put (p: f32[64,32], r: f32[1,32], i: s32[]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %r = f32[1,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %u = f32[64,32]{1,0} dynamic-update-slice(%p, %r, %i, %z)
}
"""
    row, i = 32 * 4, 4
    # Reads a row and writes it; then reads it and replaces another, in place.
    found = program(
        "%i = s32[] constant(3)",
        "%row = f32[1,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%cut",
        "ROOT %y = f32[64,32]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%put",
        more=cut,
    )
    assert found.traffic == (row + i + row) + (row + i + row)
    # What is in a memory of the core costs nothing; bringing it there does.
    found = program(
        "%s = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%x)",
        "%near = f32[64,32]{1,0:T(8,128)S(1)} copy-done(%s)",
        "ROOT %y = bf16[64,32]{1,0} convert(%near)",
    )
    assert found.traffic == SIZE + SIZE / 2


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule nothing")
    with pytest.raises(ValueError, match="unknown way"):
        program("ROOT %y = f32[64,32]{1,0} all-reduce(%x), replica_groups=?, to_apply=%sum")


@functools.cache
def compiled():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, HERE / "programs_on_devices.py"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "kind", "size", "times", "sent"),
    [
        ("all-gather", "all-gather", SIZE, 1, 0.75 * SIZE),
        ("all-reduce", "all-reduce", SIZE / 4, 1, 1.5 * SIZE / 4),
        ("reduce-scatter", "reduce-scatter", SIZE, 1, 0.75 * SIZE),
        ("all-to-all", "all-to-all", SIZE / 4, 1, 0.75 * SIZE / 4),
        ("ring", "collective-permute", SIZE / 4, 5, 5 * SIZE / 4),
    ],
)
def test_collectives_of_this_compiler(name, kind, size, times, sent):
    assert compiled()[name]["collectives"] == [[kind, ["b"], size, times, sent]]


def test_axes_of_this_compiler():
    ((kind, axes, size, _, sent),) = compiled()["both axes"]["collectives"]
    assert (kind, axes, size, sent) == ("all-reduce", ["a", "b"], 128, 2 * 7 / 8 * 128)


def test_loops_of_this_compiler():
    product = 2 * 16 * 64 * 64
    assert compiled()["layers"]["flops"] == 7 * product
    assert compiled()["nested"]["flops"] == 3 * 7 * product
    assert compiled()["nested"]["endless"] == 0
    # Reads all matrices at least, and little more: not all of them in every round.
    matrices = 7 * 64 * 64 * 4
    assert matrices < compiled()["layers"]["traffic"] < 6 * matrices
    assert compiled()["while"]["flops"] == 2 * 8**3
    assert compiled()["while"]["endless"] == 1
    # Half of the rows here: forward, and backward for inputs and matrices but the first input.
    assert compiled()["gradient"]["flops"] == (7 + 7 + 7) * product / 2
