"""What a compiled program says of itself: what it computes, moves and sends, loops included.

XLA's own `cost_analysis` counts the body of a loop once, and a scan over layers is a loop: its
figures are a fraction of the truth. Here the text of the optimised program (`compiled.as_text()`)
is read, and bodies are multiplied with how often they run. Nothing here imports jax.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# What of an array of n devices' parts goes over the links of one device, as ring algorithms have
# it: of the whole array for the first four, of what a device gives for the last two.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}

# These move nothing by themselves.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "optimization-barrier",
        "copy-done",
        "async-start",
        "async-update",
        "async-done",
        "domain",
    )
)
_KERNEL = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Devices that exchange something, in a step.

    - `kind`: as XLA names it, without `-start`.
    - `size`: bytes of the whole array for `all-gather`, `all-reduce`, `reduce-scatter` and
        `all-to-all`; of what a device gives away otherwise.
    - `groups`: of devices that exchange, each a row; a pair of source and target per row for
        `collective-permute`.
    - `times`: that it is carried out in a step.
    """

    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...]
    times: int

    @property
    def devices(self) -> int:
        """In a group."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by the ring algorithms: `2 (n - 1) / n` of the array
        for `all-reduce`, `(n - 1) / n` for `all-gather`, `reduce-scatter` and `all-to-all`."""
        return self.times * self.size * _SENT[self.kind](self.devices)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ.

        **Arguments:**

        - `mesh`: devices along each axis, outermost first, as `Mesh.shape` has them.
        """
        places = np.stack(np.unravel_index(np.asarray(self.groups), tuple(mesh.values())), axis=-1)
        differ = (places != places[:, :1]).any(axis=(0, 1))
        return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel written by hand, which XLA cannot look into.

    - `flops`: of one call, as the kernel estimates them; 0 if it says nothing.
    - `times`: that it is called in a step.
    """

    name: str
    flops: int
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does in one call of a program.

    - `flops`: of matrix products and convolutions, those inside of kernels excluded.
    - `traffic`: bytes read from and written to the device's memory: an estimate, the operands and
        results of each instruction, fusions counted as one. What lies in a memory of the core and
        not in the large one is not counted; what a kernel reads again is not known.
    - `collectives`, `kernels`: with how often each is carried out.
    - `endless`: loops whose number of rounds the program does not say. Their bodies count once.
    """

    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    endless: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others."""
        return sum(each.sent for each in self.collectives)


def read_program(text: str) -> Program:
    """Reads the text of an optimised program, `jax.stages.Compiled.as_text()`.

    **Raises:** `ValueError` if it is no such text.
    """
    module = _Module(text)
    tally = module.tally(module.entry)
    return Program(
        tally.flops,
        tally.traffic,
        tuple(tally.collectives),
        tuple(tally.kernels),
        len(tally.endless),
    )


# --- the text ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Array:
    dims: tuple[int, ...]
    bits: int
    far: bool  # in the device's large memory, and not in one of the core's

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.dims) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    inside: str  # of the parentheses, which of a parameter or constant say what it is
    attributes: str
    root: bool

    @functools.cached_property
    def results(self) -> tuple[_Array, ...]:
        return tuple(_arrays(self.type))

    @property
    def kind(self) -> str:
        """The opcode without saying that it only starts."""
        return self.opcode.removesuffix("-start")

    def called(self, *names: str) -> list[str]:
        """The computations under any of the attributes."""
        found = []
        for name in names:
            for one, several in re.findall(rf"\b{name}=(?:%?([\w.\-]+)|{{([^}}]*)}})", self._plain):
                found += [one] if one else re.findall(r"[\w.\-]+", several)
        return found

    @functools.cached_property
    def _plain(self) -> str:
        """The attributes up to what only people and backends read, where there may be anything."""
        return re.split(r", (?:metadata|backend_config|frontend_attributes)=", self.attributes)[0]

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found and found[1]

    def own(self, pattern: str) -> str | None:
        found = re.search(pattern, self._plain)
        return found and found[1]


def _arrays(type_: str) -> Iterator[_Array]:
    for kind, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?", type_):
        bits = re.search(r"\d+", kind)
        size = 8 if kind == "pred" else int(bits[0]) if bits else 0  # tokens have none
        sizes = tuple(int(re.sub(r"\D", "", dim)) for dim in dims.split(",") if dim)
        space = re.search(r"S\((\d+)\)", layout)
        # 0 is the device's large memory, 5 the host's: both are far.
        yield _Array(sizes, size, space is None or space[1] in "05")


def _balanced(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "({") - (text[at] in ")}")
        if depth == 0:
            return at + 1
    raise ValueError(f"no end to {text[start : start + 40]!r}")


