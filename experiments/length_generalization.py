"""NLL by position under several policies, beside the costly re-reading that they replace."""

import time
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.attention.policy import FULL
from lminf.data import sources
from lminf.evals import perplexity, reread
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.lm.nll import bits_per_byte
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

REREAD = "re-read"


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    policies = [parse_policy(text) for text in c.policies]
    _models.check_length(c.length)
    text = sources.text_of(c.text)
    lm = _models.load(c.model, seed=c.seed)
    for policy in policies:
        lm.with_policy(policy)  # refuses what the model cannot do before an hour is spent
    tokens, ends = lm.encode(text, length=c.length)
    token_bytes = np.diff(ends)
    facts = {
        "model": c.model,
        "tokens": len(tokens),
        "trained_length": lm.spec.trained_length,
        "text_digest": sources.digest(text),
    }

    def timed(label, read):
        with Progress(len(tokens), label=label, unit="tokens") as progress:
            started = time.perf_counter()
            return read(progress=progress.show), time.perf_counter() - started

    by_policy = {
        policy: timed(policy.name, partial(lm.with_policy(policy).token_nll, tokens))
        for policy in policies
    }
    known = by_policy[FULL][0] if FULL in by_policy else None
    base, seconds = timed(REREAD, partial(reread.token_nll, lm, tokens, head=known))
    reference = perplexity.by_position([base], block=c.block)
    for name, (nll, took) in {
        REREAD: (base, seconds),
        **{policy.name: result for policy, result in by_policy.items()},
    }.items():
        for block, against in zip(
            perplexity.by_position([nll], block=c.block), reference, strict=True
        ):
            scored = slice(max(block.start - 1, 0), block.stop - 1)
            yield {
                **facts,
                "policy": name,
                "start": block.start,
                "stop": block.stop,
                "nll": block.nll,
                "excess_over_reread": block.nll - against.nll,
                "bits_per_byte": bits_per_byte(nll[scored], int(token_bytes[scored].sum())),
                "seconds": took,
            }


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    mark = rows[0]["trained_length"]
    return {
        "length_generalization": plots.curves(
            rows, x="stop", y="nll", by="policy", mark=mark,
            x_label="position (tokens)", y_label="loss (nats/token)",
        ),
        "excess_over_reread": plots.curves(
            [row for row in rows if row["policy"] != REREAD],
            x="stop", y="excess_over_reread", by="policy", mark=mark,
            x_label="position (tokens)", y_label="loss above re-reading (nats/token)",
        ),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Loss and excess by block; a policy a line."""
    named = [{**row, "tokens": f"{row['start']}–{row['stop']}"} for row in rows]
    loss = tables.pivot(named, index="policy", columns="tokens", value="nll")
    excess = tables.pivot(
        [row for row in named if row["policy"] != REREAD],
        index="policy", columns="tokens", value="excess_over_reread",
    )  # fmt: skip
    return loss + [{**row, "policy": f"{row['policy']} − {REREAD}"} for row in excess]


if __name__ == "__main__":
    main(run, plot, table=table)
