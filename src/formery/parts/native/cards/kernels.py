"""The steps of a program in Triton, for a graphics card.

Every sum has one fixed order, whatever the number of rows: products run in tiles of 16 rows, the missing ones filled
up with zeros, and attention goes over the slots in shares that begin at fixed ones. Numbers of 32 bits meet weights of
16 or fewer as two of 16 bits, a high and a low one, so that little of them is lost.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # of a tile
SHARE = tl.constexpr(128)  # slots that one program looks at
BLOCK = tl.constexpr(64)  # of them at a time


@triton.jit
def high_low(x):
    """A number of 32 bits as two of 16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def times(x, w, acc, FULL: tl.constexpr):
    """acc + x · w, x having 32 bits, w 32 or 16."""
    if FULL:
        acc = tl.dot(x, w, acc, input_precision="ieee")
    else:
        high, low = high_low(x)
        acc = tl.dot(low, w, acc)
        acc = tl.dot(high, w, acc)
    return acc


@triton.jit
def hyperbolic_tangent(x):
    """tanh without overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = tl.abs(x) * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    size = tl.where(square < 0.01, near, far)
    return tl.where(x < 0, -size, size)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """The activation of that number (in the order of `ACTIVATIONS`)."""
    if KIND == 1:
        x = tl.maximum(x, 0.0)
    elif KIND == 2:
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif KIND == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 4:
        x = 0.5 * x * (1.0 + hyperbolic_tangent(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == 5:
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif KIND == 6:
        x = x / (1.0 + tl.exp(-x))
    elif KIND == 7:
        x = hyperbolic_tangent(x)
    elif KIND == 8:
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def norm(x, y, weight, shift, width, repeat, epsilon, offset, RMS: tl.constexpr, SHIFT: tl.constexpr, B: tl.constexpr):
    """A layer's norm of one vector; `repeat` of them lie in a row."""
    at = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, B)
    inside = i < width
    value = tl.load(x + at + i, mask=inside, other=0.0)
    if not RMS:
        value = tl.where(inside, value - tl.sum(value) / width, 0.0)
    value = value / tl.sqrt(tl.sum(value * value) / width + epsilon)
    value = value * (offset + tl.load(weight + i, mask=inside, other=0.0))
    if SHIFT:
        value = value + tl.load(shift + i, mask=inside, other=0.0)
    tl.store(y + at + i, value, mask=inside)


