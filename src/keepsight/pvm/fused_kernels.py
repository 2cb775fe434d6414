"""A PVM block for few positions as six kernels, in Triton. `fused.py` calls them; `module.py` has the equations.

    reduce    parts of x W_txt
    attend    RMSNorm, W_q, RMSNorm, attention to one share of the visual tokens
    project   the shares put together, W_o
    feed      RMSNorm, SwiGLU: parts of its sum
    expand    a + SwiGLU, W_up, and what the last norm needs
    finish    RMSNorm, gate, keep, y +

One program works for one position n, on one share of the rows of a matrix: at so few positions reading the weights is
all that takes time. What is a sum over a long dimension is kept as *parts* [S, N, W] in float32, which the next kernel
adds up, so nothing is added in an order that could change. Everything between x and y is in float32.

W is the block's width, H its heads, d their width. Names in capitals are known when a kernel is compiled: D and F are
the sizes of the model's hidden states and of the SwiGLU, HEAD is d rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)  # a score that exp turns to 0, and that may be subtracted from itself


@triton.jit
def product(weight, rows, columns, height, width, vector):
    """weight[rows, columns] @ vector; the vector is 0 at columns that are not there."""
    inside = (rows < height)[:, None] & (columns < width)[None]
    matrix = tl.load(weight + rows[:, None] * width + columns[None], mask=inside, other=0.0)
    return tl.sum(matrix.to(tl.float32) * vector[None], 1)


@triton.jit
def added(parts, columns, width, stride, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """The sum of COUNT parts, at these columns."""
    part = tl.arange(0, PADDED)
    inside = (part < COUNT)[:, None] & (columns < width)[None]
    return tl.sum(tl.load(parts + part[:, None] * stride + columns[None], mask=inside, other=0.0), 0)


@triton.jit
def product_of_norm(
    weight, rows, height, parts, stride, gain,
    W: tl.constexpr, EPS: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """weight[rows] @ RMSNorm(sum of parts); the norm's scale comes last, so that one pass is enough."""
    total = tl.zeros(rows.shape, tl.float32)
    squares = 0.0
    for start in tl.static_range(0, W, STEP):
        columns = start + tl.arange(0, STEP)
        vector = added(parts, columns, W, stride, COUNT, PADDED)
        squares += tl.sum(vector * vector, 0)
        scaled = vector * tl.load(gain + columns, mask=columns < W, other=0.0).to(tl.float32)
        total += product(weight, rows, columns, height, W, scaled)
    return total * tl.rsqrt(squares / W + EPS)


