"""What policies keep of what they read: copy gain and key-value margins, against what they cost.

Two documents are read in turn: after each, its own passages and questions and the passages of the
other one are scored. So every document has a control, and one reading serves all depths.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.errors import InputError
from lminf.evals import copy_gain, margin, score
from lminf.evals.haystack import Haystack, haystack
from lminf.experiments import _evals, _models, _texts
from lminf.experiments._main import main
from lminf.lm.lm import LM
from lminf.lm.prefix import Tails, log_probs_after
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

FAR, NEAR = "outside every window", "inside the widest"
MEASURES = {
    "copy_gain": "copy gain (nats/token)",
    "needle_margin": "needle margin (nats)",
    "key_value_margin": "key-value margin (nats)",
    "rank": "rank",
}
SHOWN = ("copy_gain", "key_value_margin")  # in figures
KINDS = ("keeps what it attends to", "keeps all, attends to some", "attends to all")


class Measured(NamedTuple):
    """What was scored after one document was read; each [D], by depth."""

    # Mean log-probabilities of its passages and of the other document's, nats per token; None: of
    # a policy that selects for the last token of a call alone, for which most tokens tell nothing.
    copied: Float[np.ndarray, " D"] | None
    control: Float[np.ndarray, " D"] | None
    answers: Float[np.ndarray, "D 1 V"]  # log-probabilities of what follows each question


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    if c.documents % 2:
        raise InputError(
            f"documents={c.documents}: two documents are each other's control; give an even number"
        )
    parsed = [parse_policy(text) for text in c.policies]
    for policy in parsed:
        if policy.window is not None and policy.window > c.beyond:
            raise InputError(
                f"{policy.name} has a window of more than beyond={c.beyond} tokens, so what is "
                f"farther back than these may be in it; raise beyond or lower the window"
            )
    lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)
    models = [lm.with_policy(policy) for policy in parsed]
    done = {(row["length"], row["policy"], row["document"]) for row in out.rows()}
    pairs = [(length, number) for length in c.lengths for number in range(0, c.documents, 2)]
    work = [
        (length, number, model)
        for length, number in pairs
        for model in models
        if not {(length, model.policy.name, number + i) for i in (0, 1)} <= done
    ]
    total = 2 * sum(length for length, _, _ in work)
    with Progress(total, label="documents", unit="tokens") as progress:
        read, stacks = 0, {}
        for length, number, model in work:
            if length not in stacks:
                stacks = {length: drawn(c, lm, length)}
            pair, digests = zip(*stacks[length][number : number + 2], strict=True)
            measured = [measure(model, read, control) for read, control in (pair, pair[::-1])]
            for index, (mine, its) in enumerate(zip(measured, measured[::-1], strict=True)):
                for row in rows_of(c, model, pair[index], mine, its.control):
                    yield {
                        "model": c.model,
                        "policy": model.policy.name,
                        "length": length,
                        "document": number + index,
                        "text_digest": digests[index],
                        **row,
                        "trained_length": lm.spec.trained_length,
                    }
            read += 2 * length
            progress.update(read)


def drawn(c: ConfigDict, lm: LM, length: int) -> list[tuple[Haystack, str]]:
    """The documents of a length, with keys and values of their own, and digests of their texts."""
    bos = [lm.tokenizer.bos_id] if lm.tokenizer.add_bos else []
    return [
        (
            haystack(
                text, lm.tokenizer.encode, length=length, depths=c.depths, space=copy_gain.SPACE,
                key=(c.seed, length, number), bos=bos,
            ),
            digest,
        )
        for number, (text, digest) in enumerate(
            _texts.tokenised(lm, c.text, length=length, count=c.documents)
        )
    ]  # fmt: skip


def measure(lm: LM, document: Haystack, control: Haystack) -> Measured:
    """Reads a document once and scores all that follows it: its passages, those of the control,
    which it does not contain, and questions."""
    questions = margin.tails(document)
    if _evals.last_only(lm):
        (answers,) = log_probs_after(lm, document.tokens, [questions])
        return Measured(None, None, answers)
    tails = [copy_gain.tails(each, lm.tokenizer.encode).tokens for each in (document, control)]
    copies = Tails(np.concatenate(tails), copy_gain.COPIED)
    copied, answers = log_probs_after(lm, document.tokens, [copies, questions])
    depths = len(document.starts)
    return Measured(
        copy_gain.log_prob(copied[:depths], document),
        copy_gain.log_prob(copied[depths:], control),
        answers,
    )


def rows_of(
    c: ConfigDict,
    lm: LM,
    document: Haystack,
    mine: Measured,
    control: Float[np.ndarray, " D"] | None,  # of this document's passages, after the other one
) -> Iterator[Row]:
    """One row of a document for the depths outside every window, and one for those inside."""
    length = len(document.tokens)
    far = length - document.starts > c.beyond
    gain = None if mine.copied is None or control is None else mine.copied - control
    for name, chosen in ((FAR, far), (NEAR, ~far)):
        if depths := int(chosen.sum()):
            margins = margin.margins(mine.answers, document, chosen)
            yield {
                "place": name,
                "depths": depths,
                "copy_gain": None if gain is None else float(gain[chosen].mean()),
                "needle_margin": float(margins.needle.mean()),
                # One value has no others.
                "key_value_margin": float(margins.key_value.mean()) if depths > 1 else None,
                "rank": float(margins.rank.mean()) if depths > 1 else None,
                **_evals.costs(lm, length),
            }


# --- What is shown --------------------------------------------------------------------------------


def summary(rows: Sequence[Row], *, place: str = FAR) -> list[Row]:
    """A policy and length a line: the mean over documents of every measure with its interval."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["place"] == place:
            groups.setdefault((row["length"], row["policy"]), []).append(row)
    return [
        {
            "policy": policy,
            "length": length,
            "attended": group[0]["attended"],
            "cache_bytes": group[0]["cache_bytes"],
            "documents": len(group),
            "depths": group[0]["depths"],
            **{
                name: score.over_documents([row[name] for row in group])
                for name in MEASURES if group[0][name] is not None
            },
        }
        for (length, policy), group in groups.items()
    ]  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """A policy and length a line, with n and the 95 % interval over documents of every measure."""
    near = {(line["length"], line["policy"]): line for line in summary(rows, place=NEAR)}
    gains = paired_gains(rows)
    lines = []
    for line in summary(rows):
        inside = near.get((line["length"], line["policy"]))
        lines.append({
            "policy": line["policy"],
            "length": line["length"],
            "attended": line["attended"],
            "kept (MB)": line["cache_bytes"] / 1e6,
            "documents × depths": f"{line['documents']} × {line['depths']}",
            **{
                label: score.value_text(line[name]) if name in line else None
                for name, label in MEASURES.items()
            },
            "copy gain above the first policy": gains.get((line["length"], line["policy"])),
            "needle margin inside": score.value_text(inside["needle_margin"]) if inside else None,
        })  # fmt: skip
    return lines


