"""What a chain on a device decides by itself, and where that is written: the decisions of `State`, in the same float64 operations.

The ledger is an int64 tensor of `WORDS` words for each time; floats are there as their bits. The row of time t tells what the state at t
means; that of t + 1 also how step t was taken. The words from YMAX on are gathered by integer maxima and sums, of which any order gives
the same; whoever undoes the step sets them to 0 again. The pass over y gathers max|y|, and its last program decides.

What happens (units, ratios, spills, hence every bit) depends on the data alone. Only where spilled bytes go is up to the host, which puts
the addresses of free planes into the mailbox, memory of the host that a device can reach. Where a plane is missing the step says so (LOST)
and goes on: the forward pass is right all the same, and only the way back is gone.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import bits_of, exponent, f64, odd, pow2, widened

UNIT = tl.constexpr(0)  # exponent of the unit
RATIO = tl.constexpr(1)
XB = tl.constexpr(2)  # bounds of |x| and |v|
VB = tl.constexpr(3)
SCALE = tl.constexpr(4)  # weight / (ratio * unit) of the step that led here
XSHIFT = tl.constexpr(5)  # that step's spills: by how many bits, into how many planes
XPLANES = tl.constexpr(6)
USHIFT = tl.constexpr(7)
UPLANES = tl.constexpr(8)
USED = tl.constexpr(9)  # planes taken until now
LOST = tl.constexpr(10)  # 1 + the first step for which a plane was missing; 0: none
GAMMA = tl.constexpr(11)  # these two are given
WEIGHT = tl.constexpr(12)
WIDEN = tl.constexpr(13)  # bits by which that step widened X
GONE = tl.constexpr(14)  # whether elements may be NaN
STEPS = tl.constexpr(15)  # given: number of steps
YMAX = tl.constexpr(16)  # max|y| of that step (of x0 at time 0), over what is finite
YBAD = tl.constexpr(17)  # whether anything is not
XMAX = tl.constexpr(18)  # max|X| and max|U|, here
UMAX = tl.constexpr(19)
DONE = tl.constexpr(20)  # programs that are through
VMAX = tl.constexpr(21)  # max|v0|
PLANE = tl.constexpr(24)  # addresses of that step's planes
MOST_PLANES = 13  # that one step can take: a float64 stream's X emptied 6, and U 7
WORDS = tl.constexpr(40)


@triton.jit
def largest(y, n, rounds, BLOCK: tl.constexpr):
    """(bits of max|y| as a float64, 1 or 0: whether there is inf, NaN or more than 2^1000, which do not count) of one program's part."""
    WIDE: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    most, bad = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], tl.int32)
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        v = widened(tl.load(y + at, at < n, 0.0))
        off = odd(v)
        most = tl.maximum(most, tl.where(off, 0.0, tl.abs(v)))
        bad = bad | off.to(tl.int32)
    return bits_of(tl.max(most, 0).to(tl.float64)), tl.max(bad, 0).to(tl.int64)


@triton.jit(do_not_specialize=["fresh", "rounds"])
def start(x0, v0, ledger, fresh, n, rounds, BITS: tl.constexpr, HAS_V: tl.constexpr, BLOCK: tl.constexpr):
    """Row 0 from max|x0| and max|v0|. fresh: -log2 of the ratio of a fresh U."""
    xmax, bad = largest(x0, n, rounds, BLOCK)
    tl.atomic_max(ledger + YMAX, xmax)
    if HAS_V:
        vmax, vbad = largest(v0, n, rounds, BLOCK)
        tl.atomic_max(ledger + VMAX, vmax)
        bad = bad | vbad
    tl.atomic_max(ledger + YBAD, bad)
    if tl.atomic_add(ledger + DONE, 1) == tl.num_programs(0) - 1:
        xb = f64(tl.atomic_max(ledger + YMAX, 0))  # read where the others wrote
        vb = f64(tl.atomic_max(ledger + VMAX, 0))
        tl.store(ledger + GONE, tl.atomic_max(ledger + YBAD, 0))
        top = tl.maximum(xb, vb)
        e = tl.where(top > 0.0, tl.maximum(exponent(top), -450), -450) - BITS
        unit, ratio = pow2(e), pow2(e * 0 - fresh)
        tl.store(ledger + UNIT, e)
        tl.store(ledger + RATIO, bits_of(ratio))
        tl.store(ledger + XB, bits_of(xb + tl.where(xb > 0.0, 0.5 * unit, 0.0)))
        tl.store(ledger + VB, bits_of(vb + tl.where(vb > 0.0, 0.5 * unit * ratio, 0.0)))


@triton.jit
def below(bound):
    """The smallest e >= 1 with max(bound, 1) + 1 <= 2^e, as in `eager.spill`: integers up to the bound are below 2^e."""
    v = tl.maximum(bound, 1.0) + 1
    return exponent(v) - ((bits_of(v) & 0xFFFFFFFFFFFFF) == 0).to(tl.int64)


