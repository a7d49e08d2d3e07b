"""Trains models of each language on the same sentences, and compares families with their control.

Every language has as many steps, the same model and the same seeds. Perplexities are of sentences
that were not trained on, so they include what is random in a language: no model can predict a
permutation that is drawn for each sentence.

Of the hop languages hidden states are exchanged between prefixes that differ in the number of their
subject: where that flips the marker which a model predicts, the state carries the number.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import parse_choice
from lminf.data.worlds import impossible
from lminf.data.worlds.impossible import MARKERS, PLURAL, SINGULAR, NoHop, NumberPair
from lminf.data.worlds.world import World
from lminf.errors import InputError
from lminf.experiments import _worlds
from lminf.experiments._main import main
from lminf.experiments._small import Once
from lminf.models import heads
from lminf.models.interchange import interchange
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.train.ensemble import Replicas
from lminf.train.step import State, TrainStep
from lminf.types import Params

SUBJECT, VERB, LAST = "subject", "verb", "last before the marker"  # places of a prefix


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    # The last row of a language, and of its exchanged states.
    seed = c.seed + c.replicates - 1
    learned = {"step": c.steps, "seed": seed}
    exchanged = {"layer": c.model.num_layers, "seed": seed}
    done, done_exchanges = set(), set()
    for row in out.rows():
        if is_exchange(row):
            last = exchanged | {"place": places_of(language_of(row["language"]))[-1]}
            done_exchanges |= {row["language"]} if last.items() <= row.items() else set()
        elif learned.items() <= row.items():
            done.add(row["language"])
    out.keep(lambda row: row["language"] in (done_exchanges if is_exchange(row) else done))
    tagged = (
        impossible.read_tagged(Path(c.text)) if c.text
        else impossible.sentences(c.sentences, seed=c.seed)
    )  # fmt: skip
    copies = None
    for name in c.languages:
        language = language_of(name)
        # Only the grammar says a sentence of one and of many.
        pairs = [] if c.text or name in done_exchanges else pairs_of(c, language)
        if name in done and not pairs:
            continue
        world = impossible.world(tagged, language, held_out=c.test_sentences, seed=c.seed)
        copies = copies or _worlds.replicas(c, len(world.vocabulary) + 1)
        tokens = np.concatenate(world.documents("train"))
        data = [Once(tokens, c.length, c.batch, seed) for seed in copies.seeds]
        facts = {"language": name, "family": language.family}
        for step, state in _worlds.train(c, copies, data, every=c.evaluate_every, label=name):
            if name not in done:
                for seed, measured in zip(copies.seeds, of_each(copies, state, world), strict=True):
                    yield {**facts, "step": step, "seed": seed, **measured}
            if pairs and step == c.steps:
                places = places_of(language)
                for row in flips(copies, _worlds.one_peak(state), world, pairs, places):
                    yield {**facts, "step": step, **row}


def language_of(name: str) -> impossible.Language:
    return parse_choice(name, impossible.LANGUAGES, what="language")


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses a number of generated sentences where a text is read instead."""
    if c.text and "sentences" in given:
        raise InputError("--config.sentences counts those of the grammar, and --config.text names "
                         "a text instead of it; leave one of the two out")  # fmt: skip


