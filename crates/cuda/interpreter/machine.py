"""Executes PTX: warps are coroutines, the 32 lanes of a register a numpy array.

What a kernel may not rely on is chosen at random: the order of the warps of
blocks that run together, and when bulk copies arrive. Accesses out of bounds, reads of global
memory that nobody wrote, deadlocks, and synchronisation that not all lanes
reach are errors.
"""

import numpy as np

from arithmetic import ARITHMETIC, LANES, from_type, fused_multiply_add, to_type
from matrix_units import multiply_fragments, multiply_shared
from ptx import Address, Immediate, Register, Symbol, UnknownInstruction, Vector

WARP = 32
ALL_LANES = np.ones(WARP, bool)
# What a register or memory holds that nobody has written.
POISON_REGISTER = np.full(WARP, 0xDEAD_BEEF, np.uint64)
POISON_SHARED = 0xCD
POISON_GLOBAL = 0xAA
# Where dynamic shared memory begins; below it nothing may be accessed.
SHARED_BASE = 1024
# Where the rank of a block in its cluster, plus one, stands in shared addresses of the cluster.
CLUSTER_SHIFT = 24
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class KernelError(Exception):
    """The kernel did what no kernel may do."""


def need(condition, what):
    if not condition:
        raise KernelError(what)


class Memory:
    """Global memory. Allocations are 256 bytes or more apart."""

    def __init__(self, n_bytes):
        self.data = np.zeros(n_bytes, np.uint8)
        self.allocated = np.zeros(n_bytes, bool)
        self.written = np.zeros(n_bytes, bool)
        self.end = 4096

    def reserve(self, n_bytes):
        """Address of memory that nobody has written."""
        address = (self.end + 255) // 256 * 256
        self.end = address + n_bytes + 256
        assert self.end <= len(self.data), "more memory is needed for this case"
        self.allocated[address : address + n_bytes] = True
        self.data[address : address + n_bytes] = POISON_GLOBAL
        return address

    def upload(self, array):
        """Address of a copy of the array."""
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        address = self.reserve(len(data))
        self.write(address, data)
        return address

    def write(self, address, array):
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.data[address : address + len(data)] = data
        self.written[address : address + len(data)] = True

    def read(self, address, n, dtype):
        n_bytes = n * np.dtype(dtype).itemsize
        return self.data[address : address + n_bytes].view(dtype).copy()

    def is_written(self, address, n_bytes):
        return bool(self.written[address : address + n_bytes].all())


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self, count):
        self.count = self.pending = count
        self.n_bytes = 0
        self.phase = 0

    def update(self, arrivals, n_bytes):
        self.pending -= arrivals
        self.n_bytes += n_bytes
        need(self.pending >= 0, "more arrivals at an mbarrier than it expects")
        if self.pending == 0 and self.n_bytes == 0:
            self.phase += 1
            self.pending = self.count


class Block:
    def __init__(self, index, grid, n_threads, n_shared, params):
        self.index, self.grid, self.n_threads = index, grid, n_threads
        self.params = params
        self.shared = np.full(SHARED_BASE + n_shared, POISON_SHARED, np.uint8)
        self.barriers = {}
        # Blocks of the same cluster, by rank.
        self.cluster = [self]
        # Bulk copies on their way: (to, global address or the bytes themselves, how many, barrier).
        self.copies = []
        # Number of bar.sync so far; see RaceCheck.
        self.n_syncs = 0

    def barrier(self, address):
        need(address in self.barriers, f"no mbarrier at shared address {address}")
        return self.barriers[address]