@triton.jit
def spilling(wanted, bits, reach):
    """(shift, planes) of a spill of so many bits, of integers below 2^reach; 0 where it is not wanted."""
    shift = tl.where(wanted, tl.where(bits > reach, 64, bits), 0)
    return shift, tl.where(wanted, (tl.minimum(bits - 1, reach) + 8) // 8, 0)


@triton.jit
def bounds(row, gamma, add, widen, raised, LIMIT: tl.constexpr):
    """(e, ratio, max|x|, max|v|) before the step, in the format after it; the exact maxima where the bounds would touch the limit."""
    e, ratio = tl.load(row + UNIT), f64(tl.load(row + RATIO))
    xb, vb, unit = f64(tl.load(row + XB)), f64(tl.load(row + VB)), pow2(e)
    xtop, utop = f64(tl.load(row + XMAX)) * unit, f64(tl.load(row + UMAX)) * ratio * unit
    e = e - widen
    ratio = ratio * pow2(e * 0 + raised)
    tight = xb + gamma * vb + add >= LIMIT * pow2(e)
    return e, ratio, tl.where(tight, tl.minimum(xb, xtop), xb), tl.where(tight, tl.minimum(vb, utop), vb)


@triton.jit
def room_in_u(ratio, unit, gamma, vb, v1, held, fresh, ULIMIT: tl.constexpr):
    """State._room_in_u: (ratio, shift, planes)."""
    ratio = ratio * gamma
    empty = vb == 0.0
    everything = (empty == 0) & ((gamma == 0.0) | (ratio < 4.909093465297727e-91))  # 2^-300
    tight = (empty == 0) & (everything == 0) & (v1 >= ULIMIT * ratio * unit)
    bits = tl.where(tight, ((exponent(fresh / tl.where(tight, ratio, fresh)) - 1) // 8) * 8, 0)
    shift, planes = spilling(everything | tight, tl.where(everything, 64, bits), below(held))
    return tl.where(empty | everything, fresh, ratio * pow2(bits)), shift, planes


@triton.jit
def decide(row, ymax, ybad, fresh, widen, raised, LIMIT: tl.constexpr, ULIMIT: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """State._make_room. TOP: the largest finite number of the stream's dtype. Returns the planes that the step needs."""
    nxt = row + WORDS
    gamma, weight = f64(tl.load(nxt + GAMMA)), f64(tl.load(nxt + WEIGHT))
    add = tl.abs(weight) * ymax
    e, ratio, xb, vb = bounds(row, gamma, add, widen, raised, LIMIT)
    unit = pow2(e)
    v1 = gamma * vb + add
    x1 = xb + v1
    held = vb / (ratio * unit)
    grow = (x1 < LIMIT * unit - 4 * unit) == 0
    bits = tl.where(grow, tl.maximum(exponent(x1), -450) - e - (BITS - 1), 0)
    xshift, xplanes = spilling(grow & (xb / unit >= 0.5), bits, below(xb / unit))
    e = e + bits
    unit = pow2(e)
    ratio, ushift, uplanes = room_in_u(ratio * pow2(-tl.minimum(bits, 1000)), unit, gamma, vb, v1, held, pow2(e * 0 - fresh), ULIMIT)
    slack = ratio * unit
    x1 = x1 * (1 + 1e-9) + slack + unit
    tl.store(nxt + UNIT, e)
    tl.store(nxt + RATIO, bits_of(ratio))
    tl.store(nxt + XB, bits_of(x1))
    tl.store(nxt + VB, bits_of(v1 * (1 + 1e-9) + slack))
    tl.store(nxt + SCALE, bits_of(weight / slack))
    tl.store(nxt + XSHIFT, xshift)
    tl.store(nxt + XPLANES, xplanes)
    tl.store(nxt + USHIFT, ushift)
    tl.store(nxt + UPLANES, uplanes)
    tl.store(nxt + WIDEN, e * 0 + widen)
    tl.store(nxt + GONE, tl.load(row + GONE) | ybad | (x1 > TOP).to(tl.int64))
    return xplanes + uplanes


@triton.jit
def take(row, t, planes, mail, capacity):
    """Takes planes out of the mailbox and writes there how many are used: below -1 once one was missing, as -2 - step."""
    nxt, used = row + WORDS, tl.load(row + USED)
    fits = used + planes <= capacity
    lost = tl.load(row + LOST)
    lost = tl.where((lost == 0) & (fits == 0), lost + t + 1, lost)
    given = mail + tl.load(nxt + STEPS) + 1 + used
    for p in range(tl.where(fits, planes, 0)):
        tl.store(nxt + PLANE + p, tl.load(given + p))
    tl.store(nxt + USED, used + planes)
    tl.store(nxt + LOST, lost)
    tl.store(mail + t + 1, tl.where(lost > 0, -1 - lost, used + planes))


@triton.jit(do_not_specialize=["mailbox", "t", "capacity", "fresh", "widen", "raised", "rounds"])  # 1 or 16 would be kernels of their own
def reach(
    y,
    ledger,
    mailbox,
    t,
    capacity,
    fresh,
    widen,
    raised,
    n,
    rounds,
    LIMIT: tl.constexpr,
    ULIMIT: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row t + 1, from max|y| of step t. mailbox: its address. widen, raised: bits by which X, and the ratio, are widened before."""
    row = ledger + t.to(tl.int64) * WORDS
    nxt = row + WORDS
    most, bad = largest(y, n, rounds, BLOCK)
    tl.atomic_max(nxt + YMAX, most)
    tl.atomic_max(nxt + YBAD, bad)
    if tl.atomic_add(nxt + DONE, 1) == tl.num_programs(0) - 1:
        ymax, ybad = f64(tl.atomic_max(nxt + YMAX, 0)), tl.atomic_max(nxt + YBAD, 0)  # read where the others wrote
        planes = decide(row, ymax, ybad, fresh, widen, raised, LIMIT, ULIMIT, BITS, TOP)
        if STORE:
            take(row, t.to(tl.int64), planes, mailbox.to(tl.pointer_type(tl.int64)), capacity)
