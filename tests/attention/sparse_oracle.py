"""The policies that choose by content, query by query in NumPy float64 from the papers' formulas.

One row, one layer: q [T, N, H] and k, v [T, K, H] of positions 0..T-1, read in `calls` of so many
tokens. A query's keys are pairs (position, distance); rotary scores come from distances alone, as
in tests.attention.oracle, so nothing is ever placed at a position.
"""

import itertools

import numpy as np

from lminf.attention import rope
from tests.attention.oracle import _products, rates


def groups(calls, size):
    """Ranges of positions that choose together."""
    start = 0
    for call in calls:
        end = start + call
        while start < end:
            stop = min((start // size + 1) * size, end)
            yield start, stop
            start = stop


def score(scoring, q, k, distance):
    """Of one query [H] and keys [S, H] at these distances [S]."""
    products = _products(scoring.encoding, q[None, None], k[None], distance[None, None])[0, 0]
    products = products * scoring.scale
    if scoring.soft_cap is not None:
        products = scoring.soft_cap * np.tanh(products / scoring.soft_cap)
    return products


def weights(scores):
    some = np.exp(scores - scores.max())
    return some / some.sum()


def turned(scoring, q, k, distance):
    """What a query and keys say to each other at one distance, unscaled."""
    each = np.full((1, 1, len(k)), float(distance))
    return _products(scoring.encoding, q[None, None], k[None], each)[0, 0]


def top(scores, count):
    """Indices of the largest; equal ones: the lower."""
    return np.argsort(-scores, kind="stable")[:count]


def infllm(policy, scoring, q, k, v, calls):
    """As released: a block is formed after the step that pushed its last token out of the window.
    Where none is ever looked up, none is waited for.
    """
    tokens, heads, _ = q.shape
    share = heads // k.shape[1]
    L, G, size = policy.window, policy.sinks, policy.block
    out, attracted, summaries = np.zeros_like(q), np.zeros((tokens, heads)), []
    for start, stop in groups(calls, policy.exec_block):
        while G + (len(summaries) + 1) * size <= start - L + (policy.topk == 0):
            at = np.arange(size) + G + len(summaries) * size
            of_heads = [k[at[top(attracted[at, n], policy.repr_topk)], n // share].mean(0)
                        for n in range(heads)]  # fmt: skip
            summaries.append(of_heads)
        wanted = [
            sum(turned(scoring, q[start:stop, n].mean(0), np.array(block[n])[None], L - 1)[0]
                for n in range(heads))
            for block in summaries
        ]  # fmt: skip
        chosen = top(np.array(wanted), policy.topk) if wanted else []
        selected = {G + m * size + i for m in chosen for i in range(size)}
        left = G + len(summaries) * size  # from here on no block exists
        for i in range(start, stop):
            at = np.array([j for j in range(i + 1)
                           if i - j < L or j < G or j >= left or j in selected])  # fmt: skip
            distance = np.where(i - at < L, i - at, L - 1).astype(float)
            for n in range(heads):
                p = weights(score(scoring, q[i, n], k[at, n // share], distance))
                out[i, n] = p @ v[at, n // share]
                near = i - at < L
                attracted[at[near], n] += p[near]
    return out


def top_k(policy, scoring, q, k, v, calls):
    out, share = np.zeros_like(q), q.shape[1] // k.shape[1]
    ends = set(np.cumsum(calls) - 1)
    L, G = policy.window, policy.sinks
    far = L if policy.distance is None else policy.distance
    middle = L // 2 if policy.at is None else policy.at
    for i in range(len(q)):
        at = np.array([j for j in range(i + 1) if i - j < L or j < G])
        distance = np.where(i - at < L, i - at, far).astype(float)
        for n in range(q.shape[1]):
            scores, chosen = score(scoring, q[i, n], k[at, n // share], distance), at
            between = np.arange(G, max(i - L + 1, G))
            if i in ends and len(between):
                wanted = score(scoring, q[i, n], k[between, n // share], 0.0 * between + middle)
                best = top(wanted, policy.topk)
                scores = np.concatenate([scores, wanted[best]])
                chosen = np.concatenate([at, between[best]])
            out[i, n] = weights(scores) @ v[chosen, n // share]
    return out


def long_heads(policy, scoring, q, k, v, calls, ranked=lambda i: False):
    """How `calls` divide the text makes no difference. `ranked` are the queries that rank the chunk
    before their own among the others, and need not see it.
    """
    out, share, w = np.zeros_like(q), q.shape[1] // k.shape[1], policy.chunk
    for n in range(q.shape[1]):
        key, value = k[:, n // share], v[:, n // share]
        summaries = []
        for start in range(0, len(q) - w + 1, w):
            inside = np.arange(start, start + w)
            mixed = [weights(score(scoring, q[i, n], key[inside], (i - inside).astype(float)))
                     @ value[inside] for i in inside]  # fmt: skip
            # The keys as they are rotated inside the chunk are mixed too, so rotate them.
            placed = rotated(scoring.encoding, key[inside], inside - start)
            p = weights(placed @ np.mean(mixed, 0) * scoring.scale)
            summaries.append(p @ placed)
        for i in range(len(q)):
            own = i // w
            others = list(range(1, own if ranked(i) else own - 1))
            wanted = np.array([summaries[m] @ q[i, n] for m in others])
            best = [others[m] for m in top(wanted, policy.chunks - 3)] if others else []
            chosen = sorted({0, own, *best} | (set() if ranked(i) else {max(own - 1, 0)}))
            at = np.array([j for m in chosen for j in range(m * w, (m + 1) * w) if j <= i])
            slots = np.arange(len(at))  # positions are those in the row of what was chosen
            distance = (len(at) - 1 - slots).astype(float)
            out[i, n] = weights(score(scoring, q[i, n], key[at], distance)) @ value[at]
    return out


def rotated(encoding, x, at):
    """x [S, H] at positions [S]."""
    if not isinstance(encoding, rope.Rotary):
        return x
    pairs, half = np.arange(encoding.dim // 2), encoding.layout == "half"
    real = pairs if half else 2 * pairs
    imaginary = pairs + encoding.dim // 2 if half else 2 * pairs + 1
    angle = at[:, None] * rates(encoding)
    turned = (x[:, real] + 1j * x[:, imaginary]) * np.exp(1j * angle)
    out = x.copy()
    out[:, real] = turned.real * encoding.scaling.temperature
    out[:, imaginary] = turned.imag * encoding.scaling.temperature
    return out


def hip(policy, scoring, q, k, v, calls, first_row=None):
    """Every layer is a sparse one. Calls of one token keep what they found for `refresh` tokens.

    Of a block of queries the rows `first_row`, `first_row` + stride, … ask: stride - 1 as released.
    """
    first_row = policy.query_stride - 1 if first_row is None else first_row
    out, share, size = np.zeros_like(q), q.shape[1] // k.shape[1], policy.block
    ends, found = set(np.cumsum(calls)), None
    for start, stop in groups(calls, policy.query_block):
        alone = stop - start == 1 and start in ends | {0} and stop in ends
        if not alone or found is None or start % policy.refresh == 0:
            blocks = max(start - policy.window + 1 - policy.sinks, 0) // size
            near = policy.sinks + blocks * size
            rows = [i for i in range(start, stop)
                    if (i % policy.query_block - first_row) % policy.query_stride == 0]  # fmt: skip
            rows = rows or [stop - 1]  # of fewer tokens than that, the last
            found = [hip_search(policy, scoring, q, k, head, rows, blocks)
                     for head in range(k.shape[1])]  # fmt: skip
        for i in range(start, stop):
            for n in range(q.shape[1]):
                selected = {policy.sinks + m * size + s for m in found[n // share]
                             for s in range(size)}  # fmt: skip
                at = np.array([j for j in range(i + 1)
                               if j < policy.sinks or j >= near or j in selected])  # fmt: skip
                scores = score(scoring, q[i, n], k[at, n // share], (i - at).astype(float))
                out[i, n] = weights(scores) @ v[at, n // share]
        found = found if alone else None
    return out


def hip_search(policy, scoring, q, k, head, rows, blocks):
    share, kept = q.shape[1] // k.shape[1], policy.topk // policy.block
    text = len(q) - policy.window - policy.sinks
    kept = min(kept, max(text, 0) // policy.block)

    def best(begin):
        at = np.arange(policy.block) + policy.sinks + begin * policy.block
        return max(
            _products(scoring.encoding, q[None, None, i, head * share + n], k[None, at, head],
                      (i - at)[None, None].astype(float)).max()
            for i in rows for n in range(share)
        )  # fmt: skip

    edges = [g * blocks // kept for g in range(kept + 1)] if kept else []
    ranges = [(a, b - a) for a, b in itertools.pairwise(edges)]
    while any(n > 1 for _, n in ranges):
        halves = [(a, n // 2) for a, n in ranges] + [(a + n // 2, n - n // 2) for a, n in ranges]
        wanted = np.array([best(a) if n else -np.inf for a, n in halves])
        ranges = [halves[x] for x in top(wanted, kept)]
    return [a for a, n in ranges if n]


LAYER = 1  # that the tests of these policies read


def infinite_hip(policy, scoring, q, k, v, calls):
    """Lists of tokens, cut down stage by stage; a query's keys stand in one row."""
    out, share = np.zeros_like(q), q.shape[1] // k.shape[1]
    ends, kept, near = set(np.cumsum(calls)), None, None
    for start, stop in groups(calls, policy.query_block):
        alone = stop - start == 1 and start in ends | {0} and stop in ends
        stale = not alone or kept is None
        kept = kept or [[None] * k.shape[1] for _ in policy.chunk]
        for stage, refresh in enumerate(policy.refresh):
            stale |= start % refresh == 0
            if stage == 0 and stale:
                near = max(start - policy.window + 1, policy.sinks)
            for head in range(k.shape[1] if stale else 0):
                left = kept[stage - 1][head] if stage else list(range(policy.sinks, near))
                kept[stage][head] = pruned(policy, scoring, q[start:stop], k, head, stage, left)
        for i in range(start, stop):
            for n in range(q.shape[1]):
                at = [*range(policy.sinks), *kept[-1][n // share], *range(near, i + 1)]
                at = np.array([j for j in at if j <= i])
                distance = np.arange(len(at))[::-1].astype(float)
                p = weights(score(scoring, q[i, n], k[at, n // share], distance))
                out[i, n] = p @ v[at, n // share]
        kept = kept if alone else None
    return out


def pruned(policy, scoring, q, k, head, stage, tokens):
    """The tokens of the best chunks of a list, for queries [R, N, H]."""
    size, share = policy.chunk[stage], q.shape[1] // k.shape[1]
    chunks = [tokens[a : a + size] for a in range(0, len(tokens), size)]
    ordered = policy.ordered_layers > LAYER

    def said(n, token, index, left):
        away = policy.window + (len(chunks) - 1 - index if ordered else left)
        return max(turned(scoring, row, k[None, token, head], away)[0] for row in q[:, n])

    def best(n, index):
        part = chunks[index]
        while len(part) > 1:
            halves = part[: len(part) // 2], part[len(part) // 2 :]
            first, second = (said(n, h[0], index, h is halves[0]) for h in halves)
            part = halves[int(second > first)]
        return said(n, part[0], index, False)

    heads = range(head * share, (head + 1) * share)
    found = np.array([max(best(n, index) for n in heads) for index in range(len(chunks))])
    chosen = sorted(top(found, policy.topk[stage] // size)) if chunks else []
    return [token for index in chosen for token in chunks[index]]


def moba(policy, scoring, q, k, v, calls):
    """How `calls` divide the text makes no difference."""
    out, share, size = np.zeros_like(q), q.shape[1] // k.shape[1], policy.block
    encoding, positions = scoring.encoding, np.arange(len(q))
    for n in range(q.shape[1]):
        key, value = k[:, n // share], v[:, n // share]
        queries, placed = (rotated(encoding, x, positions) for x in (q[:, n], key))
        means = placed[: len(q) // size * size].reshape(-1, size, q.shape[2]).mean(1)
        for i in range(len(q)):
            earlier = top(means[: i // size] @ queries[i], policy.topk - 1)
            at = np.array([j for j in range(i + 1) if j // size in {*earlier, i // size}])
            out[i, n] = (
                weights(score(scoring, q[i, n], key[at], (i - at).astype(float))) @ value[at]
            )
    return out
