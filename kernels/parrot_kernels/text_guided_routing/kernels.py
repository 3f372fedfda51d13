"""Triton kernels of `text_guided_routing`; `triton_impl.py` launches them and says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

# S images, T text rows, H hidden_size, E experts


@triton.jit
def _load_spans(start_ptr, end_ptr, images, num_images, num_rows):
    """First and last + 1 text row of `images`, clamped to the text; 0 and 0 beyond the last image."""
    exists = images < num_images
    start = tl.load(start_ptr + images, mask=exists, other=0).to(tl.int32)
    end = tl.load(end_ptr + images, mask=exists, other=0).to(tl.int32)
    return tl.maximum(start, 0), tl.minimum(end, num_rows)


@triton.jit
def _image_window(start_ptr, end_ptr, num_images, num_rows, first, last, SCAN: tl.constexpr):
    """The smallest range of images that holds every image whose span touches the rows [first, last)."""
    low, high = num_images, 0
    for begin in range(0, num_images, SCAN):
        images = begin + tl.arange(0, SCAN)
        start, end = _load_spans(start_ptr, end_ptr, images, num_images, num_rows)
        touches = (start < last) & (end > first) & (start < end)
        low = tl.minimum(low, tl.min(tl.where(touches, images, num_images), axis=0))
        high = tl.maximum(high, tl.max(tl.where(touches, images + 1, 0), axis=0))
    return low, high


@triton.jit
def _scores_and_products(
    query_ptr, text_ptr, router_ptr, stride_q, stride_t, stride_w, images, rows, num_images, num_rows,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """text @ query.T [BLOCK_T, BLOCK_S] and text @ router.T [BLOCK_T, BLOCK_E] from one pass over the text rows."""
    experts = tl.arange(0, BLOCK_E)
    text_rows = text_ptr + rows.to(tl.int64)[:, None] * stride_t
    queries = query_ptr + images.to(tl.int64)[None, :] * stride_q
    routers = router_ptr + experts[None, :] * stride_w
    scores = tl.zeros((rows.shape[0], images.shape[0]), dtype=tl.float32)
    products = tl.zeros((rows.shape[0], BLOCK_E), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        inside = columns < H
        text = tl.load(text_rows + columns[None, :], mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
        query = tl.load(queries + columns[:, None], mask=inside[:, None] & (images < num_images)[None, :], other=0.0)
        router = tl.load(routers + columns[:, None], mask=inside[:, None] & (experts < E)[None, :], other=0.0)
        scores = tl.dot(text, query, scores, input_precision="ieee")
        products = tl.dot(text, router, products, input_precision="ieee")
    return scores, products


@triton.jit
def _softmax_part(scores, inside):
    """Largest score, exponentials and their sum of each column over the rows that are `inside`."""
    scores = tl.where(inside, scores, -float("inf"))
    top = tl.max(scores, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    exponentials = tl.exp(scores - top[None, :])
    return top, exponentials, tl.sum(exponentials, axis=0)


@triton.jit
def _arrive(arrived_ptr, images, start, end, touched, BLOCK_T: tl.constexpr):
    """Publishes this program's part of the `touched` images; 1 for each image whose last part this was."""
    # Parts are written by all threads of this program; the barrier puts them before the release of any one of them.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + images, 1, mask=touched, sem="acq_rel")
    parts = (end - 1) // BLOCK_T - start // BLOCK_T + 1
    finished = (touched & (before == parts - 1)).to(tl.int32)
    tl.debug_barrier()
    return finished


