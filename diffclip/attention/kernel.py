"""Both maps, their difference, the norm of its heads and the layout of the result in one Triton kernel, as torch
operators: the form "triton" of v1 and v2.

The maps are never written out, forward or backward (the scheme of FlashAttention-2, Dao 2023, for two maps at once):
kept are the inputs and, for each row of each map, the logarithm of its sum. The backward pass computes the two mixed
values of a row again, then takes the gradients of keys and values by blocks of keys, and those of queries by blocks of
queries. Both maps share the product of the values with the gradient of the difference. Nothing is kept or drawn for
dropout: whoever wants it takes another form. With TRITON_INTERPRET=1 it runs on a CPU, very slowly: for tests.
"""
# ruff: noqa: ANN001, ANN202, SIM108 - what Triton compiles has no types, and less of Python
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ON_CPU = triton is not None and triton.knobs.runtime.interpret  # read here, as it is when kernels are defined
WIDEST = 256  # values of a head
LARGE, SMALL = 64, 32  # rows, and columns, of a block: of 16-bit numbers, and of what takes more room
# operators have one name in a process, and copies of this file are saved with models
NAMESPACE = "diffclip" if __name__.startswith("diffclip.") else __name__.replace(".", "_")


def takes(q: Tensor, v: Tensor, attn_mask: Tensor | None, dropout: float) -> bool:
    """Whether the kernel can compute with these queries and values, each (batch, heads, tokens, width)."""
    return (
        triton is not None
        and (q.is_cuda or ON_CPU)
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.dtype == v.dtype
        and v.shape[-1] <= WIDEST
        and not dropout
        and not (attn_mask is not None and attn_mask.requires_grad)
    )


def mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_: Tensor,
    weight: Tensor | None,
    eps: float,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Return the (normed) differences of all pairs side by side, (batch, tokens, pairs * width of v).

    Args:
        q: (batch, 2 pairs, tokens, d).
        k: as q, or (batch, pairs, tokens, d) where both queries of a pair look at the same keys.
        v: (batch, pairs, tokens, width).
        lambda_: broadcastable to (batch, pairs, tokens, 1).
        weight: (width) of the norm, its constant factor included; None is no norm.
        attn_mask: boolean (True = attend) or additive, broadcastable to (batch, heads of k, tokens, tokens).
    """
    if attn_mask is not None and is_causal:
        raise ValueError("give either attn_mask or is_causal, not both")
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -torch.inf)
    return differences(q, k, v, lambda_, weight, attn_mask, is_causal, eps)[0]


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def _tile(base, rows, stride, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """A (rows, BLOCK) tile of a (tokens, WIDTH) matrix; 0 outside it."""
        columns = tl.arange(0, BLOCK)
        inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
        return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def _put(base, tile, rows, stride, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """The way back of `_tile`."""
        columns = tl.arange(0, BLOCK)
        inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
        tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)

    @triton.jit
    def _scores(
        q, k, mask, rows, columns, tokens, scale, mask_row, mask_column,
        MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Scores of a block, times log2(e); -inf where a row does not look."""
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        allowed = (rows[:, None] < tokens) & (columns[None, :] < tokens)
        if MASKED:
            at = mask + rows[:, None] * mask_row + columns[None, :] * mask_column
            scores += tl.load(at, mask=allowed, other=0.0).to(tl.float32) * LOG2E
        if CAUSAL:
            seen = rows[:, None] >= columns[None, :]
        else:
            seen = rows[:, None] >= 0
        return tl.where(seen & (columns[None, :] < tokens), scores, float("-inf"))

    @triton.jit
    def _online(scores, v, most, total, mixed, PRECISION: tl.constexpr):
        """One step of the softmax that sees a block of columns at a time."""
        new = tl.maximum(most, tl.max(scores, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(most - finite)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        return new, total, mixed

    @triton.jit
    def _forward(
        Q, K, V, MASK, LAMBDA, WEIGHT, OUT, LSE,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_column, lambda_batch, lambda_head, lambda_row,
        tokens, pairs, scale, eps,
        D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, TWO_KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
        NORM: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One block of rows of one pair: its part of the result, and the logarithms of both maps' sums."""
        start = tl.program_id(0) * ROWS
        index = tl.program_id(1).to(tl.int64)
        batch, pair = index // pairs, index % pairs
        second = 1 if TWO_KEYS else 0  # how many heads of keys further the second map's are
        rows = start + tl.arange(0, ROWS)
        q1 = _tile(Q + batch * q_batch + 2 * pair * q_head, rows, q_row, tokens, D, BD)
        q2 = _tile(Q + batch * q_batch + (2 * pair + 1) * q_head, rows, q_row, tokens, D, BD)
        first_key = (1 + second) * pair
        k_base = K + batch * k_batch + first_key * k_head
        v_base = V + batch * v_batch + pair * v_head
        mask = MASK + batch * mask_batch + first_key * mask_head
        most1 = tl.full([ROWS], float("-inf"), tl.float32)
        most2 = most1
        total1 = tl.zeros([ROWS], tl.float32)
        total2 = total1
        mixed1 = tl.zeros([ROWS, BDV], tl.float32)
        mixed2 = mixed1
        end = tl.minimum(tokens, start + ROWS) if CAUSAL else tokens
        for at in range(0, end, COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            v = _tile(v_base, columns, v_row, tokens, DV, BDV)
            k1 = _tile(k_base, columns, k_row, tokens, D, BD)
            s = _scores(q1, k1, mask, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            most1, total1, mixed1 = _online(s, v, most1, total1, mixed1, PRECISION)
            k2 = _tile(k_base + k_head, columns, k_row, tokens, D, BD) if TWO_KEYS else k1
            other = mask + second * mask_head
            s = _scores(q2, k2, other, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            most2, total2, mixed2 = _online(s, v, most2, total2, mixed2, PRECISION)
        at = LAMBDA + batch * lambda_batch + pair * lambda_head + rows * lambda_row
        lambda_ = tl.load(at, mask=rows < tokens, other=0.0)
        out = mixed1 / total1[:, None] - lambda_[:, None] * (mixed2 / total2[:, None])
        if NORM:
            values = tl.arange(0, BDV)
            weight = tl.load(WEIGHT + values, mask=values < DV, other=0.0).to(tl.float32)
            out = out * tl.rsqrt(tl.sum(out * out, 1) / DV + eps)[:, None] * weight[None, :]
        _put(OUT + (batch * tokens * pairs + pair) * DV, out, rows, pairs * DV, tokens, DV, BDV)
        tl.store(LSE + 2 * index * tokens + rows, most1 + tl.log2(total1), mask=rows < tokens)
        tl.store(LSE + (2 * index + 1) * tokens + rows, most2 + tl.log2(total2), mask=rows < tokens)

    @triton.jit
    def _backward_rows(
        Q, K, V, MASK, LAMBDA, WEIGHT, LSE, GRAD, DIFFERENCE, DELTA, DLAMBDA, DWEIGHT,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_column, lambda_batch, lambda_head, lambda_row,
        tokens, pairs, scale, eps,
        D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, TWO_KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
        NORM: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One block of rows of one pair: the gradients of the difference, of lambda and, summed over the block, of the
        norm's weight; and each map's sum of its entries times their gradients, which softmax's gradient needs.
        """
        start = tl.program_id(0) * ROWS
        index = tl.program_id(1).to(tl.int64)
        batch, pair = index // pairs, index % pairs
        second = 1 if TWO_KEYS else 0
        rows = start + tl.arange(0, ROWS)
        q1 = _tile(Q + batch * q_batch + 2 * pair * q_head, rows, q_row, tokens, D, BD)
        q2 = _tile(Q + batch * q_batch + (2 * pair + 1) * q_head, rows, q_row, tokens, D, BD)
        first_key = (1 + second) * pair
        k_base = K + batch * k_batch + first_key * k_head
        v_base = V + batch * v_batch + pair * v_head
        mask = MASK + batch * mask_batch + first_key * mask_head
        sum1 = tl.load(LSE + 2 * index * tokens + rows, mask=rows < tokens, other=0.0)
        sum2 = tl.load(LSE + (2 * index + 1) * tokens + rows, mask=rows < tokens, other=0.0)
        mixed1 = tl.zeros([ROWS, BDV], tl.float32)
        mixed2 = mixed1
        end = tl.minimum(tokens, start + ROWS) if CAUSAL else tokens
        for at in range(0, end, COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            v = _tile(v_base, columns, v_row, tokens, DV, BDV)
            k1 = _tile(k_base, columns, k_row, tokens, D, BD)
            s = _scores(q1, k1, mask, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            mixed1 += tl.dot(tl.exp2(s - sum1[:, None]).to(v.dtype), v, input_precision=PRECISION)
            k2 = _tile(k_base + k_head, columns, k_row, tokens, D, BD) if TWO_KEYS else k1
            other = mask + second * mask_head
            s = _scores(q2, k2, other, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            mixed2 += tl.dot(tl.exp2(s - sum2[:, None]).to(v.dtype), v, input_precision=PRECISION)
        at = LAMBDA + batch * lambda_batch + pair * lambda_head + rows * lambda_row
        lambda_ = tl.load(at, mask=rows < tokens, other=0.0)
        grad = _tile(GRAD + (batch * tokens * pairs + pair) * DV, rows, pairs * DV, tokens, DV, BDV).to(tl.float32)
        if NORM:
            values = tl.arange(0, BDV)
            weight = tl.load(WEIGHT + values, mask=values < DV, other=0.0).to(tl.float32)
            difference = mixed1 - lambda_[:, None] * mixed2
            inverse = tl.rsqrt(tl.sum(difference * difference, 1) / DV + eps)[:, None]
            normed = difference * inverse
            # rows behind the last are 0 times whatever their values are
            shares = tl.sum(tl.where(rows[:, None] < tokens, grad * normed, 0.0), 0)
            block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(DWEIGHT + block * DV + values, shares, mask=values < DV)
            grad *= weight[None, :]
            grad = inverse * (grad - normed * (tl.sum(grad * normed, 1) / DV)[:, None])
        along1, along2 = tl.sum(grad * mixed1, 1), tl.sum(grad * mixed2, 1)
        _put(DIFFERENCE + index * tokens * DV, grad, rows, DV, tokens, DV, BDV)
        tl.store(DELTA + 2 * index * tokens + rows, along1, mask=rows < tokens)
        tl.store(DELTA + (2 * index + 1) * tokens + rows, -lambda_ * along2, mask=rows < tokens)
        tl.store(DLAMBDA + index * tokens + rows, -along2, mask=rows < tokens)

    @triton.jit
    def _backward_keys(
        Q, K, V, MASK, LAMBDA, LSE, DIFFERENCE, DELTA, DK, DV_,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_column, lambda_batch, lambda_head, lambda_row,
        tokens, pairs, scale,
        D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, TWO_KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One block of keys and values of one pair: their gradients."""
        start = tl.program_id(0) * COLUMNS
        index = tl.program_id(1).to(tl.int64)
        batch, pair = index // pairs, index % pairs
        second = 1 if TWO_KEYS else 0
        columns = start + tl.arange(0, COLUMNS)
        first_key = (1 + second) * pair
        k_base = K + batch * k_batch + first_key * k_head
        mask = MASK + batch * mask_batch + first_key * mask_head
        other = mask + second * mask_head
        k1 = _tile(k_base, columns, k_row, tokens, D, BD)
        k2 = _tile(k_base + k_head, columns, k_row, tokens, D, BD) if TWO_KEYS else k1
        v = _tile(V + batch * v_batch + pair * v_head, columns, v_row, tokens, DV, BDV)
        dk1 = tl.zeros([COLUMNS, BD], tl.float32)
        dk2 = dk1
        dv = tl.zeros([COLUMNS, BDV], tl.float32)
        begin = start // ROWS * ROWS if CAUSAL else 0
        for at in range(begin, tokens, ROWS):
            rows = at + tl.arange(0, ROWS)
            inside = rows < tokens
            q1 = _tile(Q + batch * q_batch + 2 * pair * q_head, rows, q_row, tokens, D, BD)
            q2 = _tile(Q + batch * q_batch + (2 * pair + 1) * q_head, rows, q_row, tokens, D, BD)
            grad = _tile(DIFFERENCE + index * tokens * DV, rows, DV, tokens, DV, BDV)
            lambda_ = tl.load(
                LAMBDA + batch * lambda_batch + pair * lambda_head + rows * lambda_row, mask=inside, other=0.0
            )
            sum1 = tl.load(LSE + 2 * index * tokens + rows, mask=inside, other=0.0)
            sum2 = tl.load(LSE + (2 * index + 1) * tokens + rows, mask=inside, other=0.0)
            delta1 = tl.load(DELTA + 2 * index * tokens + rows, mask=inside, other=0.0)
            delta2 = tl.load(DELTA + (2 * index + 1) * tokens + rows, mask=inside, other=0.0)
            s = _scores(q1, k1, mask, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            map1 = tl.exp2(s - sum1[:, None])
            s = _scores(q2, k2, other, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            map2 = tl.exp2(s - sum2[:, None])
            map_ = (map1 - lambda_[:, None] * map2).to(v.dtype)
            dv += tl.dot(tl.trans(map_), grad, input_precision=PRECISION)
            dmap = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds1 = map1 * (dmap - delta1[:, None])
            ds2 = map2 * (-lambda_[:, None] * dmap - delta2[:, None])
            dk1 += tl.dot(tl.trans(ds1.to(v.dtype)), q1, input_precision=PRECISION)
            if TWO_KEYS:
                dk2 += tl.dot(tl.trans(ds2.to(v.dtype)), q2, input_precision=PRECISION)
            else:
                dk1 += tl.dot(tl.trans(ds2.to(v.dtype)), q2, input_precision=PRECISION)
        heads = (1 + second) * pairs  # gradients lie as (batch, tokens, heads, width)
        dk_base = DK + (batch * tokens * heads + first_key) * D
        _put(dk_base, dk1 * scale, columns, heads * D, tokens, D, BD)
        if TWO_KEYS:
            _put(dk_base + D, dk2 * scale, columns, heads * D, tokens, D, BD)
        _put(DV_ + (batch * tokens * pairs + pair) * DV, dv, columns, pairs * DV, tokens, DV, BDV)

    @triton.jit
    def _backward_queries(
        Q, K, V, MASK, LAMBDA, LSE, DIFFERENCE, DELTA, DQ,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_column, lambda_batch, lambda_head, lambda_row,
        tokens, pairs, scale,
        D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, TWO_KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One block of queries of one pair: the gradients of both its queries."""
        start = tl.program_id(0) * ROWS
        index = tl.program_id(1).to(tl.int64)
        batch, pair = index // pairs, index % pairs
        second = 1 if TWO_KEYS else 0
        rows = start + tl.arange(0, ROWS)
        inside = rows < tokens
        q1 = _tile(Q + batch * q_batch + 2 * pair * q_head, rows, q_row, tokens, D, BD)
        q2 = _tile(Q + batch * q_batch + (2 * pair + 1) * q_head, rows, q_row, tokens, D, BD)
        grad = _tile(DIFFERENCE + index * tokens * DV, rows, DV, tokens, DV, BDV)
        at = LAMBDA + batch * lambda_batch + pair * lambda_head + rows * lambda_row
        lambda_ = tl.load(at, mask=inside, other=0.0)
        sum1 = tl.load(LSE + 2 * index * tokens + rows, mask=inside, other=0.0)
        sum2 = tl.load(LSE + (2 * index + 1) * tokens + rows, mask=inside, other=0.0)
        delta1 = tl.load(DELTA + 2 * index * tokens + rows, mask=inside, other=0.0)
        delta2 = tl.load(DELTA + (2 * index + 1) * tokens + rows, mask=inside, other=0.0)
        first_key = (1 + second) * pair
        k_base = K + batch * k_batch + first_key * k_head
        v_base = V + batch * v_batch + pair * v_head
        mask = MASK + batch * mask_batch + first_key * mask_head
        other = mask + second * mask_head
        dq1 = tl.zeros([ROWS, BD], tl.float32)
        dq2 = dq1
        end = tl.minimum(tokens, start + ROWS) if CAUSAL else tokens
        for at in range(0, end, COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            v = _tile(v_base, columns, v_row, tokens, DV, BDV)
            k1 = _tile(k_base, columns, k_row, tokens, D, BD)
            dmap = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            s = _scores(q1, k1, mask, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            ds = tl.exp2(s - sum1[:, None]) * (dmap - delta1[:, None])
            dq1 += tl.dot(ds.to(k1.dtype), k1, input_precision=PRECISION)
            k2 = _tile(k_base + k_head, columns, k_row, tokens, D, BD) if TWO_KEYS else k1
            s = _scores(q2, k2, other, rows, columns, tokens, scale, mask_row, mask_column, MASKED, CAUSAL, PRECISION)
            ds = tl.exp2(s - sum2[:, None]) * (-lambda_[:, None] * dmap - delta2[:, None])
            dq2 += tl.dot(ds.to(k2.dtype), k2, input_precision=PRECISION)
        base = DQ + (batch * tokens * pairs + pair) * 2 * D
        _put(base, dq1 * scale, rows, 2 * pairs * D, tokens, D, BD)
        _put(base + D, dq2 * scale, rows, 2 * pairs * D, tokens, D, BD)

    def _arguments(
        q: Tensor, k: Tensor, v: Tensor, lambda_: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[list, list, dict]:
        """(tensors, numbers, constants) that all kernels begin with, continue with, and end with."""
        batch, heads, tokens, d = q.shape
        pairs, width = v.shape[1], v.shape[-1]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        lambdas = lambda_.float().expand(batch, pairs, tokens, 1)
        masks = q if mask is None else mask.expand(batch, k.shape[1], tokens, tokens)
        strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *masks.stride(), *lambdas.stride()[:3]]
        block = LARGE if q.element_size() == 2 and width <= 128 else SMALL
        constants = {
            "D": d,
            "DV": width,
            "BD": max(16, triton.next_power_of_2(d)),
            "BDV": max(16, triton.next_power_of_2(width)),
            "ROWS": block,
            "COLUMNS": block,
            "TWO_KEYS": k.shape[1] == heads,
            "MASKED": mask is not None,
            "CAUSAL": is_causal,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "num_warps": 8 if width >= 128 or q.element_size() == 4 else 4,
            "num_stages": 2,
        }
        return [q, k, v, masks, lambdas], [*strides, tokens, pairs, d**-0.5], constants

    def _grid(q: Tensor, v: Tensor, block: int) -> tuple[int, int]:
        return triton.cdiv(q.shape[2], block), v.shape[0] * v.shape[1]

    @torch.library.custom_op(f"{NAMESPACE}::differences", mutates_args=())
    def differences(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lambda_: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """(what `mixed` returns, the base-2 logarithms of the maps' sums (batch, pairs, 2, tokens))."""
        tensors, numbers, constants = _arguments(q, k, v, lambda_, mask, is_causal)
        out, lse = _results(q, v)
        norm = {"NORM": weight is not None}
        before = (q if weight is None else weight, out, lse)
        _forward[_grid(q, v, constants["ROWS"])](*tensors, *before, *numbers, eps, **norm, **constants)
        return out, lse

    @torch.library.custom_op(f"{NAMESPACE}::differences_backward", mutates_args=())
    def differences_backward(
        grad: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lambda_: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, lambda (batch, pairs, tokens, 1) and, empty without a norm, of its weight."""
        tensors, numbers, constants = _arguments(q, k, v, lambda_, mask, is_causal)
        grad = grad.contiguous()
        dq, dk, dv = (_like(x) for x in (q, k, v))
        grid = _grid(q, v, constants["ROWS"])
        difference = v.new_empty(v.shape)
        delta = torch.empty_like(lse)
        dlambda = lse.new_empty(*v.shape[:3], 1)
        dweight = lse.new_empty(grid[0] * grid[1], v.shape[-1] if weight is not None else 0)
        norm = {"NORM": weight is not None}
        before = (q if weight is None else weight, lse, grad, difference, delta, dlambda, dweight)
        _backward_rows[grid](*tensors, *before, *numbers, eps, **norm, **constants)
        _backward_keys[grid](*tensors, lse, difference, delta, dk, dv, *numbers, **constants)
        _backward_queries[grid](*tensors, lse, difference, delta, dq, *numbers, **constants)
        return dq, dk, dv, dlambda, dweight.sum(0)

    def _like(x: Tensor) -> Tensor:
        """An empty (batch, heads, tokens, width) that lies in memory as (batch, tokens, heads, width)."""
        batch, heads, tokens, width = x.shape
        return x.new_empty(batch, tokens, heads, width).transpose(1, 2)

    def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, pairs, tokens, width = v.shape
        lse = torch.empty(batch, pairs, 2, tokens, dtype=torch.float32, device=q.device)
        return v.new_empty(batch, tokens, pairs * width), lse

    @differences.register_fake
    def _(q, k, v, lambda_, weight, mask, is_causal, eps):
        return _results(q, v)

    @differences_backward.register_fake
    def _(grad, lse, q, k, v, lambda_, weight, mask, is_causal, eps):
        dweight = lse.new_empty(v.shape[-1] if weight is not None else 0)
        return _like(q), _like(k), _like(v), lse.new_empty(*v.shape[:3], 1), dweight

    def _keep(ctx, inputs, output):
        *tensors, ctx.is_causal, ctx.eps = inputs
        ctx.save_for_backward(output[1], *tensors)

    def _gradients(ctx, grad, _):
        lse, q, k, v, lambda_, weight, mask = ctx.saved_tensors
        dq, dk, dv, dlambda, dweight = differences_backward(
            grad, lse, q, k, v, lambda_, weight, mask, ctx.is_causal, ctx.eps
        )
        dlambda = dlambda.sum_to_size(lambda_.shape).to(lambda_.dtype)
        return dq, dk, dv, dlambda, None if weight is None else dweight.to(weight.dtype), None, None, None

    differences.register_autograd(_gradients, setup_context=_keep)
