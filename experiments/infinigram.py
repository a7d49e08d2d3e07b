"""The ∞-gram of a corpus beside n-grams and a neural model, and the mixture of both.

Documents are held out, and those of the corpus that hold most of their 13-grams are left out of it
(decontamination); one corpus is measured with them. An estimate agrees with a token where it gives
it more than half of the probability.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.atomic import atomic_write
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _models, _texts
from lminf.experiments._main import main
from lminf.lm.lm import LM
from lminf.ngram import matches
from lminf.ngram.index import Index
from lminf.ngram.model import MixtureWeights, Perplexity, fit_weights
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

ORDERS = {"infinigram": None, "5-gram": 4, "3-gram": 2}  # tokens of context; None: all that occurs
MOST_N = 16  # effective n from which tokens are counted together
BINS = 10  # of probability, a side
WITH_ALL = "with contamination"  # the corpus from which nothing is left out
PUBLISHED_TOKENS = 1.4e12  # the largest corpus of the paper


class Text(NamedTuple):
    """What is measured of one document."""

    kind: str  # held_out, validation or other
    number: int
    tokens: Int[np.ndarray, " T"]
    neural: Float[np.ndarray, " T-1"]  # probability of tokens 1.. by the neural model


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    done = {row["corpus"] for row in out.rows() if row["measure"] == "joint"}
    if done == {WITH_ALL, *map(name_of, c.parts)}:
        return
    lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)
    held_out, corpus = divided(c, lm)
    documents = [("held_out", tokens) for tokens in held_out[: c.documents]]
    documents += [("validation", tokens) for tokens in held_out[c.documents :]]
    documents += [("other", tokens) for tokens in long_enough(c, lm)]
    texts = read(c, lm, out, documents)
    with tempfile.TemporaryDirectory() as folder:
        full_index = _texts.indexed(Path(folder) / "whole", lm, corpus)
        contaminated = matches.contaminated(full_index, [text.tokens for text in texts])
        left_out = {each.document for each in contaminated}
        clean = [tokens for i, tokens in enumerate(corpus) if i not in left_out]
        common = {"model": c.model, "left_out": 0}
        if WITH_ALL not in done:
            yield from measure(common | {"corpus": WITH_ALL}, full_index, texts)
        for part in c.parts:
            if (name := name_of(part)) not in done:
                index = _texts.indexed(Path(folder) / str(part), lm, clean[::part])
                common = {"model": c.model, "left_out": len(left_out), "corpus": name}
                yield from measure(common, index, texts)


def name_of(part: int) -> str:
    """What rows call a part of the corpus, without the documents that are left out."""
    return f"1/{part}"


def read(
    c: ConfigDict, lm: LM, out: RunFolder, documents: Sequence[tuple[str, Int[np.ndarray, " T"]]]
) -> list[Text]:
    """The documents with what the neural model gives their tokens, which the run's folder keeps."""
    texts = []
    with Progress(len(documents), label="reading", unit="documents") as progress:
        for number, (kind, tokens) in enumerate(documents):
            tokens = tokens[: c.length]
            kept = out.path / "neural" / f"{sources.digest(str(tokens.tolist()))}.npy"
            if not kept.exists():
                with atomic_write(kept) as temporary, temporary.open("wb") as file:
                    np.save(file, lm.token_nll(tokens))
            texts.append(Text(kind, number, tokens, np.exp(-np.load(kept))))
            progress.update(number + 1)
    return texts


def divided(
    c: ConfigDict, lm: LM
) -> tuple[list[Int[np.ndarray, " T"]], list[Int[np.ndarray, " T"]]]:
    """(documents held out, those of the corpus), in tokens; the first that are long enough."""
    num_held_out = c.documents + c.validation
    held_out, corpus = [], []
    for text in _texts.texts(c.text)[: c.corpus_documents]:
        tokens = lm.tokenizer.encode(text)
        chosen = held_out if len(held_out) < num_held_out and len(tokens) >= c.length else corpus
        chosen.append(tokens)
    if len(held_out) < num_held_out or not corpus:
        raise InputError(
            f"{c.text} has {len(held_out)} documents of {c.length} tokens, but {num_held_out} are "
            f"held out and others make the corpus; ask for fewer with --config.documents"
        )
    return held_out, corpus


