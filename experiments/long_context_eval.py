"""What policies that choose by content find outside their window, beside those that forget it."""

import math
import time

import jax

from experiments import _models
from experiments._main import main
from experiments.passkey import batches, in_window
from lminf.attention.policies import POLICIES
from lminf.config import parse_choice
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import key_value, passkey, perplexity, reread, score
from lminf.run import plots
from lminf.run.progress import Progress

TOGETHER = 8192  # prompt tokens read side by side: more of them is no faster on a CPU
REREAD = "re-read"
CELL = ("task", "policy", "length", "depth")  # what tells one measured cell from another


def run(c, out):
    policies = [parse_choice(text, POLICIES, what="policy") for text in c.policies]
    for task, prompts, lengths in (
        ("passkey", c.prompts, c.lengths),
        ("key_value", c.key_value_prompts, c.key_value_lengths),
    ):
        if len(prompts) != len(lengths):
            raise InputError(
                f"{task}: numbers of prompts {prompts} for lengths {lengths}; give one per length"
            )
    lm = _models.load(c.model, seed=c.seed)
    models = [lm.with_policy(policy) for policy in policies]  # refuses bad windows at once
    done = {cell_of(row) for row in out.rows()}
    asked = list(questions(c, lm))
    total = sum(s.tokens for *_, samples in asked for s in samples) * len(models)
    with Progress(total, label="questions", unit="tokens") as progress:
        read = 0
        for task, length, depth, samples in asked:
            for model in models:
                read += sum(sample.tokens for sample in samples)
                if (task, model.policy.name, length, depth) not in done:
                    yield {
                        "model": c.model,
                        "trained_length": lm.spec.trained_length,
                        **answered(model, task, samples, length, depth),
                    }
                progress.update(read)
    if c.nll_length:
        yield from losses(c, lm, models, done)


def cell_of(row):
    return tuple(row[name] for name in CELL)


def questions(c, lm):
    """(task, length, depth, samples), the same for every policy."""

    def encode(text):
        return lm.encode(text)[0]

    for length, count in zip(c.lengths, c.prompts, strict=True):
        for depth in c.depths:
            yield (
                "passkey",
                length,
                depth,
                passkey.draw(
                    c.generator, encode, length=length, count=count, seed=c.seed, depth=depth
                ),
            )
    for length, count in zip(c.key_value_lengths, c.key_value_prompts, strict=True):
        for depth in c.key_value_depths:
            yield (
                "key_value",
                length,
                depth,
                key_value.draw(encode, length=length, count=count, seed=c.seed, depth=depth),
            )


