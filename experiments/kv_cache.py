"""Quality against cache bytes, and the cost of a token against the length of the stream, by policy.

A cell of quality is one policy at one capacity: the NLL of a continuation after a prompt, and the
share of passkeys found. Bytes are those of the arrays that are held once the prompt has been read,
what a policy remembers besides keys and values included. Cells of cost are made as if so many
tokens had been read, with zeros for keys and values.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policy import AnyPolicy
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import passkey, score
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.experiments._streams import Stream
from lminf.lm.lm import LM
from lminf.models import decoder
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

TOGETHER = 8192  # prompt tokens read side by side: more of them is no faster on a CPU


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    lm = _models.load(c.model, seed=c.seed)
    cells = [(family, lm.with_policy(policy)) for family, policy in choices(c)]
    done = {(row["measured"], row["policy"], row.get("position")) for row in out.rows()}
    text = sources.text_of(None)
    ids = lm.encode(text, length=c.prompt + c.continuation)[0]
    samples = passkey.draw(
        "landmark", lambda text: lm.encode(text)[0], length=c.passkey_length, count=c.passkeys,
        seed=c.seed,
    )  # fmt: skip
    each = len(ids) + sum(sample.tokens for sample in samples)
    missing = [
        (family, model)
        for family, model in cells
        if ("quality", model.policy.name, None) not in done
    ]
    with Progress(len(missing) * each, label="quality", unit="tokens") as progress:
        for count, (family, model) in enumerate(missing, 1):
            yield {
                "measured": "quality",
                "model": c.model,
                "family": family,
                "policy": model.policy.name,
                "text_digest": sources.digest(text),
                **quality(c, model, ids, samples),
            }
            progress.update(count * each)
    timed = [
        (model, position)
        for model in dict(cells).values()  # of each family the largest
        for position in c.positions
        if model.policy.bounded or position <= c.unbounded_to
    ]
    if done.issuperset(("cost", model.policy.name, position) for model, position in timed):
        return
    out.keep(lambda row: row["measured"] != "cost")  # timed in turns, so all in one call
    streams = [Stream(model, position, room=c.steps + 1) for model, position in timed]
    with Progress(c.steps + 1, label="decoding", unit="tokens of each") as progress:
        rounds = []  # [steps + 1] of [streams] seconds
        for count in range(c.steps + 1):
            rounds.append([stream.step() for stream in streams])
            progress.update(count + 1)
    quartiles = np.percentile(rounds[1:], [25, 50, 75], axis=0).T  # the first of each compiles
    for stream, (low, median, high) in zip(streams, quartiles, strict=True):
        yield {
            "measured": "cost",
            "model": c.model,
            "policy": stream.lm.policy.name,
            "position": stream.position,
            "ms_per_token": 1e3 * median,
            "low": 1e3 * low,
            "high": 1e3 * high,
            **held_bytes(stream.lm, stream.position),
            "steps": c.steps,
        }


def choices(c: ConfigDict) -> Iterator[tuple[str, AnyPolicy]]:
    """(family, policy) of every cell: a text with places for a capacity is one for each."""
    for text in c.policies:
        for capacity in c.capacities if "{" in text else c.capacities[:1]:
            try:
                filled = text.format(c=capacity, w=capacity - 4, h=capacity // 4)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{text!r} cannot be filled in ({type(error).__name__}: {error}); its places "
                    f"are {{c}}, {{w}} and {{h}}"
                ) from error
            policy = parse_policy(filled)
            family = text.partition(":")[0]
            if isinstance(policy, ThinK):  # each ratio and combination is a curve
                family += f" {policy.ratio}" + (" on snapkv" if policy.capacity else "")
            if isinstance(policy, SnapKV):
                family += f" asked by {policy.window}"
            yield family, policy


def quality(
    c: ConfigDict, lm: LM, ids: Int[np.ndarray, " T"], samples: Sequence[passkey.Sample]
) -> Row:
    started = time.perf_counter()
    nll = lm.token_nll(ids, prompt=c.prompt)[c.prompt - 1 :]
    together = max(1, TOGETHER // c.passkey_length)
    answers = [
        answer
        for start in range(0, len(samples), together)
        for answer in lm.generate(
            [sample.prompt for sample in samples[start : start + together]],
            max_new_tokens=passkey.ANSWER_TOKENS,
        )
    ]
    found = sum(map(passkey.Sample.correct, samples, answers))
    rate = score.success_rate(found, len(samples))
    return {
        "prompt": c.prompt,
        "continuation": len(nll),
        "nll": float(nll.mean(dtype=np.float64)),
        "nll_error": float(nll.std(ddof=1) / np.sqrt(len(nll))),
        "passkey_length": c.passkey_length,
        "passkeys": len(samples),
        "correct": found,
        "accuracy": rate.mean,
        "low": rate.low,
        "high": rate.high,
        **held_bytes(lm, c.prompt),
        "seconds": time.perf_counter() - started,
    }


def held_bytes(lm: LM, tokens: int) -> dict[str, int]:
    """Bytes after a prompt of so many tokens with room for one more: of keys and values, and of
    what else is held."""

    def after_prompt():
        caches = lm.init_caches(batch=1, capacity=tokens)
        return decoder.prepare_decoding(lm.spec, lm.decoder.policies, caches, length=tokens, room=1)

    found = {"cache_bytes": 0, "state_bytes": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(after_prompt)):
        is_kv = jax.tree_util.keystr(path[-1:]) in (".k", ".v", "['k']", "['v']")
        kind = "cache_bytes" if is_kv else "state_bytes"
        found[kind] += leaf.size * leaf.dtype.itemsize
    return found


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    shown = [{**row, "cache_mib": row["cache_bytes"] / 2**20} for row in rows]
    measured = [row for row in shown if row["measured"] == "quality"]
    cost = [row for row in shown if row["measured"] == "cost"]
    by_bytes = {"x": "cache_mib", "by": "family", "log_x": True, "x_label": "keys and values (MiB)"}
    by_length = {"x": "position", "by": "policy", "log_x": True, "log_y": True,
                 "x_label": "text before the token (tokens)"}  # fmt: skip
    return {
        "kv_cache": plots.curves(
            measured, y="nll", y_label="continuation (nats/token)", **by_bytes
        ),
        "passkey": plots.curves(
            measured, y="accuracy", y_label="keys found (share)", y_limits=(-0.04, 1.04),
            interval=("low", "high"), **by_bytes,
        ),
        "decode_cost": plots.curves(cost, y="ms_per_token", y_label="time per token (ms)",
                                    interval=("low", "high"), **by_length),
        "cache_bytes": plots.curves(cost, y="cache_mib", y_label="keys and values (MiB)",
                                    **by_length),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """A policy and capacity a line; the time of a token where it was measured."""
    measured = [row for row in rows if row["measured"] == "quality"]
    full = {row["policy"]: row["nll"] for row in measured}.get("full")
    cost = [row for row in rows if row["measured"] == "cost"]
    by_position = tables.pivot(cost, index="policy", columns="position", value="ms_per_token")
    cost_of = {line.pop("policy"): line for line in by_position}
    return [
        {
            "policy": row["policy"],
            "cache (MiB)": row["cache_bytes"] / 2**20,
            "state (MiB)": row["state_bytes"] / 2**20,
            "nats/token": row["nll"],
            "− full": None if full is None else row["nll"] - full,
            "keys found": f"{row['correct']} of {row['passkeys']}",
            "interval": f"{row['low']:.2f}–{row['high']:.2f}",
            **{f"ms after {int(n):,}": x for n, x in cost_of.get(row["policy"], {}).items()},
        }
        for row in measured
    ]


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