@triton.jit
def elementwise(x, y, count, by, KIND: tl.constexpr, B: tl.constexpr):
    """y = by · x (0), y + x (1), or by · tanh(x / by) (2)."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    value = tl.load(x + i, mask=i < count, other=0.0)
    if KIND == 0:
        value = value * by
    elif KIND == 1:
        value = tl.load(y + i, mask=i < count, other=0.0) + value
    else:
        value = hyperbolic_tangent(value / by) * by
    tl.store(y + i, value, mask=i < count)


@triton.jit
def finish(acc, y, bias, m, n, rows, outputs, INTO: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr):
    """Writes a tile of results: as they are (0), added to what is there (1), or multiplied with it (2)."""
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    at = m.to(tl.int64)[:, None] * outputs + n[None, :]
    if BIAS:
        acc = acc + tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
    acc = activated(acc, ACTIVATION)
    if INTO == 1:
        acc = tl.load(y + at, mask=inside, other=0.0) + acc
    elif INTO == 2:
        acc = tl.load(y + at, mask=inside, other=0.0) * acc
    tl.store(y + at, acc, mask=inside)


@triton.jit
def product(x, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, t0, t1, rows, inputs, FULL: tl.constexpr,
            INTO: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, MAPS: tl.constexpr, N: tl.constexpr,
            K: tl.constexpr):  # fmt: skip
    """x · wᵀ with weights of 32 or 16 bits, for up to three maps of the same x; a program makes N outputs of one.

    The first t0 programs work for the first map, the next t1 for the second.
    """
    w, bias, y, outputs, tile = w0, b0, y0, n0, tl.program_id(0)
    if MAPS > 1:
        if tile >= t0 + t1:
            w, bias, y, outputs, tile = w2, b2, y2, n2, tile - t0 - t1
        elif tile >= t0:
            w, bias, y, outputs, tile = w1, b1, y1, n1, tile - t0
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tile * N + tl.arange(0, N)
    k = tl.arange(0, K)
    acc = tl.zeros((ROWS, N), tl.float32)
    x_at = x + m.to(tl.int64)[:, None] * inputs + k[None, :]
    w_at = w + n.to(tl.int64)[None, :] * inputs + k[:, None]
    for first in range(0, inputs, K):
        some = first + k < inputs
        weights = tl.load(w_at + first, mask=(n < outputs)[None, :] & some[:, None], other=0.0)
        values = tl.load(x_at + first, mask=(m < rows)[:, None] & some[None, :], other=0.0)
        if FULL:
            acc = tl.dot(values, weights, acc, input_precision="ieee")
        else:
            acc = tl.dot(values.to(tl.bfloat16), weights, acc)
    finish(acc, y, bias, m, n, rows, outputs, INTO, ACTIVATION, BIAS)


@triton.jit
def gated(x, gate, up, gate_bias, up_bias, y, outputs, rows, inputs, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
          BIAS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """activation(x · gateᵀ) · (x · upᵀ)."""
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    first_acc, second_acc = tl.zeros((ROWS, N), tl.float32), tl.zeros((ROWS, N), tl.float32)
    x_at = x + m.to(tl.int64)[:, None] * inputs + k[None, :]
    w_at = n.to(tl.int64)[None, :] * inputs + k[:, None]
    for first in range(0, inputs, K):
        some = first + k < inputs
        there = (n < outputs)[None, :] & some[:, None]
        opening = tl.load(gate + w_at + first, mask=there, other=0.0)
        weights = tl.load(up + w_at + first, mask=there, other=0.0)
        values = tl.load(x_at + first, mask=(m < rows)[:, None] & some[None, :], other=0.0)
        if FULL:
            first_acc = tl.dot(values, opening, first_acc, input_precision="ieee")
            second_acc = tl.dot(values, weights, second_acc, input_precision="ieee")
        else:
            narrow = values.to(tl.bfloat16)
            first_acc = tl.dot(narrow, opening, first_acc)
            second_acc = tl.dot(narrow, weights, second_acc)
    if BIAS:
        first_acc = first_acc + tl.load(gate_bias + n, mask=n < outputs, other=0.0)[None, :]
        second_acc = second_acc + tl.load(up_bias + n, mask=n < outputs, other=0.0)[None, :]
    acc = activated(first_acc, ACTIVATION) * second_acc
    finish(acc, y, y, m, n, rows, outputs, 0, 0, False)


@triton.jit
def product8(x, w0, w1, w2, s0, s1, s2, b0, b1, b2, y0, y1, y2, n0, n1, n2, t0, t1, rows, inputs, INTO: tl.constexpr,
             ACTIVATION: tl.constexpr, BIAS: tl.constexpr, MAPS: tl.constexpr, N: tl.constexpr,
             K: tl.constexpr):  # fmt: skip
    """As `product` with weights of 8 bits, [panel, inputs / 4, 16, 4]; in panels of 16 outputs."""
    w, scales, bias, y, outputs, tile = w0, s0, b0, y0, n0, tl.program_id(0)
    if MAPS > 1:
        if tile >= t0 + t1:
            w, scales, bias, y, outputs, tile = w2, s2, b2, y2, n2, tile - t0 - t1
        elif tile >= t0:
            w, scales, bias, y, outputs, tile = w1, s1, b1, y1, n1, tile - t0
    words = (inputs + 31) // 32 * 8  # of four codes each
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tile * N + tl.arange(0, N)
    k = tl.arange(0, K)
    acc = tl.zeros((ROWS, N), tl.float32)
    x_at = x + m.to(tl.int64)[:, None] * inputs + 4 * k[None, :]
    w_at = w + (n // 16).to(tl.int64)[None, :] * (16 * words) + (n % 16)[None, :] + 16 * k[:, None]
    for first in range(0, words, K):
        there = (n < outputs)[None, :] & (first + k < words)[:, None]
        four = tl.load(w_at + first * 16, mask=there, other=0)
        for j in tl.static_range(4):
            inside = (m < rows)[:, None] & (4 * (first + k) + j < inputs)[None, :]
            values = tl.load(x_at + 4 * first + j, mask=inside, other=0.0)
            weights = ((four >> (8 * j)) & 255).to(tl.float32) - 128.0
            acc = times(values, weights.to(tl.bfloat16), acc, False)
    acc = acc * tl.load(scales + n, mask=n < outputs, other=0.0)[None, :]
    finish(acc, y, bias, m, n, rows, outputs, INTO, ACTIVATION, BIAS)


@triton.jit
def product4(x, w0, w1, w2, s0, s1, s2, b0, b1, b2, y0, y1, y2, n0, n1, n2, t0, t1, rows, inputs, INTO: tl.constexpr,
             ACTIVATION: tl.constexpr, BIAS: tl.constexpr, MAPS: tl.constexpr, N: tl.constexpr,
             K: tl.constexpr):  # fmt: skip
    """As `product` with weights of 4 bits, [panel, group, 4, 16, 4], a scale for each output and group of 32."""
    w, scales, bias, y, outputs, tile = w0, s0, b0, y0, n0, tl.program_id(0)
    if MAPS > 1:
        if tile >= t0 + t1:
            w, scales, bias, y, outputs, tile = w2, s2, b2, y2, n2, tile - t0 - t1
        elif tile >= t0:
            w, scales, bias, y, outputs, tile = w1, s1, b1, y1, n1, tile - t0
    groups = (inputs + 31) // 32
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tile * N + tl.arange(0, N)
    k = tl.arange(0, K)  # words of eight codes each, four of them to a group
    acc = tl.zeros((ROWS, N), tl.float32)
    x_at = x + m.to(tl.int64)[:, None] * inputs + 8 * k[None, :]
    panel = (n // 16).to(tl.int64) * groups
    w_at = w + (panel * 64 + n % 16)[None, :] + 16 * k[:, None]
    s_at = scales + (panel * 16 + n % 16)[None, :] + (k // 4 * 16)[:, None]
    for first in range(0, groups * 4, K):
        there = (n < outputs)[None, :] & (first + k < groups * 4)[:, None]
        eight = tl.load(w_at + first * 16, mask=there, other=0)
        scale = tl.load(s_at + first * 4, mask=there, other=0.0).to(tl.float32)
        for j in tl.static_range(8):
            inside = (m < rows)[:, None] & (8 * (first + k) + j < inputs)[None, :]
            values = tl.load(x_at + 8 * first + j, mask=inside, other=0.0)
            code = ((eight >> (8 * (j % 4) + 4 * (j // 4))) & 15).to(tl.float32) - 8.0
            high, low = high_low(code * scale)
            acc = tl.dot(values.to(tl.bfloat16), low, acc)
            acc = times(values, high, acc, False)
    finish(acc, y, bias, m, n, rows, outputs, INTO, ACTIVATION, BIAS)


@triton.jit
def turned(x, position, frequencies, half, magnitude, PAIRS: tl.constexpr, B: tl.constexpr):
    """Turns the pairs of one head by position · frequency, where it lies."""
    i = tl.arange(0, B)
    inside = i < half
    angle = tl.maximum(position, 0).to(tl.float32) * tl.load(frequencies + i, mask=inside, other=0.0)
    cosine, sine = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    first, second = i, i + half
    if PAIRS:
        first, second = 2 * i, 2 * i + 1
    a = tl.load(x + first, mask=inside, other=0.0)
    b = tl.load(x + second, mask=inside, other=0.0)
    tl.store(x + first, a * cosine - b * sine, mask=inside)
    tl.store(x + second, b * cosine + a * sine, mask=inside)


@triton.jit
def rotate(x, positions, frequencies, heads, dim, half, magnitude, PAIRS: tl.constexpr, B: tl.constexpr):
    """Turns one head of one token."""
    row = tl.program_id(0)
    at = x + (row.to(tl.int64) * heads + tl.program_id(1)) * dim
    turned(at, tl.load(positions + row), frequencies, half, magnitude, PAIRS, B)


@triton.jit
def append(key, value, keys, values, starts, time, heads, dim, row_step, head_step, slot_step, B: tl.constexpr):
    """Puts a token's key and value into their slot."""
    row, head = tl.program_id(0), tl.program_id(1)
    put(key, keys, row, head, starts, time, heads, dim, row_step, head_step, slot_step, B)
    put(value, values, row, head, starts, time, heads, dim, row_step, head_step, slot_step, B)