@triton.jit
def _merge(parts_ptr, image, start, end, num_blocks, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr):
    """Softmax average of the values of one image, the largest score and the sum, from parts [S, blocks, V + 2]."""
    PARTS: tl.constexpr = 32
    columns = tl.arange(0, BLOCK_V)
    values = tl.zeros((BLOCK_V,), dtype=tl.float32)
    top, total = -float("inf"), 0.0
    stop = (end - 1) // BLOCK_T + 1
    for block in range(start // BLOCK_T, stop, PARTS):
        blocks = block + tl.arange(0, PARTS)
        part = parts_ptr + (tl.cast(image, tl.int64) * num_blocks + blocks) * (V + 2)
        # Other programs wrote them: past the first-level cache, which is not coherent.
        tops = tl.load(part + V, mask=blocks < stop, other=-float("inf"), cache_modifier=".cg")
        totals = tl.load(part + V + 1, mask=blocks < stop, other=0.0, cache_modifier=".cg")
        mask = (blocks < stop)[:, None] & (columns < V)[None, :]
        parts = tl.load(part[:, None] + columns[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp(tops - highest)
        rescale = tl.exp(top - highest)
        values = values * rescale + tl.sum(parts * weights[:, None], axis=0)
        total = total * rescale + tl.sum(totals * weights, axis=0)
        top = highest
    return values / total, top, total


_SIZES = ["num_images", "num_rows"]  # differ from batch to batch: not worth a compilation each


@triton.jit(do_not_specialize=_SIZES)
def fwd_kernel(
    query_ptr, text_ptr, start_ptr, end_ptr, router_ptr, parts_ptr, arrived_ptr, logits_ptr, lse_ptr,
    num_images, num_rows, stride_q, stride_t, stride_w, scale,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    SCAN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Parts of the images that read BLOCK_T rows of text; logits and lse of those that are complete then."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    experts = tl.arange(0, BLOCK_E)
    if block == 0:  # images without text, which no program arrives at
        for begin in range(0, num_images, BLOCK_S):
            images = begin + tl.arange(0, BLOCK_S)
            start, end = _load_spans(start_ptr, end_ptr, images, num_images, num_rows)
            empty = (images < num_images) & (start >= end)
            tl.store(lse_ptr + images, -float("inf"), mask=empty)
            at = logits_ptr + images.to(tl.int64)[:, None] * E + experts[None, :]
            tl.store(at, 0.0, mask=empty[:, None] & (experts < E)[None, :])

    first = block * BLOCK_T
    last = tl.minimum(first + BLOCK_T, num_rows)
    rows = first + tl.arange(0, BLOCK_T)
    low, high = _image_window(start_ptr, end_ptr, num_images, num_rows, first, last, SCAN)
    for begin in range(low, high, BLOCK_S):
        images = begin + tl.arange(0, BLOCK_S)
        scores, products = _scores_and_products(
            query_ptr, text_ptr, router_ptr, stride_q, stride_t, stride_w, images, rows, num_images, num_rows,
            H, E, BLOCK_E, BLOCK_H,
        )  # fmt: skip
        start, end = _load_spans(start_ptr, end_ptr, images, num_images, num_rows)
        touched = (start < last) & (end > first) & (start < end)
        inside = (rows[:, None] >= start[None, :]) & (rows[:, None] < end[None, :])
        top, weights, total = _softmax_part(scores * scale, inside)
        values = tl.dot(tl.trans(weights), products, input_precision="ieee")
        part = parts_ptr + (images.to(tl.int64) * num_blocks + block) * (E + 2)
        tl.store(part[:, None] + experts[None, :], values, mask=touched[:, None] & (experts < E)[None, :])
        tl.store(part + E, top, mask=touched)
        tl.store(part + E + 1, total, mask=touched)
        finished = _arrive(arrived_ptr, images, start, end, touched, BLOCK_T)
        if tl.max(finished, axis=0) > 0:
            for image in range(begin, tl.minimum(begin + BLOCK_S, high)):
                if tl.max(tl.where(images == image, finished, 0), axis=0) > 0:
                    start_1, end_1 = _load_spans(start_ptr, end_ptr, image, num_images, num_rows)
                    logits, top_1, total_1 = _merge(parts_ptr, image, start_1, end_1, num_blocks, E, BLOCK_E, BLOCK_T)
                    at = logits_ptr + tl.cast(image, tl.int64) * E + experts
                    tl.store(at, logits, mask=experts < E)
                    tl.store(lse_ptr + image, top_1 + tl.log(total_1))
                    tl.store(arrived_ptr + image, 0)


@triton.jit(do_not_specialize=_SIZES)
def bwd_scores_kernel(
    query_ptr, text_ptr, start_ptr, end_ptr, router_ptr, grad_logits_ptr, grad_lse_ptr, scores_ptr, grads_ptr,
    parts_ptr, arrived_ptr, stats_ptr, num_images, num_rows, stride_q, stride_t, stride_w, scale,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    SCAN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Scores and d loss / d attention [S, T]; of each image largest score, sum and mean gradient [S, 3]."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    experts = tl.arange(0, BLOCK_E)
    first = block * BLOCK_T
    last = tl.minimum(first + BLOCK_T, num_rows)
    rows = first + tl.arange(0, BLOCK_T)
    low, high = _image_window(start_ptr, end_ptr, num_images, num_rows, first, last, SCAN)
    for begin in range(low, high, BLOCK_S):
        images = begin + tl.arange(0, BLOCK_S)
        scores, products = _scores_and_products(
            query_ptr, text_ptr, router_ptr, stride_q, stride_t, stride_w, images, rows, num_images, num_rows,
            H, E, BLOCK_E, BLOCK_H,
        )  # fmt: skip
        scores *= scale
        at = grad_logits_ptr + images.to(tl.int64)[None, :] * E + experts[:, None]
        exists = (experts < E)[:, None] & (images < num_images)[None, :]
        grads = tl.dot(products, tl.load(at, mask=exists, other=0.0), input_precision="ieee")
        start, end = _load_spans(start_ptr, end_ptr, images, num_images, num_rows)
        touched = (start < last) & (end > first) & (start < end)
        inside = (rows[:, None] >= start[None, :]) & (rows[:, None] < end[None, :])
        pairs = images.to(tl.int64)[None, :] * num_rows + rows[:, None]
        tl.store(scores_ptr + pairs, scores, mask=inside)
        tl.store(grads_ptr + pairs, grads, mask=inside)
        top, weights, total = _softmax_part(scores, inside)
        part = parts_ptr + (images.to(tl.int64) * num_blocks + block) * 3
        tl.store(part, tl.sum(weights * grads, axis=0), mask=touched)
        tl.store(part + 1, top, mask=touched)
        tl.store(part + 2, total, mask=touched)
        finished = _arrive(arrived_ptr, images, start, end, touched, BLOCK_T)
        if tl.max(finished, axis=0) > 0:
            for image in range(begin, tl.minimum(begin + BLOCK_S, high)):
                if tl.max(tl.where(images == image, finished, 0), axis=0) > 0:
                    start_1, end_1 = _load_spans(start_ptr, end_ptr, image, num_images, num_rows)
                    means, top_1, total_1 = _merge(parts_ptr, image, start_1, end_1, num_blocks, 1, 1, BLOCK_T)
                    mean = tl.sum(means, axis=0)  # its one element
                    if grad_lse_ptr is not None:
                        mean -= tl.load(grad_lse_ptr + image)
                    tl.store(stats_ptr + image * 3, top_1)
                    tl.store(stats_ptr + image * 3 + 1, total_1)
                    tl.store(stats_ptr + image * 3 + 2, mean)
                    tl.store(arrived_ptr + image, 0)


@triton.jit
def _attention_tile(
    scores_ptr, grads_ptr, stats_ptr, start_ptr, end_ptr, images, rows, num_images, num_rows, scale,
):  # fmt: skip
    """Attention of `images` to `rows` and d loss / d (query . text) [BLOCK_S, BLOCK_T], zero outside the spans."""
    start, end = _load_spans(start_ptr, end_ptr, images, num_images, num_rows)
    inside = (rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None])
    pairs = images.to(tl.int64)[:, None] * num_rows + rows[None, :]
    scores = tl.load(scores_ptr + pairs, mask=inside, other=-float("inf"))
    grads = tl.load(grads_ptr + pairs, mask=inside, other=0.0)
    filled = start < end
    top = tl.load(stats_ptr + images * 3, mask=filled, other=0.0)
    total = tl.load(stats_ptr + images * 3 + 1, mask=filled, other=1.0)
    mean = tl.load(stats_ptr + images * 3 + 2, mask=filled, other=0.0)
    attention = tl.exp(scores - top[:, None]) / total[:, None]
    return attention, attention * (grads - mean[:, None]) * scale


@triton.jit(do_not_specialize=_SIZES)
def bwd_text_kernel(
    query_ptr, start_ptr, end_ptr, router_ptr, grad_logits_ptr, scores_ptr, grads_ptr, stats_ptr, grad_text_ptr,
    num_images, num_rows, stride_q, stride_w, scale,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_text [T, H] of BLOCK_T rows and BLOCK_H columns: a sum over the images that read them, in their order."""
    first = tl.program_id(0) * BLOCK_T
    last = tl.minimum(first + BLOCK_T, num_rows)
    rows = first + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    experts = tl.arange(0, BLOCK_E)
    gradient = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    grad_products = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    low, high = _image_window(start_ptr, end_ptr, num_images, num_rows, first, last, SCAN)
    for begin in range(low, high, BLOCK_S):
        images = begin + tl.arange(0, BLOCK_S)
        exists = images < num_images
        attention, grad_scores = _attention_tile(
            scores_ptr, grads_ptr, stats_ptr, start_ptr, end_ptr, images, rows, num_images, num_rows, scale
        )
        at = grad_logits_ptr + images.to(tl.int64)[:, None] * E + experts[None, :]
        grad_logits = tl.load(at, mask=exists[:, None] & (experts < E)[None, :], other=0.0)
        grad_products = tl.dot(tl.trans(attention), grad_logits, grad_products, input_precision=PRECISION)
        at = query_ptr + images.to(tl.int64)[:, None] * stride_q + columns[None, :]
        query = tl.load(at, mask=exists[:, None] & (columns < H)[None, :], other=0.0).to(tl.float32)
        gradient = tl.dot(tl.trans(grad_scores), query, gradient, input_precision=PRECISION)
    at = router_ptr + experts[:, None] * stride_w + columns[None, :]
    router = tl.load(at, mask=(experts < E)[:, None] & (columns < H)[None, :], other=0.0).to(tl.float32)
    gradient = tl.dot(grad_products, router, gradient, input_precision=PRECISION)
    at = grad_text_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(at, gradient, mask=(rows < num_rows)[:, None] & (columns < H)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def bwd_images_kernel(
    text_ptr, start_ptr, end_ptr, grad_logits_ptr, scores_ptr, grads_ptr, stats_ptr, grad_query_ptr, parts_ptr,
    arrived_ptr, grad_router_ptr, num_images, num_rows, stride_t, scale,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, NEEDS_QUERY: tl.constexpr,
    NEEDS_ROUTER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """grad_query of BLOCK_S images and grad_router (sum over images of grad_logits.T @ context), BLOCK_H columns."""
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    images = group * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    start, end = _load_spans(start_ptr, end_ptr, images, num_images, num_rows)
    context = tl.zeros((BLOCK_S, BLOCK_H), dtype=tl.float32)
    grad_query = tl.zeros((BLOCK_S, BLOCK_H), dtype=tl.float32)
    low = tl.min(tl.where(start < end, start, num_rows), axis=0)
    high = tl.max(tl.where(start < end, end, 0), axis=0)
    for row in range(low, high, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        at = text_ptr + rows.to(tl.int64)[:, None] * stride_t + columns[None, :]
        text = tl.load(at, mask=(rows < high)[:, None] & (columns < H)[None, :], other=0.0).to(tl.float32)
        attention, grad_scores = _attention_tile(
            scores_ptr, grads_ptr, stats_ptr, start_ptr, end_ptr, images, rows, num_images, num_rows, scale
        )
        if NEEDS_QUERY:
            grad_query = tl.dot(grad_scores, text, grad_query, input_precision=PRECISION)
        if NEEDS_ROUTER:
            context = tl.dot(attention, text, context, input_precision=PRECISION)
    exists = (images < num_images)[:, None]
    if NEEDS_QUERY:
        at = grad_query_ptr + images.to(tl.int64)[:, None] * H + columns[None, :]
        tl.store(at, grad_query, mask=exists & (columns < H)[None, :])
    if NEEDS_ROUTER:
        experts = tl.arange(0, BLOCK_E)
        mask = (experts < E)[:, None] & (columns < H)[None, :]
        at = grad_logits_ptr + images.to(tl.int64)[None, :] * E + experts[:, None]
        grad_logits = tl.load(at, mask=(images < num_images)[None, :] & (experts < E)[:, None], other=0.0)
        part = tl.dot(grad_logits, context, input_precision=PRECISION)
        at = experts.to(tl.int64)[:, None] * H + columns[None, :]
        tl.store(parts_ptr + group.to(tl.int64) * (E * H) + at, part, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == num_groups - 1:
            tl.debug_barrier()
            grad_router = tl.zeros((BLOCK_E, BLOCK_H), dtype=tl.float32)
            for other in range(0, num_groups):
                whole = parts_ptr + tl.cast(other, tl.int64) * (E * H)
                grad_router += tl.load(whole + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(grad_router_ptr + at, grad_router, mask=mask)
            tl.store(arrived_ptr + tl.program_id(0), 0)