def paired_gains(rows: Sequence[Row]) -> dict[tuple[int, str], str]:
    """(length, policy) -> copy gain above that of the first policy, document by document."""
    first = rows[0]["policy"] if rows else None
    gains = {
        (row["length"], row["policy"], row["document"]): row["copy_gain"]
        for row in rows
        if row["place"] == FAR and row["copy_gain"] is not None
    }
    above: dict[tuple[int, str], list[float]] = {}
    for (length, policy, document), gain in gains.items():
        base = gains.get((length, first, document))
        if policy != first and base is not None:
            above.setdefault((length, policy), []).append(gain - base)
    return {cell: score.value_text(score.over_documents(each)) for cell, each in above.items()}


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """What policies keep: of one length a bar each, beside the memory that it takes; of several
    lengths a line each, in a panel for each measure and kind of cost.
    """
    lines = summary(rows)
    label = style.short_names(dict.fromkeys(row["policy"] for row in lines))
    label = {name: text.replace("\n", ", ") for name, text in label.items()}
    if len({line["length"] for line in lines}) == 1:
        bars = [
            {**row, "bar": f"{label[row['policy']]}, {row['cache_bytes'] / 1e6:.0f} MB"}
            for row in rows if row["place"] == FAR
        ]  # fmt: skip
        return {
            name: plots.bars(bars, x="bar", y=name, x_label="", y_label=MEASURES[name],
                             center=np.mean)
            for name in SHOWN
        }  # fmt: skip
    points = [
        {
            "policy": label[line["policy"]],
            "panel": f"{MEASURES[name]}\n{kind}",
            "length": line["length"],
            "value": line[name].mean,
            **score.ends(line[name]),
        }
        for name in SHOWN
        for kind in KINDS
        for line in lines
        if name in line and kind_of(line, lines) == kind
    ]
    return {
        "long_context_retrieval": plots.curves(
            points, x="length", y="value", by="policy", panel="panel", log_x=True,
            interval=("low", "high"), mark=rows[0]["trained_length"],
            x_label="document (tokens)", y_label="kept (nats, nats/token)",
        )
    }  # fmt: skip


def kind_of(line: Row, lines: Sequence[Row]) -> str:
    """Whether memory grows with the document, and time with its square."""
    if line["attended"] >= line["length"]:
        return KINDS[2]
    least = min(each["cache_bytes"] / each["attended"] for each in lines)
    keeps_more = line["cache_bytes"] / line["attended"] > 1.5 * least
    return KINDS[1] if keeps_more else KINDS[0]


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("documents", "lengths", "policies"))