def long_enough(c: ConfigDict, lm: LM) -> list[Int[np.ndarray, " T"]]:
    """Documents of the other kind, as many as there are of those asked for."""
    encoded = (lm.tokenizer.encode(text) for text in _texts.texts(c.other_text))
    chosen = itertools.islice((each for each in encoded if len(each) >= c.length), c.documents)
    if not (documents := list(chosen)):
        raise InputError(f"{c.other_text} has no document of {c.length} tokens; name another one "
                         f"with --config.other_text")  # fmt: skip
    return documents


def measure(common: Row, index: Index, texts: Sequence[Text]) -> Iterator[Row]:
    """The rows of one corpus: a document, an effective n and a cell of the joint histogram each."""
    common = {**common, "slots": index.slots, "corpus_documents": index.documents}
    scored = {name: [matches.score_text(index, text.tokens, max_context=context)
                     for text in texts] for name, context in ORDERS.items()}  # fmt: skip
    # The first token of a document has no past, and none is given it by the neural model.
    probs = {
        name: [each.probability.prob[1:] for each in scores] for name, scores in scored.items()
    }
    sparse = [each.sparse[1:] for each in scored["infinigram"]]
    weights = fitted(texts, probs["infinigram"], sparse)
    for i, text in enumerate(texts):
        n = scored["infinigram"][i].probability.suffix_len[1:] + 1
        agrees = probs["infinigram"][i] > 0.5
        mixed = weights.nll(probs["infinigram"][i], sparse[i], text.neural)
        yield {
            **common, "measure": "document", "kind": text.kind, "document": text.number,
            "tokens": len(text.neural),
            **{name: int((probs[name][i] > 0.5).sum()) for name in ORDERS},
            "sparse": int(sparse[i].sum()), "sparse_agreement": int((sparse[i] & agrees).sum()),
            "mean_n": float(n.mean()), "median_n": float(np.median(n)),
            "nll_neural": float(-np.log(text.neural, dtype=np.float64).mean()),
            "nll_mixture": float(mixed.mean()),
            "weight_sparse": weights.sparse, "weight_other": weights.non_sparse,
        }  # fmt: skip
    for kind in ("held_out", "other"):
        rows = [i for i, text in enumerate(texts) if text.kind == kind]
        joined = {name: np.concatenate([probs[name][i] for i in rows]) for name in ORDERS}
        n = np.concatenate([scored["infinigram"][i].probability.suffix_len[1:] + 1 for i in rows])
        n = np.minimum(n, MOST_N)
        agrees = joined["infinigram"] > 0.5
        for value in np.unique(n).tolist():
            tokens = int((n == value).sum())
            share = score.success_rate(int(agrees[n == value].sum()), tokens)
            yield {**common, "measure": "effective_n", "kind": kind, "n": value, "tokens": tokens,
                   "agreement": share.mean, "low": share.low, "high": share.high}  # fmt: skip
        neural = np.concatenate([texts[i].neural for i in rows])
        cells = [np.minimum((p * BINS).astype(int), BINS - 1)
                 for p in (neural, joined["infinigram"])]  # fmt: skip
        counted = np.zeros((BINS, BINS), int)
        np.add.at(counted, tuple(cells), 1)
        for a, b in np.argwhere(counted).tolist():
            yield {**common, "measure": "joint", "kind": kind, "neural": (a + 0.5) / BINS,
                   "infinigram": (b + 0.5) / BINS, "tokens": int(counted[a, b])}  # fmt: skip


def fitted(texts: Sequence[Text], probs: Sequence, sparse: Sequence) -> MixtureWeights:
    """The weights that suit the validation documents."""
    rows = [i for i, text in enumerate(texts) if text.kind == "validation"]
    columns = (np.concatenate([each[i] for i in rows])
               for each in (probs, sparse, [text.neural for text in texts]))  # fmt: skip
    return fit_weights(*columns)