def answered(model, task, samples, length, depth):
    """One cell: a task at one length and depth under one policy."""
    started, answers = time.perf_counter(), []
    for batch in batches(samples, max(1, TOGETHER // length)):
        answers += model.generate(
            [sample.prompt for sample in batch], max_new_tokens=passkey.ANSWER_TOKENS
        )
    seconds = time.perf_counter() - started
    correct = sum(sample.correct(text) for sample, text in zip(samples, answers, strict=True))
    accuracy, low, high = score.success_rate(correct, len(samples))
    tokens = sum(sample.tokens + passkey.ANSWER_TOKENS for sample in samples)
    return {
        "task": task,
        "policy": model.policy.name,
        "length": length,
        "depth": depth,
        "prompts_digest": sources.digest("\0".join(sample.prompt for sample in samples)),
        "key_in_window": all(in_window(model.policy, sample) for sample in samples),
        "prompts": len(samples),
        "correct": correct,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "cache_bytes": cache_bytes(model, length + passkey.ANSWER_TOKENS),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def cache_bytes(model, tokens):
    """Of every array that is held for one text of so many tokens."""
    caches = jax.eval_shape(lambda: model.init_caches(batch=1, capacity=tokens))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(caches))


def losses(c, lm, models, done):
    """Loss by position of one text, and how far it lies above re-reading."""
    tokens, _ = lm.encode(sources.text_of(c.text), length=c.nll_length)

    def measured(name, read):
        with Progress(len(tokens), label=name, unit="tokens") as progress:
            started = time.perf_counter()
            nll = read(lambda count, _: progress.update(count))
            seconds = time.perf_counter() - started
        for block in perplexity.by_position([nll], block=c.block):
            yield {
                "model": c.model,
                "trained_length": lm.spec.trained_length,
                "task": "nll",
                "policy": name,
                "length": block.stop,
                "depth": None,
                "start": block.start,
                "nll": block.nll,
                "seconds": seconds,
                "tokens_per_second": len(tokens) / seconds,
            }

    last = ("nll", REREAD, len(tokens), None)
    if last not in done:
        yield from measured(REREAD, lambda show: reread.token_nll(lm, tokens, progress=show))
    for model in models:
        if ("nll", model.policy.name, len(tokens), None) not in done:
            yield from measured(
                model.policy.name, lambda show, m=model: m.token_nll(tokens, progress=show)
            )


# --- What is shown --------------------------------------------------------------------------------


def plot(rows):
    """Heat maps: passkeys found by depth, for each policy at each length; loss by position."""
    label = plots.short_names(row["policy"] for row in rows)
    found = [
        {**row, "asked": f"{label[row['policy']]}\n{row['length']:,}"}
        for row in rows
        if row["task"] == "passkey"
    ]
    figures = {}
    if found:
        figures["long_context_eval"] = plots.heatmap(
            found, x="asked", y="depth", value="accuracy", limits=(0, 1),
            x_label="policy, prompt (tokens)", y_label="share of the filler before the key",
            value_label="share of passkeys found",
        )  # fmt: skip
    nll = [{**row, "policy": label[row["policy"]]} for row in above_reread(rows)]
    if nll:
        figures["above_reread"] = plots.curves(
            nll, x="length", y="excess", by="policy", mark=rows[0]["trained_length"],
            x_label="position (tokens)", y_label="loss above re-reading (nats/token)",
        )  # fmt: skip
    return figures


def above_reread(rows):
    """The rows of losses that have a re-read one beside them, with their excess over it."""
    nll = [row for row in rows if row["task"] == "nll"]
    base = {row["length"]: row["nll"] for row in nll if row["policy"] == REREAD}
    return [
        {**row, "excess": row["nll"] - base[row["length"]]}
        for row in nll
        if row["policy"] != REREAD and row["length"] in base
    ]


def table(rows):
    """A policy a line: what it found inside and outside its window, its loss, speed and memory."""
    beyond = [row for row in above_reread(rows) if row["start"] >= row["trained_length"]]
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != REREAD):
        own = [row for row in rows if row["policy"] == policy]
        asked = [row for row in own if row["task"] != "nll"]
        line = {"policy": policy}
        for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows
                                          if row["task"] != "nll"):  # fmt: skip
            for inside in (True, False):
                cells = [row for row in asked if row["key_in_window"] == inside
                         and (row["task"], row["length"]) == (task, length)]  # fmt: skip
                place = "in window" if inside else "outside"
                line[f"{task} {length:,} {place}"] = share(cells)
        excess = [row["excess"] for row in beyond if row["policy"] == policy]
        if excess:
            line["nll above re-reading past the trained length"] = sum(excess) / len(excess)
            line["of the worst block"], line["of the last"] = max(excess), excess[-1]
            line["tokens/s, reading"] = own[-1]["tokens_per_second"]
        if asked:
            line["cache (MB)"] = max(row["cache_bytes"] for row in asked) / 1e6
            longest = [row for row in asked if row["length"] == max(r["length"] for r in asked)]
            line["tokens/s"] = sum(r["tokens_per_second"] * r["seconds"] for r in longest) / sum(
                r["seconds"] for r in longest
            )
        lines.append(line)
    return lines


def share(cells):
    """`19/20 = 0.95 (0.76–0.99)`, with the Wilson interval."""
    prompts, correct = (sum(row[name] for row in cells) for name in ("prompts", "correct"))
    if not prompts:
        return "–"
    rate, low, high = score.success_rate(correct, prompts)
    return f"{correct}/{prompts} = {rate:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
