"""Loss by position of texts of several kinds, with and without what they copy from far back.

A claim about a policy is a difference between two readings of the same documents, with its interval
over documents.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.errors import InputError
from lminf.evals import reread, score
from lminf.evals.repeats import far_copies
from lminf.experiments import _evals, _models, _texts
from lminf.experiments._main import main
from lminf.lm.lm import LM
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

REREAD = "re-read"
COPY = 17  # tokens of an exact copy, those before the last of which are its context
ALL, NEW = "all", "not copied"  # the tokens that a loss is the mean of
EVERY = "all texts"


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    policies = [text if text == REREAD else parse_policy(text).name for text in c.policies]
    _models.check_length(c.length)
    lm = _models.load(c.model, seed=c.seed)
    models = {name: lm if name == REREAD else lm.with_policy(name) for name in policies}
    for name, model in models.items():
        if _evals.last_only(model):
            raise InputError(
                f"{name} selects for the last query of a call alone, so the loss of a text is that "
                f"of its window; leave it out"
            )
    done = {(row["text"], row["document"], row["policy"]) for row in out.rows()}
    work = [
        (entry, number, name)
        for number in range(c.documents)
        for entry in c.texts
        if number == 0 or entry != _texts.REFERENCE  # which is one document
        for name in models
        if (_texts.kind(entry), number, name) not in done
    ]
    documents: dict[str, list] = {}
    with Progress(len(work) * c.length, label="documents", unit="tokens") as progress:
        for count, (entry, number, name) in enumerate(work, 1):
            if entry not in documents:
                needed = 1 if entry == _texts.REFERENCE else c.documents
                documents[entry] = _texts.tokenised(lm, entry, length=c.length, count=needed)
            text, digest = documents[entry][number]
            tokens = text[: c.length]
            started = time.perf_counter()
            nll = losses(models[name], tokens, again=name == REREAD)
            for row in blocks(c, nll, tokens):
                yield {
                    "model": c.model,
                    "trained_length": lm.spec.trained_length,
                    "text": _texts.kind(entry),
                    "document": number,
                    "text_digest": digest,
                    "policy": name,
                    **row,
                    "seconds": time.perf_counter() - started,
                }
            progress.update(count * c.length)


def losses(lm: LM, tokens: Int[np.ndarray, " T"], *, again: bool) -> Float[np.ndarray, " T-1"]:
    """NLL of tokens 1.., nats: under the model's policy, or of reading every token again."""
    bos = [lm.tokenizer.bos_id] if lm.tokenizer.add_bos else []
    tokens = np.concatenate([np.asarray(bos, np.int32), tokens])[: len(tokens)]
    return (partial(reread.token_nll, lm) if again else lm.token_nll)(tokens)


def blocks(
    c: ConfigDict, nll: Float[np.ndarray, " T-1"], tokens: Int[np.ndarray, " T"]
) -> Iterator[Row]:
    """A row for each block of positions: mean loss of all tokens, and of those not copied."""
    copied = far_copies(tokens, length=COPY, beyond=c.beyond)[1:]
    for start in range(0, c.length, c.block):
        scored = slice(max(start - 1, 0), start + c.block - 1)
        losses_of_block, copy = nll[scored].astype(np.float64), copied[scored]
        yield {
            "start": start,
            "stop": min(start + c.block, c.length),
            "tokens": len(losses_of_block),
            "copied": float(copy.mean()),
            "nll": float(losses_of_block.mean()),
            "nll_not_copied": float(losses_of_block[~copy].mean()) if not copy.all() else None,
        }


# --- What is shown --------------------------------------------------------------------------------


def differences(rows: Sequence[Row], column: str = "nll") -> list[Row]:
    """Of each text and of all texts together, each block and two neighbouring policies of the
    config: the difference of losses, document by document, with its interval.
    """
    lines = []
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    cells = {(row["policy"], row["start"], row["text"], row["document"]): row for row in rows}
    texts = list(dict.fromkeys(row["text"] for row in rows))
    together = [(EVERY, texts)] if len(texts) > 1 else []
    for name, of in [*((text, [text]) for text in texts), *together]:
        for one, base in zip(policies[1:], policies, strict=False):
            blocks: dict[tuple[int, int], list[float]] = {}
            for (policy, start, text, document), row in cells.items():
                base_row = cells.get((base, start, text, document))
                if policy != one or text not in of or base_row is None:
                    continue
                if row[column] is not None and base_row[column] is not None:
                    values = blocks.setdefault((start, row["stop"]), [])
                    values.append(row[column] - base_row[column])
            lines += [
                {
                    "text": name, "difference": f"{one} − {base}", "start": start, "stop": stop,
                    "documents": len(values), "interval": score.over_documents(values),
                }
                for (start, stop), values in sorted(blocks.items())
            ]  # fmt: skip
    return lines


def table(rows: list[Row]) -> list[Row]:
    """A text and difference a line, a block of positions a column, in nats per token with the 95 %
    interval over documents; and of each text the share of copied tokens.
    """
    lines: dict[tuple[str, ...], Row] = {}

    def cell(text: str, what: str, tokens: str, documents: int, row: Row, value: str) -> None:
        line = lines.setdefault(
            (text, what, tokens),
            {"text": text, "nats/token": what, "tokens": tokens, "documents": documents},
        )
        line[f"{row['start']}–{row['stop']}"] = value

    shares: dict[tuple[str, int, int], dict[int, float]] = {}
    for row in rows:
        place = row["text"], row["start"], row["stop"]
        shares.setdefault(place, {})[row["document"]] = row["copied"]
    copying = {text for (text, _, _), of in shares.items() if np.mean(list(of.values())) >= 0.01}
    for (text, start, stop), of in shares.items():
        value = f"{100 * np.mean(list(of.values())):.1f} %"
        cell(text, "copied from far back", "share", len(of), {"start": start, "stop": stop}, value)
    for tokens, column in ((ALL, "nll"), (NEW, "nll_not_copied")):
        for row in differences(rows, column):
            if tokens == ALL or row["text"] in copying or (copying and row["text"] == EVERY):
                value = score.value_text(row["interval"], digits=3)
                cell(row["text"], row["difference"], tokens, row["documents"], row, value)
    texts = list(dict.fromkeys(line["text"] for line in lines.values()))
    return sorted(lines.values(), key=lambda line: texts.index(line["text"]))


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """The differences by position, a panel for each text."""
    trained = rows[0]["trained_length"]
    reached = max(row["stop"] for row in rows) >= trained
    points = [
        {**row, "value": row["interval"].mean, **score.ends(row["interval"])}
        for row in differences(rows)
    ]
    if not points:
        return {}
    return {
        "long_context_loss": plots.curves(
            points, x="stop", y="value", by="difference", panel="text", interval=("low", "high"),
            mark=trained if reached else None, x_label="position (tokens)",
            y_label="loss above that of the policy before (nats/token)",
        )
    }  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("documents", "policies"))
