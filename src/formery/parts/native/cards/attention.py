"""Attention in Triton: shares of the slots are looked at side by side, and put together in their order."""

import triton
import triton.language as tl

from formery.parts.native.cards.kernels import BLOCK, ROWS, SHARE, hyperbolic_tangent, times

CAUSAL, WINDOW, TABLE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def share(query, keys, values, positions, filled, slots, found, tops, totals, allowed, bias, time, groups, shared, dim,
          row_step, head_step, slot_step, allowed_row, allowed_head, allowed_query, bias_row, bias_head, bias_query,
          window, scale, cap, first_tile, tiles, FULL: tl.constexpr, SIGHT: tl.constexpr, BIAS: tl.constexpr,
          CAP: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """exp(score - top) · value and its total over one share of the slots, for a tile of queries of one key head.

    score = cap · tanh(scale · query · key / cap) + bias. Slots that a query does not see leave its sums untouched.
    """
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    if slots < 0:
        slots = tl.load(filled).to(tl.int32)
    start = tl.program_id(2) * SHARE
    if start < slots:
        q = (first_tile + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        real = q < time * shared
        at, head = q // shared, group * shared + q % shared
        i = tl.arange(0, B)
        token = row.to(tl.int64) * time + at
        vector = (token * (groups * shared) + head) * dim
        vectors = tl.load(query + vector[:, None] + i[None, :], mask=real[:, None] & (i < dim)[None, :], other=0.0)
        position = tl.load(positions + token, mask=real, other=-1)
        base = row.to(tl.int64) * row_step + group * head_step
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, B), tl.float32)
        for block in range(0, SHARE, BLOCK):
            slot = start + block + tl.arange(0, BLOCK)
            there = slot < slots
            where = base + slot.to(tl.int64) * slot_step
            inside = there[:, None] & (i < dim)[None, :]
            key = tl.load(keys + where[:, None] + i[None, :], mask=inside, other=0.0)
            value = tl.load(values + where[:, None] + i[None, :], mask=inside, other=0.0)
            score = times(vectors, key.trans(), tl.zeros((ROWS, BLOCK), tl.float32), FULL) * scale
            if CAP:
                score = hyperbolic_tangent(score / cap) * cap
            seen = real[:, None] & there[None, :]
            if SIGHT == CAUSAL or SIGHT == WINDOW:  # noqa: SIM109
                seen = seen & (slot[None, :] <= position[:, None])
            if SIGHT == WINDOW:
                seen = seen & (slot[None, :] > position[:, None] - window)
            if SIGHT == TABLE:
                place = row * allowed_row + head * allowed_head + at * allowed_query
                seen = seen & (tl.load(allowed + place[:, None] + slot[None, :], mask=seen, other=0) != 0)
            if BIAS:
                place = row * bias_row + head * bias_head + at * bias_query
                score += tl.load(bias + place[:, None] + slot[None, :], mask=seen, other=0.0)
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            against = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(score - against[:, None])
            shrink = tl.exp(top - against)
            total = tl.fma(total, shrink, tl.sum(weights, 1))
            acc = times(weights, value, acc * shrink[:, None], FULL)
            top = higher
        place = (tl.program_id(1).to(tl.int64) * tiles + tl.program_id(0)) * tl.num_programs(2) + tl.program_id(2)
        place = place * ROWS + tl.arange(0, ROWS)
        tl.store(found + place[:, None] * B + i[None, :], acc)
        tl.store(tops + place, top)
        tl.store(totals + place, total)


@triton.jit
def together(result, found, tops, totals, filled, slots, time, groups, shared, dim, first_tile, tiles, shares,
             B: tl.constexpr):  # fmt: skip
    """Puts the shares of one query together, from the first to the last."""
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    q = first_tile * ROWS + tl.program_id(0)
    if q < time * shared:
        if slots < 0:
            slots = tl.load(filled).to(tl.int32)
        i = tl.arange(0, B)
        tile, line = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS
        place = (tl.program_id(1).to(tl.int64) * tiles + tile) * shares * ROWS + line
        top, total = float("-inf"), 0.0
        acc = tl.zeros((B,), tl.float32)
        for _ in range(tl.cdiv(slots, SHARE)):
            other = tl.load(tops + place)
            higher = tl.maximum(top, other)
            against = tl.where(higher == float("-inf"), 0.0, higher)
            before, now = tl.exp(top - against), tl.exp(other - against)
            total = tl.fma(total, before, tl.load(totals + place) * now)
            acc = tl.fma(acc, before, tl.load(found + place * B + i) * now)
            top = higher
            place += ROWS
        at = (row.to(tl.int64) * time + q // shared) * (groups * shared) + group * shared + q % shared
        tl.store(result + at * dim + i, acc * tl.where(total > 0, 1.0 / total, 0.0), mask=i < dim)
