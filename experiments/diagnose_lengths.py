"""Attention logits by distance, attention entropy by length, and where the first tokens lie."""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention import reference
from lminf.attention.parsing import parse_policy
from lminf.data import sources
from lminf.errors import InputError
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.models.decoder import score_configs
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

LOGITS, ENTROPY, FEATURES = "logits", "entropy", "features"  # the rows' `factor`
FIRST = 4  # tokens at the start, each with a row of its own
NUM_LATER = 256  # later tokens in the picture of features


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    policies = [parse_policy(text) for text in c.policies]
    _models.check_length(c.length)
    text = sources.text_of(c.text)
    lm = _models.load(c.model, seed=c.seed)
    missing = [layer for layer in c.layers if not 0 <= layer < lm.spec.num_layers]
    if missing:
        raise InputError(f"layer {missing[0]} of {lm.spec.num_layers}; layers count from 0")
    tokens, _ = lm.encode(text, length=c.length)
    layers = np.array(c.layers)
    facts = {"model": c.model, "trained_length": lm.spec.trained_length}
    with Progress(1 + len(layers) * (1 + len(policies)), label="diagnosing") as progress:
        activations = jax.block_until_ready(
            _activations(lm.decoder, layers.tobytes(), lm.params, jnp.asarray(tokens[None]))
        )
        done = 1
        progress.update(done)
        q_pos = np.unique(np.geomspace(FIRST, c.length - 1, c.queries).astype(np.int32))
        for index, layer in enumerate(c.layers):
            queries, keys = activations["q"][index][:, q_pos], activations["k"][index]
            config = score_configs(lm.spec)[layer]
            queries = config.gained(lambda q: q, jnp.asarray(q_pos[None]))(queries)
            look = partial(_logits, config, queries, keys, jnp.asarray(q_pos[None]))
            for policy in policies:
                lm.with_policy(policy)  # refuses a window past the trained length
                logits = np.asarray(look(policy))[0]
                if policy == policies[0]:
                    yield from ({**facts, **row, "layer": layer} for row in by_distance(
                        logits, q_pos
                    ))  # fmt: skip
                yield from ({**facts, **row, "layer": layer, "policy": policy.name}
                            for row in entropies(logits, q_pos))  # fmt: skip
                done += 1
                progress.update(done)
            hidden = np.asarray(activations["hidden"][index][0], np.float64)
            yield from ({**facts, **row, "layer": layer} for row in features(hidden, c.seed))
            done += 1
            progress.update(done)


@partial(jax.jit, static_argnums=(0, 1))
def _activations(module, layers: bytes, params, tokens):
    """Un-rotated queries and keys, and the residual stream, of some layers."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    _, state = module.apply(
        {"params": params}, tokens, positions=positions, mutable=["intermediates"]
    )
    sown = state["intermediates"]["layers"]
    activations = {"hidden": sown["hidden"][0]}
    activations |= {name: sown["attention"][name][0] for name in ("q", "k")}
    return jax.tree.map(lambda x: x[np.frombuffer(layers, np.int64)], activations)


@partial(jax.jit, static_argnums=(0, 4))
def _logits(scoring, queries, keys, q_pos, policy):
    k_pos = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
    return reference.logits(policy, scoring, queries, keys, q_pos=q_pos, k_pos=k_pos)


def by_distance(logits: np.ndarray, q_pos: np.ndarray) -> Iterator[Row]:
    """Rows of the mean, smallest and largest logit [N, T, S] at distances between powers of two."""
    distance = q_pos[:, None] - np.arange(logits.shape[2])[None]
    edges = [0, *(2**n for n in range(1, int(np.log2(distance.max())) + 2))]
    for low, high in itertools.pairwise(edges):
        inside = (distance >= low) & (distance < high)
        if inside.any():
            group = logits[:, inside]
            for statistic in ("mean", "min", "max"):
                yield {
                    "factor": LOGITS,
                    "distance": int(min(high - 1, distance.max())),
                    "statistic": statistic,
                    "value": float(getattr(group, statistic)()),
                }


def entropies(logits: np.ndarray, q_pos: np.ndarray) -> Iterator[Row]:
    """Rows of the entropy of attention, nats, mean over heads, by the query's position."""
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    weights /= weights.sum(-1, keepdims=True)
    surprise = -np.log(np.where(weights > 0, weights, 1.0))
    entropy = (weights * surprise).sum(-1).mean(0)
    attended = np.isfinite(logits[0]).sum(-1)
    for position, value, count in zip(q_pos, entropy, attended, strict=True):
        yield {
            "factor": ENTROPY,
            "position": int(position),
            "attended": int(count),
            "value": float(value),
        }


