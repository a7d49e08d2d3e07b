"""Gives a chat model more tokens, trains it on plain text of their language, and measures its
chat behaviour with and without repair.

    chat        the model as it is
    expanded    with more tokens, before any training
    trained     its outer layers and tables on plain text
    linear      that, repaired: outer layers between the trained and the chat model, rows of the
    spherical   template's special tokens restored

An answer is in form if it ends with an end token within the limit and writes no other special token
before. Answers of the chat model itself are scored under all versions: nats a token, end included.
"""

import dataclasses
import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest, parse_choice
from lminf.data.tokenizers import ByteTokenizer, Tokenizer
from lminf.data.windows import RandomWindows
from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _models, _texts
from lminf.experiments._main import main
from lminf.lm import generate
from lminf.lm.expand_vocab import expand_vocab
from lminf.lm.lm import LM
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.surgery.interpolate import restore_chat
from lminf.train import frozen
from lminf.train.optim import OPTIMIZERS
from lminf.train.outer_layers import OuterLayers
from lminf.train.schedules import SCHEDULES

CHAT, EXPANDED, TRAINED = "chat", "expanded", "trained"
REPAIRED = ("linear", "spherical")
VERSIONS = (CHAT, EXPANDED, TRAINED, *REPAIRED)
FORM, ANSWERS = "answers in form", "nats a token of the chat model's answers"
TARGET, OTHER = "bits a character of the target", "bits a character of the other language"
MEASURES = (FORM, ANSWERS, TARGET, OTHER)
# Of the tiny model, which has no template of its own.
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{% endfor %}{{ bos_token }}"
)
QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Name three colours.",
    "What is 7 plus 5?",
    "Give me a synonym of the word happy.",
    "Which animal says meow?",
    "Translate 'good morning' into Spanish.",
    "Is the sun a star? Answer yes or no.",
    "What do bees make?",
    "Write one sentence about the sea.",
    "What is the opposite of cold?",
    "Who wrote Romeo and Juliet?",
    "How many days has a week?",
)


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses versions that do not exist, and more questions than there are."""
    for name in c.versions:
        if name not in VERSIONS:
            raise InputError(f"no version is called {name!r}; {closest(name, VERSIONS)}")
    if len(c.chat_shares) % 2:
        raise InputError(
            f"--config.chat_shares={c.chat_shares}: give an even number, half of them for the "
            f"first layers and half for the last"
        )
    if c.questions > len(QUESTIONS):
        raise InputError(
            f"--config.questions={c.questions}: there are {len(QUESTIONS)}; ask at most these"
        )


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    done = {(row["version"], row["measure"], row["item"]) for row in out.rows()}
    chat = with_template(_models.load(c.model, seed=c.seed, dtype="float32"))
    target, other = _texts.pages(c.text), _texts.pages(c.other_text)
    held_out = {TARGET: held_out_of(c, target), OTHER: held_out_of(c, other)}
    unmeasured = [page for page in target if page[: c.characters] not in held_out[TARGET]]
    sample = list(_texts.first_characters(unmeasured, c.sample_characters))
    expanded = expand_vocab(chat, sample, tokens=c.tokens, rows=c.rows, seed=c.seed)
    trained = train(c, expanded, sample, out) if set(c.versions) - {CHAT, EXPANDED} else expanded
    prompts = [
        chat.tokenizer.encode_chat([{"role": "user", "content": question}])
        for question in QUESTIONS[: c.questions]
    ]
    answers = written(chat, prompts, c.max_new_tokens)
    for name in c.versions:
        version = version_of(c, name, chat, expanded, trained)
        form: list[float] = [
            in_form(version.tokenizer, answer)
            for answer in (answers if name == CHAT else written(version, prompts, c.max_new_tokens))
        ]
        values: dict[str, list[float]] = {FORM: form, ANSWERS: [
            -version.score_tokens(np.concatenate([prompt, answer]), len(prompt)).log_prob
            / len(answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]}  # fmt: skip
        for measure, texts in held_out.items():
            values[measure] = [bits_per_character(version, text) for text in texts]
        for measure, of_items in values.items():
            for item, value in enumerate(of_items):
                if (name, measure, item) not in done:
                    yield {"model": c.model, "tokens": c.tokens, "version": name,
                           "measure": measure, "item": item, "value": float(value)}  # fmt: skip
    (out / "trained.npz").unlink(missing_ok=True)


def held_out_of(c: ConfigDict, pages: Sequence[str]) -> list[str]:
    long_pages = [page[: c.characters] for page in pages if len(page) >= c.characters]
    if len(long_pages) < c.documents:
        raise InputError(
            f"there are {len(long_pages)} pages of {c.characters} characters, but {c.documents} "
            f"were asked for; ask for fewer with --config.documents"
        )
    return long_pages[: c.documents]


def bits_per_character(lm: LM, text: str) -> float:
    return lm.nll(text).bits_per_byte * len(text.encode()) / len(text)


# --- Versions -------------------------------------------------------------------------------------


def with_template(lm: LM) -> LM:
    """The model, with a template if it has none."""
    if lm.tokenizer.chat_template is not None:
        return lm
    own = ByteTokenizer()
    tokenizer = Tokenizer(own.backend, own.special, own.add_bos, own.end_ids, TEMPLATE)
    return dataclasses.replace(lm, tokenizer=tokenizer)


def train(c: ConfigDict, expanded: LM, sample: Sequence[str], out: RunFolder) -> LM:
    """The expanded model after training on plain text; what is trained stays in the run's folder
    until everything is measured, because it takes longest.
    """
    loss = OuterLayers(expanded.spec, len(c.chat_shares) // 2)
    params, rest = loss.split(expanded.params)
    path = out / "trained.npz"
    if path.is_file():
        with np.load(path) as arrays:
            leaves = [jnp.asarray(arrays[f"{index}"]) for index in range(len(arrays.files))]
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    else:
        tokens = np.concatenate([expanded.tokenizer.encode(page) for page in sample])
        data = RandomWindows(tokens, length=c.length, rows=c.batch, seed=c.seed)
        with Progress(c.steps, label="training on plain text") as progress:
            params, _ = frozen.fit(
                lambda step: loss, params, rest, data.batch,
                optimizer=parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
                schedule=parse_choice(c.schedule, SCHEDULES, what="schedule"),
                steps=c.steps, progress=progress.update,
            )  # fmt: skip
        arrays = io.BytesIO()
        leaves = map(np.asarray, jax.tree.leaves(params))
        np.savez(arrays, **{f"{index}": leaf for index, leaf in enumerate(leaves)})
        out.write(path.name, arrays.getvalue())
    return dataclasses.replace(expanded, params=loss.join(params, rest))


def version_of(c: ConfigDict, name: str, chat: LM, expanded: LM, trained: LM) -> LM:
    if name not in REPAIRED:
        return {CHAT: chat, EXPANDED: expanded, TRAINED: trained}[name]
    method: Any = name
    params = restore_chat(
        trained.params, chat.params, template_ids(chat.tokenizer), rates=c.chat_shares,
        method=method,
    )  # fmt: skip
    return dataclasses.replace(trained, params=params)


def template_ids(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the chat template writes."""
    texts = dict.fromkeys(tokenizer.chat_frame()[1::2])
    return [tokenizer.backend.token_to_id(text) for text in texts]