@triton.jit
def reduce(
    x, weight, parts, positions,
    D: tl.constexpr, W: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (W / ROWS, S, N). Part s of x W_txt is over the s-th SHARE of D."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part, n = tl.program_id(1), tl.program_id(2)
    total = tl.zeros([ROWS], tl.float32)
    for step in tl.static_range(0, SHARE, STEP):
        columns = part * SHARE + step + tl.arange(0, STEP)
        vector = tl.load(x + n * D + columns, mask=columns < D, other=0.0).to(weight.dtype.element_ty).to(tl.float32)
        total += product(weight, rows, columns, W, D, vector)
    tl.store(parts + (part * positions + n) * W + rows, total, mask=rows < W)


@triton.jit
def attend(
    parts, gain, w_query, b_query, q_gain, key, value, mask, out, stats, positions, length, share, queries,
    key_b, key_h, key_m, value_b, value_h, value_m, mask_b, mask_t,
    W: tl.constexpr, D_HEAD: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr,
    STEP: tl.constexpr, TOKENS: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (H, S, N). Softmax over the s-th share of the visual tokens: its sum [d], and (largest score, weight)."""
    head, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, time = (n // queries).to(tl.int64), n % queries
    d = tl.arange(0, HEAD)
    w_query += head * D_HEAD * W
    query = product_of_norm(w_query, d, D_HEAD, parts + n * W, positions * W, gain, W, EPS, STEP, COUNT, PADDED)
    if b_query is not None:
        query += tl.load(b_query + head * D_HEAD + d, mask=d < D_HEAD, other=0.0).to(tl.float32)
    query *= tl.rsqrt(tl.sum(query * query, 0) / D_HEAD + EPS) * tl.rsqrt(D_HEAD * 1.0)
    query *= tl.load(q_gain + d, mask=d < D_HEAD, other=0.0).to(tl.float32)

    key += row * key_b + (head // GROUP) * key_h + d[None]
    value += row * value_b + (head // GROUP) * value_h + d[None]
    largest, weight, total = tl.full([], LOW, tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([HEAD], tl.float32)
    start, end = split * share, tl.minimum((split + 1) * share, length)
    while start < end:  # Triton 3.6 cannot interpret a range of what it was given
        token = start + tl.arange(0, TOKENS)
        visible = token < end
        there = visible[:, None] & (d < D_HEAD)[None]
        scores = tl.sum(tl.load(key + token[:, None] * key_m, mask=there, other=0.0).to(tl.float32) * query[None], 1)
        if mask is not None:
            visible &= tl.load(mask + row * mask_b + time * mask_t + token, mask=visible, other=0).to(tl.int1)
        scores = tl.where(visible, scores, LOW)
        higher = tl.maximum(largest, tl.max(scores, 0))
        share_of = tl.where(visible, tl.exp(scores - higher), 0.0)
        before = tl.exp(largest - higher)
        values = tl.load(value + token[:, None] * value_m, mask=there, other=0.0).to(tl.float32)
        total = total * before + tl.sum(values * share_of[:, None], 0)
        weight = weight * before + tl.sum(share_of, 0)
        largest = higher
        start += TOKENS
    place = (n * tl.num_programs(0) + head) * tl.num_programs(1) + split
    tl.store(out + place * D_HEAD + d, total, mask=d < D_HEAD)
    tl.store(stats + 2 * place, largest)
    tl.store(stats + 2 * place + 1, weight)


@triton.jit
def project(
    shares, stats, w_out, b_out, a,
    W: tl.constexpr, D_HEAD: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (W / ROWS, N). a = attention's output through W_o."""
    rows, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    d, split = tl.arange(0, HEAD), tl.arange(0, PADDED)
    total = tl.zeros([ROWS], tl.float32)
    for head in tl.static_range(W // D_HEAD):
        place = (n * (W // D_HEAD) + head) * SPLITS + split
        largest = tl.load(stats + 2 * place, mask=split < SPLITS, other=LOW)
        weight = tl.exp(largest - tl.max(largest, 0))
        inside = (split < SPLITS)[:, None] & (d < D_HEAD)[None]
        values = tl.load(shares + place[:, None] * D_HEAD + d[None], mask=inside, other=0.0)
        whole = tl.sum(weight * tl.load(stats + 2 * place + 1, mask=split < SPLITS, other=0.0), 0)
        vector = tl.sum(values * weight[:, None], 0) / whole
        total += product(w_out, rows, head * D_HEAD + d, W, W, vector)
    if b_out is not None:
        total += tl.load(b_out + rows, mask=rows < W, other=0.0).to(tl.float32)
    tl.store(a + n * W + rows, total, mask=rows < W)


@triton.jit
def feed(
    a, gain, w_gate, w_up, w_down, parts, positions,
    W: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, UNITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (F / UNITS, N). A part of SwiGLU(RMSNorm(a)) is what UNITS of its inner width add to it."""
    part, n = tl.program_id(0), tl.program_id(1)
    units = part * UNITS + tl.arange(0, UNITS)
    gate = product_of_norm(w_gate, units, F, a + n * W, 0, gain, W, EPS, STEP, 1, 1)
    hidden = gate * tl.sigmoid(gate) * product_of_norm(w_up, units, F, a + n * W, 0, gain, W, EPS, STEP, 1, 1)
    for start in tl.static_range(0, W, STEP):
        rows = start + tl.arange(0, STEP)
        total = product(w_down, rows, units, W, F, hidden)
        tl.store(parts + (part * positions + n) * W + rows, total, mask=rows < W)


@triton.jit
def expand(
    parts, weight, out, squares, positions,
    D: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Grid (D / ROWS, N). The sum of parts through W_up, and the sum of its squares, program by program."""
    program, n = tl.program_id(0), tl.program_id(1)
    rows = program * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, W, STEP):
        columns = start + tl.arange(0, STEP)
        total += product(weight, rows, columns, D, W, added(parts + n * W, columns, W, positions * W, COUNT, PADDED))
    tl.store(out + n * D + rows, total, mask=rows < D)
    tl.store(squares + n * tl.num_programs(0) + program, tl.sum(total * total, 0))


@triton.jit
def finish(
    out, squares, gate, keep, y, sum_, queries, keep_b, keep_t,
    D: tl.constexpr, EPS: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (D / COLUMNS, N). y + gate * RMSNorm(out), where the branch may speak."""
    n = tl.program_id(1)
    columns, program = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    whole = tl.sum(tl.load(squares + n * COUNT + program, mask=program < COUNT, other=0.0), 0)
    update = tl.load(out + n * D + columns, mask=columns < D, other=0.0) * tl.rsqrt(whole / D + EPS)
    update *= tl.load(gate).to(tl.float32)
    if keep is not None:
        update = tl.where(tl.load(keep + n // queries * keep_b + n % queries * keep_t).to(tl.int1), update, 0.0)
    before = tl.load(y + n * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(sum_ + n * D + columns, before + update, mask=columns < D)