class RaceCheck:
    """Finds accesses to shared memory that no bar.sync or bar.warp.sync orders.

    For kernels that synchronise by these alone. Of each byte it knows the last
    write and the last read: by which thread, and at which time of its warp and
    of its block.
    """

    def __init__(self, n_bytes):
        self.last = {
            write: np.full((n_bytes, 3), -1, np.int64) for write in (False, True)
        }

    def access(self, warp, instruction, index, lanes, write):
        """`index`: of the bytes, a row for each lane."""
        threads = np.broadcast_to((warp.number * WARP + lanes)[:, None], index.shape)
        for earlier_write in (True, False) if write else (True,):
            thread, warp_time, block_time = np.moveaxis(
                self.last[earlier_write][index], -1, 0
            )
            clash = (thread >= 0) & (thread != threads)
            clash &= block_time >= warp.block.n_syncs
            clash &= (thread // WARP != warp.number) | (warp_time >= warp.n_syncs)
            need(not clash.any(), f"race in shared memory at `{instruction.text}`")
        record = self.last[write]
        record[index, 0] = threads
        record[index, 1] = warp.n_syncs
        record[index, 2] = warp.block.n_syncs


# Chances that a warp that could go on does.
PACES = (1.0, 1.0, 0.3, 0.05)


class Machine:
    """A GPU with its memory, executing a few blocks after others."""

    def __init__(self, memory, rng, check_races=False):
        self.memory, self.rng = memory, rng
        self.check_races = check_races

    def launch(self, kernel, grid, n_threads, n_shared, params, together=1, cluster=1):
        """`grid`: blocks in x and y; `together`: blocks in x that run at the same time; `cluster`: those of a cluster."""
        if kernel.handlers is None:
            kernel.handlers = [find_handler(i) for i in kernel.code]
        for y in range(grid[1]):
            for x in range(0, grid[0], together):
                blocks = [
                    Block((x + i, y), grid, n_threads, n_shared, params)
                    for i in range(together)
                ]
                for i, block in enumerate(blocks):
                    first = i // cluster * cluster
                    block.cluster = blocks[first : first + cluster]
                try:
                    self._run_together(kernel, blocks)
                except KernelError as error:
                    raise KernelError(f"{kernel.name}: {error}") from None

    def _run_together(self, kernel, blocks):
        warps = []
        for block in blocks:
            races = RaceCheck(len(block.shared)) if self.check_races else None
            n_warps = block.n_threads // WARP
            warps += [Warp(self, kernel, block, n, races) for n in range(n_warps)]
        # Some warps are much slower than others.
        for warp in warps:
            warp.pace = self.rng.choice(PACES)
        idle = 0
        while warps:
            progress = False
            for i in self.rng.permutation(len(warps)):
                warp = warps[i]
                ready = warp.state == "ready"
                if ready and self.rng.random() > warp.pace:
                    progress = True
                else:
                    progress |= warp.step()
            if self.rng.random() < 0.5 or not progress:
                progress |= self._deliver_copy(blocks)
            warps = [warp for warp in warps if warp.state != "ended"]
            progress |= self._release(warps)
            idle = 0 if progress else idle + 1
            states = sorted({warp.state for warp in warps})
            need(idle < 5, f"deadlock: warps wait at {', '.join(states)}")

    def _deliver_copy(self, blocks):
        """Lets one bulk copy arrive, any."""
        on_their_way = [block for block in blocks if block.copies]
        if not on_their_way:
            return False
        block = on_their_way[self.rng.integers(len(on_their_way))]
        to, source, n_bytes, barrier = block.copies.pop(
            self.rng.integers(len(block.copies))
        )
        memory = self.memory
        if not isinstance(source, np.ndarray):
            source = memory.data[source : source + n_bytes]
        block.shared[to : to + n_bytes] = source
        barrier.update(0, -n_bytes)
        return True

    def _release(self, warps):
        """Lets warps go on that wait for each other and are all there."""
        groups = {}
        for warp in warps:
            groups.setdefault(("block", warp.block.index), []).append(warp)
            first = warp.block.cluster[0].index
            groups.setdefault(("cluster", first), []).append(warp)
            name = ("warpgroup", warp.block.index, warp.number // 4)
            groups.setdefault(name, []).append(warp)
        released = False
        for (kind, *_), group in groups.items():
            waiting = [warp for warp in group if warp.state == kind]
            if kind == "warpgroup" and waiting:
                need(len(group) == 4, "a wgmma that not all four warps reach")
            if waiting and len(waiting) == len(group):
                for warp in group:
                    warp.state = "ready"
                if kind == "block":
                    group[0].block.n_syncs += 1
                released = True
        return released


class Warp:
    """32 threads. `state`: "ready", "polling", "ended", or what it waits for:
    all warps of its "block", its "cluster" or its "warpgroup"."""

    def __init__(self, machine, kernel, block, number, races):
        self.machine, self.kernel, self.block = machine, kernel, block
        self.number, self.races = number, races
        self.state = "ready"
        # Number of bar.warp.sync so far.
        self.n_syncs = 0
        # Copies by cp.async: the open group and those committed.
        self.open_copies, self.copy_groups = [], []
        # The same of wgmma.
        self.open_products, self.product_groups = [], []
        x, y = block.index

        def constant(n):
            return np.full(WARP, n, np.uint64)

        self.registers = {
            "%tid.x": LANES + np.uint64(WARP * number),
            "%laneid": LANES,
            "%ntid.x": constant(block.n_threads),
            "%ctaid.x": constant(x),
            "%ctaid.y": constant(y),
            "%nctaid.x": constant(block.grid[0]),
            "%nctaid.y": constant(block.grid[1]),
        }
        self.coroutine = self._run()

    def step(self):
        """Runs until it has to wait; whether that was of use."""
        if self.state not in ("ready", "polling"):
            return False
        self.state = next(self.coroutine, "ended")
        return self.state != "polling"

    def _run(self):
        code, handlers, labels = (
            self.kernel.code,
            self.kernel.handlers,
            self.kernel.labels,
        )
        # Lanes that stand at an instruction. Those furthest back go first, so
        # that lanes that parted meet again; at a bar.warp.sync they wait for all.
        standing, waiting = {0: ALL_LANES}, {}

        def add(at, lanes):
            if at < len(code) and lanes.any():
                standing[at] = standing[at] | lanes if at in standing else lanes

        while standing:
            at = min(standing)
            lanes = standing.pop(at)
            while at < len(code):
                instruction, active = code[at], lanes
                if instruction.guard:
                    guard = self.registers[instruction.guard]
                    active = lanes & (~guard if instruction.negated else guard)
                operation = instruction.parts[0]
                if operation == "bar" and "warp" in instruction.parts:
                    active = lanes = lanes | waiting.pop(at, ~ALL_LANES)
                    if not lanes.all() and standing:
                        waiting[at] = lanes
                        break
                if operation == "bra":
                    add(labels[instruction.operands[0].name], active)
                    add(at + 1, lanes & ~active)
                    break
                if operation == "ret":
                    add(at + 1, lanes & ~active)
                    break
                if active.any():
                    wait = handlers[at](self, instruction, active)
                    if wait:
                        yield wait
                at += 1
                if standing and min(standing) <= at:
                    add(at, lanes)
                    break
        need(not waiting, "not all lanes reach a bar.warp.sync")

    def value(self, operand):
        """Bits of a register or constant, in 64 of each lane; of a predicate, bools."""
        if isinstance(operand, Register):
            # Code may move what it never uses.
            return self.registers.get(operand.name, POISON_REGISTER)
        if isinstance(operand, Immediate):
            return np.full(WARP, operand.value, np.uint64)
        assert isinstance(operand, Symbol), operand
        # Addresses of parameters are offsets; there is one symbol in shared memory.
        address = 0 if "_param_" in operand.name else SHARED_BASE
        return np.full(WARP, address, np.uint64)

    def predicate(self, operand):
        value = self.value(operand)
        return value if value.dtype == bool else value != 0

    def set(self, operand, value, active):
        old = self.registers.get(operand.name)
        if not active.all():
            if old is None:
                old = np.zeros_like(value) if value.dtype == bool else POISON_REGISTER
            value = np.where(active, value, old)
        self.registers[operand.name] = value

    def address(self, operand):
        return self.value(operand.base).astype(np.int64) + operand.offset

    def access(self, space, address, n_bytes, active, instruction, write):
        """The bytes of an access: the memory and, a row for each lane, their indices."""
        address = address[active]
        text = instruction.text
        need((address % n_bytes == 0).all(), f"misaligned: `{text}`")
        if space == "shared":
            address = address & 0xFFFF_FFFF
            data = self.block.shared
            inside = (address >= SHARED_BASE) & (address + n_bytes <= len(data))
            need(inside.all(), f"beyond shared memory: `{text}`")
        else:
            memory = self.machine.memory
            data = memory.data
            inside = (address >= 0) & (address + n_bytes <= len(data))
            need(inside.all(), f"beyond global memory: `{text}`")
        index = address[:, None] + np.arange(n_bytes)
        if space == "global":
            need(memory.allocated[index].all(), f"out of bounds: `{text}`")
            if write:
                memory.written[index] = True
            else:
                need(memory.written[index].all(), f"read before written: `{text}`")
        elif self.races:
            lanes = np.nonzero(active)[0]
            self.races.access(self, instruction, index, lanes, write)
        return data, index


def _items(operand):
    return operand.items if isinstance(operand, Vector) else (operand,)


def _lanes_of(active):
    return np.nonzero(active)[0]


def _need_all(active, instruction):
    need(active.all(), f"not all lanes reach `{instruction.text}`")


# Operations that are more than arithmetic: (name, all modifiers it may have) -> handler.
OPERATIONS = {}


def operation(name, modifiers=""):
    def register(handler):
        OPERATIONS.setdefault(name, []).append((set(modifiers.split()), handler))
        return handler

    return register


def find_handler(instruction):
    name, *modifiers = instruction.parts
    if name in ("bra", "ret") and set(modifiers) <= {"uni"}:
        return None
    for allowed, handler in OPERATIONS.get(name, []):
        if set(modifiers) <= allowed:
            return handler
    if name in ARITHMETIC and set(modifiers) <= ARITHMETIC[name].modifiers:
        return arithmetic
    raise UnknownInstruction(f"`{instruction.text}`: the interpreter does not know it")


def arithmetic(warp, instruction, active):
    entry = ARITHMETIC[instruction.parts[0]]
    types = entry.argument_types(instruction)
    arguments = [
        to_type(warp.predicate(o) if t == "pred" else warp.value(o), t)
        for o, t in zip(instruction.operands[1:], types, strict=True)
    ]
    with np.errstate(all="ignore"):
        result = entry.function(instruction, *arguments)
    result = from_type(result, entry.result_type(instruction))
    warp.set(instruction.operands[0], result, active)


@operation("mov", "b16 b32 b64 u16 u32 u64 f32 pred")
def move(warp, instruction, active):
    to, source = instruction.operands
    if instruction.type == "pred":
        warp.set(to, warp.predicate(source), active)
        return
    n_bits = 8 * _type_bytes(instruction.type)
    if isinstance(to, Vector):
        part = n_bits // len(to.items)
        value = warp.value(source)
        for i, item in enumerate(to.items):
            bits = value >> np.uint64(part * i) & np.uint64((1 << part) - 1)
            warp.set(item, bits, active)
        return
    items = _items(source)
    part = n_bits // len(items)
    value = np.zeros(WARP, np.uint64)
    for i, item in enumerate(items):
        bits = warp.value(item) & np.uint64((1 << part) - 1)
        value |= bits << np.uint64(part * i)
    warp.set(to, value, active)


@operation("cvt", "rn f16x2 f32")
def convert_pair(warp, instruction, active):
    to, high, low = instruction.operands
    with np.errstate(all="ignore"):
        high, low = (from_type(to_type(warp.value(o), "f32"), "f16") for o in (high, low))
    warp.set(to, high << np.uint64(16) | low, active)


@operation("fma", "rn f16x2")
def multiply_add_pairs(warp, instruction, active):
    to, *arguments = instruction.operands
    result = np.zeros(WARP, np.uint64)
    for shift in (np.uint64(0), np.uint64(16)):
        halves = [to_type(warp.value(o) >> shift, "f16") for o in arguments]
        with np.errstate(all="ignore"):
            result |= from_type(fused_multiply_add(*halves), "f16") << shift
    warp.set(to, result, active)


@operation("cvta", "to global param u64")
def convert_address(warp, instruction, active):
    to, source = instruction.operands
    warp.set(to, warp.value(source), active)


def _type_bytes(name):
    return BYTES[name.lstrip("bsuf")]


MEMORY_MODIFIERS = (
    "acquire release gpu global shared nc cg cs L1::no_allocate v2 v4 u8 u16 u32 u64 b8 b16 b32 b64 f32"
)


@operation("ld", "param v2 v4 u8 u16 u32 u64 b8 b16 b32 b64 f32")
def load_param(warp, instruction, active):
    to, source = instruction.operands
    n_bytes = _type_bytes(instruction.type)
    addresses = warp.address(source)
    for i, item in enumerate(_items(to)):
        value = np.zeros(WARP, np.uint64)
        # Most often one; a segment's is its lane's own.
        for at in np.unique(addresses[active]):
            start = int(at) + i * n_bytes
            data = warp.block.params[start : start + n_bytes]
            need(len(data) == n_bytes, f"beyond the parameters: `{instruction.text}`")
            value[addresses == at] = int.from_bytes(data, "little")
        warp.set(item, value, active)


@operation("ld", MEMORY_MODIFIERS)
def load(warp, instruction, active):
    to, source = instruction.operands
    items, n_bytes = _items(to), _type_bytes(instruction.type)
    data, index = warp.access(
        instruction.parts[1],
        warp.address(source),
        n_bytes * len(items),
        active,
        instruction,
        False,
    )
    raw = data[index]
    for i, item in enumerate(items):
        padded = np.zeros((len(raw), 8), np.uint8)
        padded[:, :n_bytes] = raw[:, i * n_bytes : (i + 1) * n_bytes]
        value = np.zeros(WARP, np.uint64)
        value[active] = padded.view(np.uint64)[:, 0]
        warp.set(item, value, active)
    # It may ask again and again: others go on meanwhile.
    return "ready" if "acquire" in instruction.parts else None


@operation("st", MEMORY_MODIFIERS)
def store(warp, instruction, active):
    to, source = instruction.operands
    items, n_bytes = _items(source), _type_bytes(instruction.type)
    data, index = warp.access(
        instruction.parts[1],
        warp.address(to),
        n_bytes * len(items),
        active,
        instruction,
        True,
    )
    for i, item in enumerate(items):
        value = np.ascontiguousarray(warp.value(item)[active])
        raw = value.view(np.uint8).reshape(-1, 8)[:, :n_bytes]
        data[index[:, i * n_bytes : (i + 1) * n_bytes]] = raw


ATOMIC = {"min": min, "add": lambda old, new: old + new, "or": lambda old, new: old | new}


@operation("atom", "global min u64")
@operation("atom", "acq_rel gpu global add or u32 b32")
def atomic(warp, instruction, active):
    to, place, operand = instruction.operands
    address, new = warp.address(place), warp.value(operand)
    combine = next(ATOMIC[part] for part in instruction.parts if part in ATOMIC)
    kind = np.uint64 if "u64" in instruction.parts else np.uint32
    n_bytes = np.dtype(kind).itemsize
    old = np.zeros(WARP, np.uint64)
    data, index = warp.access("global", address, n_bytes, active, instruction, False)
    for lane, where in zip(_lanes_of(active), index):
        cell = data[where[0] : where[0] + n_bytes].view(kind)
        old[lane] = cell[0]
        cell[0] = combine(cell[0], kind(new[lane]))
    warp.set(to, old, active)


@operation("griddepcontrol", "wait launch_dependents")
@operation("createpolicy", "fractional L2::evict_first b64")
@operation("fence", "mbarrier_init release cluster acq_rel gpu")
@operation("membar", "gl")
@operation("wgmma", "fence sync aligned")
@operation("setmaxnreg", "inc dec sync aligned u32")
@operation("barrier", "cluster arrive release aligned")
def nothing(_warp, _instruction, _active):
    """Of no effect here: kernels run one after another, memory has one order."""


@operation("bar", "warp sync")
def synchronise_warp(warp, instruction, active):
    _need_all(active, instruction)
    if "warp" in instruction.parts:
        warp.n_syncs += 1
        return None
    return "block"


@operation("barrier", "cluster wait acquire aligned")
def synchronise_cluster(_warp, instruction, active):
    _need_all(active, instruction)
    return "cluster"


@operation("mapa", "shared::cluster u32")
def map_address(warp, instruction, active):
    to, source, rank = instruction.operands
    address = warp.value(source) & np.uint64((1 << CLUSTER_SHIFT) - 1)
    rank = (warp.value(rank) & np.uint64(0xFFFF_FFFF)) + np.uint64(1)
    warp.set(to, address | rank << np.uint64(CLUSTER_SHIFT), active)


@operation("mbarrier", "arrive shared::cluster b64")
def barrier_arrive_at(warp, instruction, active):
    address = warp.address(instruction.operands[1])
    for lane in _lanes_of(active):
        at = int(address[lane]) & 0xFFFF_FFFF
        rank = (at >> CLUSTER_SHIFT) - 1
        inside = 0 <= rank < len(warp.block.cluster)
        need(inside, f"no such block in the cluster: `{instruction.text}`")
        block = warp.block.cluster[rank]
        block.barrier(at & (1 << CLUSTER_SHIFT) - 1).update(1, 0)


@operation("mbarrier", "init shared::cta b64")
def barrier_init(warp, instruction, active):
    place, count = instruction.operands
    address, count = warp.address(place), warp.value(count)
    for lane in _lanes_of(active):
        at = int(address[lane]) & 0xFFFF_FFFF
        inside = SHARED_BASE <= at and at + 8 <= len(warp.block.shared)
        need(inside and at % 8 == 0, f"no place for an mbarrier: `{instruction.text}`")
        warp.block.barriers[at] = Barrier(int(count[lane]) & 0xFFFF_FFFF)


@operation("mbarrier", "arrive expect_tx shared::cta b64")
def barrier_arrive(warp, instruction, active):
    address = warp.address(instruction.operands[1])
    n_bytes = np.zeros(WARP, np.uint64)
    if "expect_tx" in instruction.parts:
        n_bytes = warp.value(instruction.operands[2])
    for lane in _lanes_of(active):
        barrier = warp.block.barrier(int(address[lane]) & 0xFFFF_FFFF)
        barrier.update(1, int(n_bytes[lane]) & 0xFFFF_FFFF)


@operation("mbarrier", "try_wait parity shared::cta b64")
def barrier_try_wait(warp, instruction, active):
    to, place, parity = instruction.operands
    address, parity = warp.address(place), warp.value(parity)
    done = np.zeros(WARP, bool)
    for lane in _lanes_of(active):
        barrier = warp.block.barrier(int(address[lane]) & 0xFFFF_FFFF)
        done[lane] = barrier.phase & 1 != int(parity[lane]) & 0xFFFF_FFFF
    warp.set(to, done, active)
    return None if done[active].all() else "polling"


@operation(
    "cp",
    "async bulk shared::cluster global mbarrier::complete_tx::bytes L2::cache_hint",
)
def copy_bulk(warp, instruction, active):
    block, memory = warp.block, warp.machine.memory
    to, source, n_bytes, barrier = (
        warp.address(o) if isinstance(o, Address) else warp.value(o)
        for o in instruction.operands[:4]
    )
    text = instruction.text
    for lane in _lanes_of(active):
        start, n = int(to[lane]) & 0xFFFF_FFFF, int(n_bytes[lane]) & 0xFFFF_FFFF
        first = int(source[lane])
        aligned = start % 16 == 0 and first % 16 == 0 and n % 16 == 0 and n > 0
        need(aligned, f"misaligned: `{text}`")
        inside = SHARED_BASE <= start and start + n <= len(block.shared)
        need(inside, f"beyond shared memory: `{text}`")
        need(memory.allocated[first : first + n].all(), f"out of bounds: `{text}`")
        need(memory.is_written(first, n), f"read before written: `{text}`")
        for other, _, size, _ in block.copies:
            apart = other + size <= start or start + n <= other
            need(apart, f"two copies to one place: `{text}`")
        # What was there is lost from now on, the copy is there later.
        block.shared[start : start + n] = POISON_SHARED
        at = block.barrier(int(barrier[lane]) & 0xFFFF_FFFF)
        block.copies.append((start, first, n, at))


def _swizzled_box(memory, words, col, token, text):
    """128 bytes of each token of a box, as a swizzle of 128 bytes has them; zeros beyond the tensor.

    `words` of a tensor map are of our own: address, tokens, columns and elements from a token to the next, tokens of a box.
    """
    address, tokens, cols, stride, box = (int(word) for word in words[:5])
    data = np.zeros((box, 8, 16), np.uint8)
    n_cols = min(64, cols - col)
    for i in range(min(box, tokens - token) if n_cols > 0 else 0):
        first = address + 2 * ((token + i) * stride + col)
        need(memory.is_written(first, 2 * n_cols), f"read before written: `{text}`")
        row = np.zeros(128, np.uint8)
        row[: 2 * n_cols] = memory.data[first : first + 2 * n_cols]
        data[i, np.arange(8) ^ i % 8] = row.reshape(8, 16)
    return data.reshape(-1)


@operation(
    "cp",
    "async bulk tensor 2d shared::cluster global mbarrier::complete_tx::bytes multicast::cluster",
)
def copy_tensor(warp, instruction, active):
    to, source, barrier, ranks = instruction.operands
    place, (col, token) = source.items[0], source.items[1].items
    text = instruction.text
    for lane in _lanes_of(active):
        start, at = (int(warp.address(o)[lane]) & 0xFFFF_FFFF for o in (to, barrier))
        map_at = int(warp.value(place)[lane])
        words = np.frombuffer(warp.block.params[map_at : map_at + 128], np.uint64)
        where = (int(warp.value(o)[lane]) & 0xFFFF_FFFF for o in (col, token))
        data = _swizzled_box(warp.machine.memory, words, *where, text)
        need(start % 1024 == 0, f"misaligned: `{text}`")
        for rank, block in enumerate(warp.block.cluster):
            if int(warp.value(ranks)[lane]) >> rank & 1:
                end = start + len(data)
                inside = SHARED_BASE <= start and end <= len(block.shared)
                need(inside, f"beyond shared memory: `{text}`")
                for other, _, size, _ in block.copies:
                    apart = other + size <= start or end <= other
                    need(apart, f"two copies to one place: `{text}`")
                block.shared[start:end] = POISON_SHARED
                block.copies.append((start, data, len(data), block.barrier(at)))


@operation("cp", "async ca cg shared global")
def copy_async(warp, instruction, active):
    to, source, n_bytes, *n_read = instruction.operands
    need(n_bytes == Immediate(16), f"a copy of other than 16 bytes: `{instruction.text}`")
    full = active
    if n_read:
        n_read = warp.value(n_read[0]) & np.uint64(0xFFFF_FFFF)
        need(np.isin(n_read[active], (0, 16)).all(), f"a part of a copy: `{instruction.text}`")
        full = active & (n_read == 16)
    data, index = warp.access(
        "shared", warp.address(to), 16, active, instruction, True
    )
    data[index] = POISON_SHARED
    memory, source = warp.access(
        "global", warp.address(source), 16, full, instruction, False
    )
    # Zeros where nothing is read.
    warp.open_copies.append((data, index[~full[active]], np.zeros(1, np.uint8), 0))
    warp.open_copies.append((data, index[full[active]], memory, source))


@operation("cp", "async commit_group")
def copy_commit(warp, _instruction, active):
    warp.copy_groups.append(warp.open_copies)
    warp.open_copies = []


@operation("cp", "async wait_group")
def copy_wait(warp, instruction, _active):
    while len(warp.copy_groups) > instruction.operands[0].value:
        for data, index, memory, source in warp.copy_groups.pop(0):
            data[index] = memory[source]


@operation("cp", "async wait_all")
def copy_wait_all(warp, _instruction, active):
    for data, index, memory, source in sum(warp.copy_groups, []) + warp.open_copies:
        data[index] = memory[source]
    warp.copy_groups, warp.open_copies = [], []


@operation("ldmatrix", "sync aligned m8n8 x4 shared b16")
def load_matrix(warp, instruction, active):
    _need_all(active, instruction)
    to, source = instruction.operands
    data, index = warp.access(
        "shared", warp.address(source), 16, active, instruction, False
    )
    # Eight lanes have the rows of a matrix; a lane gets two elements of row lane / 4.
    words = np.ascontiguousarray(data[index]).view(np.uint32)
    for i, item in enumerate(_items(to)):
        value = words[8 * i + LANES.astype(np.int64) // 4, LANES.astype(np.int64) % 4]
        warp.set(item, value.astype(np.uint64), active)


@operation("shfl", "sync idx up b32")
def shuffle(warp, instruction, active):
    _need_all(active, instruction)
    to, source, by, *_ = instruction.operands
    lanes, by = LANES.astype(np.int64), warp.value(by).astype(np.int64)
    if "idx" in instruction.parts:
        origin = by & 31
    else:
        origin = np.where(lanes < by, lanes, lanes - by)
    warp.set(_items(to)[0], warp.value(source)[origin], active)


@operation("vote", "sync ballot b32")
def vote_ballot(warp, instruction, active):
    _need_all(active, instruction)
    votes = warp.predicate(instruction.operands[1])
    bits = int((votes.astype(np.uint64) << LANES).sum())
    warp.set(instruction.operands[0], np.full(WARP, bits, np.uint64), active)


@operation("vote", "sync any pred")
def vote_any(warp, instruction, active):
    _need_all(active, instruction)
    votes = warp.predicate(instruction.operands[1])
    warp.set(instruction.operands[0], np.full(WARP, votes.any()), active)


@operation("redux", "sync max u32")
def reduce_max(warp, instruction, active):
    _need_all(active, instruction)
    value = to_type(warp.value(instruction.operands[1]), "u32")
    warp.set(instruction.operands[0], np.full(WARP, value.max()), active)


@operation("stmatrix", "sync aligned m8n8 x4 trans shared b16")
def store_matrices(warp, instruction, active):
    _need_all(active, instruction)
    place, registers = instruction.operands
    # Lane 8 i + r has the address of row r of matrix i.
    data, index = warp.access(
        "shared", warp.address(place), 16, active, instruction, True
    )
    for i, register in enumerate(registers.items):
        rows = warp.value(register).astype(np.uint32).view(np.uint16).reshape(8, 8)
        if "trans" in instruction.parts:
            rows = np.ascontiguousarray(rows.T)
        data[index[8 * i : 8 * i + 8]] = rows.view(np.uint8)


@operation("mma", "sync aligned m16n8k16 row col f32 f16 bf16")
def multiply(warp, instruction, active):
    _need_all(active, instruction)
    d, a, b, c = (operand.items for operand in instruction.operands)
    values = [[warp.value(r) for r in registers] for registers in (a, b, c)]
    # The types of D, A, B and C.
    result = multiply_fragments(*values, instruction.parts[-3])
    for register, value in zip(d, result, strict=True):
        warp.set(register, value, active)


@operation(
    "wgmma",
    "mma_async sync aligned m64n32k16 m64n64k16 m64n128k16 m64n256k16 f32 f16 bf16",
)
def multiply_async(warp, instruction, active):
    _need_all(active, instruction)
    descriptor = warp.value(instruction.operands[2])
    need((descriptor == descriptor[0]).all(), "the descriptors of a wgmma differ")
    # Scale of D, signs of A and B, order of B.
    plain = all(o == Immediate(v) for o, v in zip(instruction.operands[3:], (1, 1, 1, 0)))
    if not plain:
        raise UnknownInstruction(f"`{instruction.text}`: other than D + A * B^T")
    warp.open_products.append((instruction, int(descriptor[0])))
    return "warpgroup"


@operation("wgmma", "commit_group sync aligned")
def multiply_commit(warp, instruction, active):
    _need_all(active, instruction)
    warp.product_groups.append(warp.open_products)
    warp.open_products = []


@operation("wgmma", "wait_group sync aligned")
def multiply_wait(warp, instruction, active):
    """Only here are the operands read, as late as can be."""
    _need_all(active, instruction)
    while len(warp.product_groups) > instruction.operands[0].value:
        for product, descriptor in warp.product_groups.pop(0):
            d, a = (operand.items for operand in product.operands[:2])
            result = multiply_shared(
                [warp.value(r) for r in a],
                warp.block.shared,
                descriptor,
                [warp.value(r) for r in d],
                product.type,
            )
            for register, value in zip(d, result, strict=True):
                warp.set(register, value, ALL_LANES)