# --- Conduct --------------------------------------------------------------------------------------


def written(
    lm: LM, prompts: Sequence[Int[np.ndarray, " _"]], limit: int
) -> list[Int[np.ndarray, " _"]]:
    """The tokens of each answer, the likeliest ones, with the one that ends it if there is one."""
    tokens = generate.generate_tokens(
        lm, prompts, sampling=generate.GREEDY, max_new_tokens=limit, key=jax.random.key(0)
    )
    answers = np.stack([np.asarray(step) for step in tokens], 1)
    ends = np.isin(answers, lm.tokenizer.eos_ids)
    lengths = np.where(ends.any(1), ends.argmax(1) + 1, answers.shape[1])
    return [answer[:length] for answer, length in zip(answers, lengths, strict=True)]


def in_form(tokenizer: Tokenizer, answer: Int[np.ndarray, " _"]) -> bool:
    added = tokenizer.backend.get_added_tokens_decoder()
    special = np.isin(answer, [index for index, token in added.items() if token.special])
    return bool(answer[-1] in tokenizer.eos_ids and not special[:-1].any())


# --- Showing --------------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[Row]:
    """Means with 95 % intervals over questions or pages."""
    lines = []
    for name in dict.fromkeys(row["version"] for row in rows):
        line: Row = {"version": name}
        for measure in MEASURES:
            values = [
                row["value"] for row in rows
                if (row["version"], row["measure"]) == (name, measure)
            ]  # fmt: skip
            if not values:
                continue
            interval = score.success_rate(round(sum(values)), len(values)) if measure == FORM \
                else score.over_documents(values)  # fmt: skip
            line["questions" if measure == FORM else "n"] = len(values)
            line[measure] = score.value_text(interval)
        lines.append({key: value for key, value in line.items() if key != "n"})
    return lines


def plot(rows: list[Row]) -> dict[str, Figure]:
    labels = {
        FORM: "answers in form (share)",
        ANSWERS: "the chat model's answers (nats/token)",
        TARGET: "the language of the new tokens (bits/character)",
        OTHER: "the other language (bits/character)",
    }
    return {
        f"chat_repair_{stem}": plots.bars(
            [row for row in rows if row["measure"] == measure], x="version", y="value",
            center=np.mean, x_label="", y_label=labels[measure],
        )
        for stem, measure in zip(("form", "answers", "target", "other"), MEASURES, strict=True)
    }  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check, may_change=("versions",))