def features(hidden: np.ndarray, seed: int) -> Iterator[Row]:
    """Rows of the first tokens and some later ones [T, D] on the two main axes of all of them."""
    rest = np.random.default_rng(seed).choice(
        np.arange(FIRST, len(hidden)), min(NUM_LATER, len(hidden) - FIRST), replace=False
    )
    chosen = np.concatenate([np.arange(FIRST), np.sort(rest)])
    points = hidden[chosen] - hidden[chosen].mean(0)
    _, _, axes = np.linalg.svd(points, full_matrices=False)
    mean_later = hidden[rest].mean(0)
    for position, place in zip(chosen, points @ axes[:2].T, strict=True):
        vector = hidden[position]
        yield {
            "factor": FEATURES,
            "position": int(position),
            "x": float(place[0]),
            "y": float(place[1]),
            "norm": float(np.linalg.norm(vector)),
            "cosine_to_later": float(
                vector @ mean_later / np.linalg.norm(vector) / np.linalg.norm(mean_later)
            ),
        }


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    mark = rows[0]["trained_length"]
    layers = sorted({row["layer"] for row in rows})
    logits = [
        {**row, "line": f"{row['statistic']}, layer {row['layer']}"}
        for row in rows
        if row["factor"] == LOGITS and row["statistic"] != "mean" and row["layer"] in layers[-2:]
    ]
    entropy: dict[tuple, list[float]] = {}
    for row in rows:
        if row["factor"] == ENTROPY:
            entropy.setdefault((row["policy"], row["position"]), []).append(row["value"])
    mean_entropy = [
        {"policy": policy, "position": position, "value": float(np.mean(values))}
        for (policy, position), values in entropy.items()
    ]
    norms = [
        {**row, "line": f"layer {row['layer']}", "place": row["position"] + 1}
        for row in rows
        if row["factor"] == FEATURES
    ]
    return {
        "logits_by_distance": plots.curves(
            logits, x="distance", y="value", by="line", mark=mark, log_x=True,
            x_label="distance (tokens)", y_label="smallest and largest attention logit (nats)",
        ),
        "entropy_by_length": plots.curves(
            mean_entropy, x="position", y="value", by="policy", mark=mark, log_x=True,
            x_label="position of the query (tokens)", y_label="attention entropy (nats)",
        ),
        "first_tokens": plots.curves(
            norms, x="place", y="norm", by="line", mark=mark, log_x=True, log_y=True,
            x_label="place of the token, from 1 (tokens)",
            y_label="residual stream (Euclidean norm)",
        ),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """For each layer: logits near and far, entropy at the trained length and the end, norms."""
    lines = []
    for layer in sorted({row["layer"] for row in rows}):
        of_layer = [row for row in rows if row["layer"] == layer]
        trained = of_layer[0]["trained_length"]
        highs = [r for r in of_layer if r["factor"] == LOGITS and r["statistic"] == "max"]
        norms = [r for r in of_layer if r["factor"] == FEATURES]
        line = {
            "layer": layer,
            "largest logit, trained distances": max(
                r["value"] for r in highs if r["distance"] < trained
            ),
            "largest logit, beyond": max(
                (r["value"] for r in highs if r["distance"] >= trained), default=float("nan")
            ),
            "norm of token 0": norms[0]["norm"],
            "median norm of later tokens": float(np.median([r["norm"] for r in norms[FIRST:]])),
        }
        for policy in dict.fromkeys(r["policy"] for r in of_layer if r["factor"] == ENTROPY):
            last = [r for r in of_layer if r["factor"] == ENTROPY and r["policy"] == policy][-1]
            line[f"entropy at {last['position']}, {policy}"] = last["value"]
        lines.append(line)
    return lines


if __name__ == "__main__":
    main(run, plot, table=table)