def of_each(copies: Replicas, state: State, world: World) -> list[Row]:
    """Of every model: perplexity, the geometric mean over test sentences; of the hop languages also
    how much more surprising (nats) the next word would be in a marker's place than the marker is.
    """
    documents = [document[:-1] for document in world.documents("test")]  # without their ends
    tokens, targets, is_token = _worlds.padded(documents)

    def nll_of(targets: np.ndarray) -> np.ndarray:
        each = [
            np.broadcast_to(rows, (len(copies.seeds), *rows.shape)) for rows in (tokens, targets)
        ]
        return _worlds.measure(copies, _worlds.one_peak(state), *each)[0]

    nll = nll_of(targets)
    of_sentences = (nll * is_token).sum(-1) / is_token.sum(-1)
    rows: list[Row] = [
        {"perplexity": float(np.exp(mean)), "sentences": len(documents)}
        for mean in of_sentences.mean(-1)
    ]
    first = len(world.truth) - len(documents)
    places = [(question.subject - first, len(question.prompt))
              for question in world.questions["test"]]  # fmt: skip
    marked = np.array([(row, place) for row, place in places if place + 1 < is_token[row].sum()])
    if not len(marked):
        return rows
    row, place = marked.T
    without = targets.copy()
    without[row, place] = targets[row, place + 1]
    gain = (nll_of(without) - nll)[:, row, place].mean(-1)
    return [
        {**row, "marker_gain": float(more), "markers": len(marked)}
        for row, more in zip(rows, gain, strict=True)
    ]


# --- Exchanged states -----------------------------------------------------------------------------


def is_exchange(row: Row) -> bool:
    return "place" in row


def places_of(language: impossible.Language) -> list[str]:
    """Places of the prefixes of a hop language: the subject, the verb and up to the marker."""
    if not isinstance(language, NoHop) or not language.distance:
        return [SUBJECT, VERB]
    return [SUBJECT, VERB, *(f"{VERB} + {i}" for i in range(1, language.distance)), LAST]


def pairs_of(c: ConfigDict, language: impossible.Language) -> list[NumberPair]:
    """Prefixes of sentences that were not trained on; none of a language without markers."""
    if not isinstance(language, NoHop):
        return []
    numbers = range(c.sentences, c.sentences + c.test_sentences)
    return impossible.number_pairs(language, numbers, seed=c.seed)


def flips(
    copies: Replicas,
    params: Params,
    world: World,
    pairs: list[NumberPair],
    places: list[str],
) -> Iterator[Row]:
    """Of every layer, place and model: the share of prefixes whose predicted marker becomes that of
    their pair when the state there does, and of how many, which are those of pairs that are both
    predicted rightly.
    """
    words = [each for pair in pairs for each in (pair.singular, pair.plural)]
    base, _, is_token = _worlds.padded([world.encode((*each, MARKERS[0])) for each in words])
    swap = np.arange(len(words)) ^ 1
    last = is_token.sum(1) - 1  # a row begins with the end of the sentence before
    verb = np.repeat([pair.verb for pair in pairs], 2) + 1
    offsets = {place: offset for offset, place in enumerate(places, -1)}  # from the verb
    plural = np.arange(len(words)) % 2 == 1
    arrays = {"base": base, "source": base[swap], "last": last}
    markers = world.encode((SINGULAR, PLURAL))
    # No token is exchanged at place -1; every layer then gives the same.
    right = (
        _plural_predicted(copies, params, arrays, markers, np.full_like(last, -1))[:, 0] == plural
    )
    right &= right[:, swap]
    for place in places:
        positions = last if place == LAST else verb + offsets[place]
        flipped = _plural_predicted(copies, params, arrays, markers, positions) != plural
        for s, layer in np.ndindex(flipped.shape[:2]):
            chosen = flipped[s, layer][right[s]]
            yield {"seed": copies.seeds[s], "layer": layer, "place": place,
                   "flipped": float(chosen.mean()) if len(chosen) else None,
                   "prefixes": len(chosen)}  # fmt: skip