_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


def _instruction(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _balanced(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    opcode = rest[:opening]
    operands = [] if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", inside)
    return _Instruction(
        name, opcode, type_, tuple(operands), inside, rest[closing:], root is not None
    )


class _Computation:
    def __init__(self, name: str):
        self.name = name
        self.instructions: dict[str, _Instruction] = {}

    @property
    def root(self) -> _Instruction:
        return next(each for each in self.instructions.values() if each.root)

    def parameters(self) -> list[_Instruction]:
        given = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(given, key=lambda each: int(each.inside))

    def operands(self, instruction: _Instruction) -> list[_Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def users(self, name: str) -> Iterator[_Instruction]:
        """Those that use a value, looking through changes of shape."""
        for each in self.instructions.values():
            if name in each.operands:
                if each.opcode in ("bitcast", "reshape"):
                    yield from self.users(each.name)
                else:
                    yield each


# --- what it costs -------------------------------------------------------------------------------


@dataclasses.dataclass
class _Tally:
    """Of one execution of a computation."""

    flops: float = 0.0
    traffic: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    endless: set[str] = dataclasses.field(default_factory=set)
    # Collectives that are spread over several fusions, which hide them behind other work.
    chains: dict[str, Collective] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Tally", times: int = 1) -> None:
        self.flops += times * other.flops
        self.traffic += times * other.traffic
        self.collectives += [
            dataclasses.replace(x, times=times * x.times) for x in other.collectives
        ]
        self.kernels += [dataclasses.replace(x, times=times * x.times) for x in other.kernels]
        self.endless |= other.endless

    def close(self) -> None:
        self.collectives += self.chains.values()
        self.chains = {}


class _Module:
    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        devices = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
        self._devices = int(devices[1]) if devices else 1
        self._known: dict[str, _Tally] = {}
        current = None
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations[opened[2]] = _Computation(opened[2])
                if opened[1]:
                    self.entry = opened[2]
            elif current is not None and (found := _instruction(line)):
                current.instructions[found.name] = found
            elif line.startswith("}"):
                current = None
        if not self.entry:
            raise ValueError("this is no text of a compiled program: it has no ENTRY")

    def tally(self, name: str) -> _Tally:
        """Of a computation that is carried out instruction by instruction."""
        if name not in self._known:
            computation, tally = self.computations[name], _Tally()
            for each in computation.instructions.values():
                self._count(tally, computation, each)
            tally.close()
            self._known[name] = tally
        return self._known[name]

    def _count(self, tally: _Tally, computation: _Computation, each: _Instruction) -> None:
        operands = computation.operands(each)
        if each.opcode == "while":
            rounds = self._rounds(computation, each)
            if rounds is None:
                tally.endless.add(each.name)
            (body,) = each.called("body")
            tally.add(self.tally(body), 1 if rounds is None else rounds)
        elif each.opcode == "conditional":
            names = each.called("branch_computations", "true_computation", "false_computation")
            branches = [self.tally(name) for name in names]
            tally.add(max(branches, key=lambda branch: (branch.flops, branch.traffic)))
        elif each.opcode in ("call", "async-start"):
            for called in each.called("to_apply", "calls", "called_computations"):
                tally.add(self.tally(called))
        elif each.kind in _SENT and not each.opcode.endswith("-done"):
            tally.collectives += self._collectives(computation, each)
        elif each.opcode == "fusion":
            (called,) = each.called("calls")
            self._look_into(tally, called)
            tally.traffic += self._fusion_traffic(each, called, operands)
            return
        tally.flops += _flops(each, operands)
        if each.opcode == "custom-call":
            target = each.attribute(r'custom_call_target="([^"]*)"')
            if target == _KERNEL:
                tally.kernels.append(_kernel(each))
            elif target == "AllocateBuffer":
                return
        if each.opcode not in _FREE and not each.opcode.endswith("-done"):
            tally.traffic += _traffic(each, operands)

    def _look_into(self, tally: _Tally, name: str) -> None:
        """What matters inside of a fusion, besides what it reads and writes."""
        computation = self.computations[name]
        for each in computation.instructions.values():
            if each.opcode == "fusion":
                self._look_into(tally, each.called("calls")[0])
            elif each.opcode in _SENT:
                for found in self._collectives(computation, each):
                    # A reduce-scatter is an all-reduce of which each device keeps a part.
                    if each.kind == "all-reduce" and computation.root.opcode == "dynamic-slice":
                        found = dataclasses.replace(found, kind="reduce-scatter")
                    chain = each.attribute(r'chain_id="(\d+)"')
                    if chain is None:
                        tally.collectives.append(found)
                    else:
                        tally.chains[chain] = found
            tally.flops += _flops(each, computation.operands(each))

    def _collectives(self, computation: _Computation, each: _Instruction) -> list[Collective]:
        groups = _groups(each.attributes, self._devices)
        if not groups or len(groups[0]) < 2:
            return []
        size = sum(x.bytes for operand in computation.operands(each) for x in operand.results)
        if each.kind == "all-gather":
            size *= len(groups[0])
        return [Collective(each.kind, size, groups, 1)]

    def _rounds(self, computation: _Computation, loop: _Instruction) -> int | None:
        """How often a loop goes round, if the program says it."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known is not None:
            return int(known)
        # Else from the condition, counter < constant. jax's scans count from 0 in ones.
        condition = self.computations[loop.called("condition")[0]]
        test, operands = condition.root, condition.operands(condition.root)
        direction = test.own(r"direction=(\w+)")
        if test.opcode == "fusion":
            inner = self.computations[test.called("calls")[0]].root
            direction = inner.own(r"direction=(\w+)") if inner.opcode == "compare" else None
        if direction != "LT" or len(operands) != 2:
            return None
        counter, limit = operands
        index = counter.own(r"index=(\d+)")
        if counter.opcode != "get-tuple-element" or index is None or limit.opcode != "constant":
            return None
        first = _start(computation, loop, int(index))
        return None if first is None else max(int(limit.inside) - first, 0)

    def _fusion_traffic(
        self, fusion: _Instruction, called: str, operands: Sequence[_Instruction]
    ) -> int:
        computation = self.computations[called]
        total = 0
        for parameter, operand in zip(computation.parameters(), operands, strict=True):
            total += _read(computation, parameter, operand)
        return total + _written(computation, fusion)


def _start(computation: _Computation, loop: _Instruction, index: int) -> int | None:
    """What an element of a loop's state is at first."""
    state = computation.instructions[loop.operands[0]]
    while state.opcode in ("optimization-barrier", "copy"):
        state = computation.instructions[state.operands[0]]
    if state.opcode != "tuple":
        return None
    at = computation.instructions[state.operands[index]]
    while at.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        at = computation.instructions[at.operands[0]]
    if at.opcode == "constant":
        return int(at.inside)
    # A zero that has become a fusion of its own, such as a broadcast of it.
    return 0 if at.opcode in ("fusion", "broadcast") else None


def _far(arrays: Sequence[_Array]) -> int:
    return sum(x.bytes for x in arrays if x.far)


def _traffic(each: _Instruction, operands: Sequence[_Instruction]) -> int:
    """Of an instruction by itself."""
    given = [_far(x.results) for x in operands]
    out = _far(each.results)
    if each.opcode in ("dynamic-slice", "slice", "gather"):  # reads no more than what it gives
        return out + min(given[0], sum(x.bytes for x in each.results)) + sum(given[1:])
    if each.opcode == "dynamic-update-slice":  # in place
        return 2 * given[1]
    if each.opcode == "copy-start":  # of (to, from, context)
        return given[0] + _far(each.results[:1])
    if each.opcode.endswith("-start"):  # the operands are among the results
        return max(out, given[0])
    if each.opcode == "iota":
        return out
    return sum(given) + out


def _read(computation: _Computation, parameter: _Instruction, operand: _Instruction) -> int:
    """Bytes that a fusion reads of an operand: all, or the parts that it cuts out."""
    whole = _far(operand.results)
    parts = 0
    for user in computation.users(parameter.name):
        first = computation.instructions[user.operands[0]]
        while first.opcode in ("bitcast", "reshape"):
            first = computation.instructions[first.operands[0]]
        if first.name == parameter.name and user.opcode in ("dynamic-slice", "slice", "gather"):
            parts += sum(x.bytes for x in user.results)
        elif first.name != parameter.name or user.opcode != "dynamic-update-slice":
            return whole
    return min(whole, parts)


def _written(computation: _Computation, fusion: _Instruction) -> int:
    """Bytes that a fusion writes: all, or the parts that it replaces."""
    root = computation.root
    outs = [root] if root.opcode != "tuple" else computation.operands(root)
    total = 0
    for out, array in zip(outs, fusion.results, strict=False):
        while out.opcode in ("bitcast", "reshape", "convert"):
            out = computation.instructions[out.operands[0]]
        if array.far and out.opcode == "dynamic-update-slice":
            total += sum(x.bytes for x in computation.instructions[out.operands[1]].results)
        else:
            total += array.bytes if array.far else 0
    return total


def _kernel(each: _Instruction) -> Kernel:
    # The name that pallas_call was given is in the path of where it was called.
    path = each.attribute(r'op_name="([^"]*)"') or each.name
    parts = path.split("/")
    name = parts[-2] if parts[-1] == "pallas_call" and len(parts) > 1 else each.name
    flops = each.attribute(r'"cost_estimate":\{"flops":"(-?\d+)"')
    return Kernel(name, max(int(flops or 0), 0), 1)


def _flops(each: _Instruction, operands: Sequence[_Instruction]) -> float:
    if each.opcode == "dot":
        (out,), (left,) = each.results, operands[0].results
        over = (each.own(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
        return 2.0 * math.prod(out.dims) * math.prod(left.dims[int(i)] for i in over if i)
    if each.opcode == "convolution":
        return _convolution_flops(each, *(x.results[0] for x in operands[:2]))
    if each.opcode == "custom-call" and "matmul" in (each.own(r'target="([^"]*)"') or ""):
        (out, *_), (left,), (right,) = each.results, operands[0].results, operands[1].results
        batch = math.prod(out.dims[:-2])
        over = math.isqrt(
            math.prod(left.dims) * math.prod(right.dims) // (math.prod(out.dims) * batch)
        )
        return 2.0 * math.prod(out.dims) * over
    return 0.0


def _convolution_flops(each: _Instruction, left: _Array, right: _Array) -> float:
    """TPUs have their matrix products as convolutions, with a batch as a dilated window."""
    labels = each.own(r"dim_labels=([^,\s]*)") or ""
    of_left, of_right, of_out = re.split(r"_|->", labels)
    (out, *_) = each.results
    flops = 2.0
    for letter in "bf":
        flops *= out.dims[of_out.index(letter)]
    flops *= right.dims[of_right.index("i")]
    window = each.own(r"window=\{([^}]*)\}") or ""

    def of(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=(\S+)", window)
        count = sum(letter.isdigit() for letter in of_out)
        return found[1].split("x") if found else [default] * count

    sizes = of("size", "1")
    for axis, size in enumerate(sizes):
        pad = int(of("pad", "0_0")[axis].split("_")[0])
        stride, left_dilate, right_dilate = (
            int(of(name, "1")[axis]) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        at = np.arange(out.dims[of_out.index(str(axis))])[:, None] * stride - pad
        at = at + np.arange(int(size)) * right_dilate
        last = (left.dims[of_left.index(str(axis))] - 1) * left_dilate
        flops *= int(np.sum((at >= 0) & (at <= last) & (at % left_dilate == 0)))
    return flops / int(each.own(r"batch_group_count=(\d+)") or 1)


# --- who exchanges -------------------------------------------------------------------------------


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, in any of the ways that they are written in."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        found = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return tuple((int(a), int(b)) for a, b in found if a != b)
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        found = re.findall(r"\{([\d,]+)\}", listed[1])
        groups = tuple(tuple(int(i) for i in each.split(",")) for each in found)
        return groups or (tuple(range(devices)),)
    if counted := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        ids = _counted(counted[2], counted[3])
        return _rows(ids.reshape(_numbers(counted[1])))
    if named := re.search(
        r"replica_groups=@?mesh(?:\[(.*?)\]|<(.*?)>)"
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{(.*?)\}",
        attributes,
    ):
        sizes = {
            name: int(size)
            for name, size in re.findall(r"['\"]?(\w+)['\"]?=(\d+)", named[1] or named[2])
        }
        shape = tuple(sizes.values())
        ids = np.arange(math.prod(shape))
        if named[3]:
            ids = _counted(named[3], named[4])
        return _along(ids.reshape(shape), list(sizes), named[5])
    raise ValueError(f"who exchanges in {attributes[:200]!r} is written in an unknown way")


def _along(ids: np.ndarray, names: Sequence[str], axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a grid, given as `'a','b':(1)2`: of an axis a factor, behind the product
    of those before it."""
    shape: list[int] = []
    along: list[bool] = []
    wanted = re.findall(r"['\"]?(\w+)['\"]?(?::\((\d+)\)(\d+))?", axes)
    for name, size in zip(names, ids.shape, strict=True):
        parts = {(int(a), int(b)) for axis, a, b in wanted if axis == name and a}
        if any(axis == name and not a for axis, a, _ in wanted):
            parts = {(1, size)}
        done = 1
        for before, factor in sorted(parts):
            shape += [before // done, factor]
            along += [False, True]
            done = before * factor
        shape.append(size // done)
        along.append(False)
    ids = ids.reshape(shape)
    order = [i for i, x in enumerate(along) if not x] + [i for i, x in enumerate(along) if x]
    count = math.prod(size for size, x in zip(shape, along, strict=True) if x)
    return _rows(ids.transpose(order).reshape(-1, count))


def _counted(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(i) for i in text.split(","))


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in row) for row in ids)