@triton.jit
def put(x, cache, row, head, starts, time, heads, dim, row_step, head_step, slot_step, B: tl.constexpr):
    """Puts one head's vector into its slot."""
    slot = tl.load(starts + row // time) + row % time
    i = tl.arange(0, B)
    vector = tl.load(x + (row.to(tl.int64) * heads + head) * dim + i, mask=i < dim, other=0.0)
    target = (row // time).to(tl.int64) * row_step + head * head_step + slot * slot_step + i
    tl.store(cache + target, vector.to(cache.dtype.element_ty), mask=i < dim)


@triton.jit
def place(query, key, value, keys, values, positions, starts, frequencies, time, heads, groups, dim, half, magnitude,
          row_step, head_step, slot_step, PAIRS: tl.constexpr, HALF: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Turns queries and keys by their positions, and puts keys and values into their slots; a program does one head."""
    row, head = tl.program_id(0), tl.program_id(1)
    if head < heads:
        at = query + (row.to(tl.int64) * heads + head) * dim
        turned(at, tl.load(positions + row), frequencies, half, magnitude, PAIRS, HALF)
    elif head < heads + groups:
        head -= heads
        at = key + (row.to(tl.int64) * groups + head) * dim
        turned(at, tl.load(positions + row), frequencies, half, magnitude, PAIRS, HALF)
        tl.debug_barrier()  # what was turned is read by other threads
        put(key, keys, row, head, starts, time, groups, dim, row_step, head_step, slot_step, B)
    else:
        put(value, values, row, head - heads - groups, starts, time, groups, dim, row_step, head_step, slot_step, B)