def _plural_predicted(
    copies: Replicas,
    params: Params,
    arrays: Mapping[str, np.ndarray],
    markers: Int[np.ndarray, " 2"],
    positions: Int[np.ndarray, " N"],
) -> Bool[np.ndarray, "R S N"]:
    """Whether the plural marker is the likelier one after each prefix, by replica and layer."""
    count, length = arrays["base"].shape
    rows, parts = min(count, max(1, _worlds.MEASURED // length)), []
    for start in range(0, count, rows):
        batch = np.arange(start, start + rows) % count  # one shape, so one program
        parts.append(_marker_logits(
            copies.program, params, *(array[batch] for array in arrays.values()), markers,
            positions[batch].astype(np.int32),
        ))  # fmt: skip
    logits = np.concatenate(parts, 2)[:, :, :count]
    return logits[..., 1] > logits[..., 0]


@partial(jax.jit, static_argnums=0)
def _marker_logits(
    program: TrainStep, params, base, source, last, markers, positions
) -> Float[Array, "R S N 2"]:
    def one(params):
        hidden = interchange(program.module, params, base, source, positions)
        hidden = jnp.take_along_axis(hidden, last[None, :, None, None], 2)[:, :, 0]
        return heads.lm(program.spec, params, hidden)[..., markers]

    return jax.vmap(one)(params)


# --- What is shown --------------------------------------------------------------------------------


def plot(rows: list[Row]) -> dict[str, Figure]:
    exchanges = [row for row in rows if is_exchange(row)]
    rows = [row for row in rows if not is_exchange(row)]
    local = [{**row, "family": "local shuffle"} for row in rows
             if row["language"].startswith(("local", "control"))]  # fmt: skip
    not_local = [row for row in rows if not row["language"].startswith("local")]
    figures = {
        "impossible_languages": plots.curves(
            [*local, *not_local], x="step", y="perplexity", by="language", panel="family",
            x_label="optimiser steps (steps)", y_label="test perplexity (per token)",
        )
    }  # fmt: skip
    cells = [
        {"line": f"{language}, behind {layer} layers", "place": place.partition(" before")[0],
         "share": float(np.mean(shares)), "written": f"{np.mean(shares):.2f}"}
        for (language, layer, place), shares in shares_of(exchanges).items() if shares
    ]  # fmt: skip
    if cells:
        figures["interchange"] = plots.heatmap(
            cells, x="place", y="line", value="share", limits=(0, 1), text="written",
            x_label="exchanged state, the last one before the marker (token)", y_label="",
            value_label="predicted markers that flip (share)",
        )  # fmt: skip
    return figures


def shares_of(exchanges: list[Row]) -> dict[tuple[str, int, str], list[float]]:
    """The flipped shares of every seed by (language, layer, place), layer after layer."""
    shares: dict[tuple[str, int, str], list[float]] = {}
    for row in sorted(exchanges, key=lambda row: row["layer"]):
        of_seeds = shares.setdefault((row["language"], row["layer"], row["place"]), [])
        of_seeds += [] if row["flipped"] is None else [row["flipped"]]
    return shares


def table(rows: list[Row]) -> list[Row]:
    """Means over seeds after the last step, with the least and the largest seed's; and below them
    the shares of predicted markers that flip, by layer and place.
    """
    lines: dict[tuple[str, int], Row] = {}
    for (language, layer, place), shares in shares_of(list(filter(is_exchange, rows))).items():
        name = {"family": "exchanged states", "language": f"{language}, behind {layer} layers"}
        lines.setdefault((language, layer), name)[place] = _worlds.over_seeds(shares)
    return [*_perplexities([row for row in rows if not is_exchange(row)]), *lines.values()]


def _perplexities(rows: list[Row]) -> list[Row]:
    last = max(row["step"] for row in rows)
    lines = {}
    for row in rows:
        if row["step"] == last:
            lines.setdefault(row["language"], []).append(row)
    # The control of a family is the first of its languages.
    controls = {group[0]["family"]: group for group in reversed(lines.values())}
    return [
        {
            "family": group[0]["family"], "language": name, "seeds": len(group),
            "perplexity": _worlds.over_seeds([row["perplexity"] for row in group]),
            "times its control": _worlds.over_seeds([
                row["perplexity"] / control["perplexity"]
                for row in group for control in controls[row["family"]]
                if control["seed"] == row["seed"]
            ]),
            "marker gain (nats)": _worlds.over_seeds([
                row["marker_gain"] for row in group if "marker_gain" in row
            ]),
        }
        for name, group in lines.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