# --- What is shown --------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[Row]:
    """A corpus and kind of text a line, with 95 % intervals over documents."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["measure"] == "document" and row["kind"] != "validation":
            groups.setdefault((row["kind"], row["corpus"]), []).append(row)
    lines = []
    for (kind, corpus), group in groups.items():
        ppl = perplexity(group)
        agreement = {name: score.value_text(share(group, name), digits=3) for name in ORDERS}
        lines.append({
            "text": kind.replace("_", " "), "corpus": corpus, "tokens": f"{group[0]['slots']:,}",
            "left out": group[0]["left_out"], "documents": len(group),
            **{f"agreement, {name}": agreement[name] for name in ORDERS},
            "sparse": f"{share(group, 'sparse').mean:.2f}",
            "agreement where sparse": f"{sparse_share(group):.2f}",
            "mean n": f"{np.mean([row['mean_n'] for row in group]):.1f}",
            "perplexity": f"{ppl.neural:.2f} → {ppl.mixture:.2f}",
            "improvement": f"{100 * ppl.improvement:.0f} %",
            "λ sparse, other": f"{group[0]['weight_sparse']:.2f}, {group[0]['weight_other']:.2f}",
        })  # fmt: skip
    return lines


def share(group: Sequence[Row], name: str) -> score.Interval:
    """Of the tokens of a document, the mean over documents."""
    return score.over_documents([row[name] / row["tokens"] for row in group])


def sparse_share(group: Sequence[Row]) -> float:
    sparse = sum(row["sparse"] for row in group)
    return sum(row["sparse_agreement"] for row in group) / max(sparse, 1)


def perplexity(group: Sequence[Row]) -> Perplexity:
    """Of all tokens of the documents."""
    tokens = [row["tokens"] for row in group]
    neural, mixture = (
        float(np.exp(np.average([row[name] for row in group], weights=tokens)))
        for name in ("nll_neural", "nll_mixture")
    )
    return Perplexity(neural, mixture)


def growth(rows: list[Row]) -> list[Row]:
    """Agreement, effective n and improvement by tokens of the corpus, and the straight line
    through them over the logarithm of its tokens, at the size of the paper's.
    """
    sizes: dict[int, list[Row]] = {}
    for row in rows:
        held_out = row["measure"] == "document" and row["kind"] == "held_out"
        if held_out and row["corpus"].startswith("1/"):
            sizes.setdefault(row["slots"], []).append(row)
    measured = {
        size: (share(group, "infinigram").mean, np.mean([row["mean_n"] for row in group]),
               perplexity(group).improvement) for size, group in sorted(sizes.items())
    }  # fmt: skip
    logs, values = np.log10(list(measured)), np.array(list(measured.values()))
    slopes, starts = np.polyfit(logs, values, 1)
    measured |= {int(PUBLISHED_TOKENS): tuple(starts + slopes * np.log10(PUBLISHED_TOKENS))}
    return [
        {"tokens": f"{size:,}" if size < PUBLISHED_TOKENS else "1.4 T, on the line",
         "agreement": f"{agreement:.3f}", "mean n": f"{n:.1f}",
         "improvement": f"{100 * better:.0f} %"}
        for size, (agreement, n, better) in measured.items()
    ]  # fmt: skip


def plot(rows: list[Row]) -> dict[str, Figure]:
    """Agreement by effective n, and both models' probability of the same tokens."""
    largest = [row for row in rows if row["corpus"] == "1/1" and row["kind"] == "held_out"]
    by_n = [row for row in rows if row["measure"] == "effective_n" and row["kind"] == "held_out"]
    joint = [{**row, "log": np.log10(1 + row["tokens"])}
             for row in largest if row["measure"] == "joint"]  # fmt: skip
    return {
        "effective_n": plots.curves(
            by_n, x="n", y="agreement", by="corpus", interval=("low", "high"), band=True,
            x_label="effective n (16: 16 and more)", y_label="agreement (share of tokens)",
            y_limits=(0, 1),
        ),
        "joint": plots.heatmap(
            joint, x="neural", y="infinigram", value="log", text="tokens",
            x_label="next token by the neural model (probability)",
            y_label="by the ∞-gram (probability)",
            value_label="log10(1 + tokens)",
        ),
    }  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
