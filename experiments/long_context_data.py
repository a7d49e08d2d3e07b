"""One model of short contexts, trained further at long ones by several recipes of data."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention import policy as policies
from lminf.config import from_config, parse_choice
from lminf.data import store
from lminf.data.loader import Loader, Prefetched, parse_plan, parse_transforms
from lminf.data.plans import Mixture
from lminf.evals import perplexity
from lminf.experiments import _seeds, _training
from lminf.experiments._main import main
from lminf.experiments._recall import Needles, Recall
from lminf.models import heads, spec
from lminf.parallel import mesh, partition
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import batches
from lminf.train.loop import fit
from lminf.train.optim import OPTIMIZERS
from lminf.train.stages import Stage, Stages
from lminf.train.step import State, TrainStep

EIGHTHS = 8  # of a long row, with a loss and an accuracy each
SHORT_ONLY = "short stage only"
AT_ONCE = 16  # contexts of one evaluation
DISTINCT = 2**28  # tokens of a corpus at most: what a stage takes beyond it are further epochs


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses stages and worlds that do not fit each other."""
    short, long = stages_of(c, next(iter(c.recipes.values()))).stages
    world = Recall(c.num_keys, c.num_values)
    world.check(size=short.length, documents=long.length // (short.length + 3))
    world.check(size=long.length, documents=1)
    for recipe in c.recipes.values():
        _, stage = stages_of(c, recipe).stages
        parse_plan(stage.plan)
        parse_transforms(stage.transforms, vocab_size=world.vocab_size)


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    check(c)
    names = (SHORT_ONLY, *sorted(c.recipes, key=lambda name: name != "plain"))
    done = finished(out.rows())
    out.keep(lambda row: (row["recipe"], row["seed"]) in done)  # what an interrupted call left
    study = Study(c)
    for seed in range(c.seed, c.seed + c.replicates):
        missing = [name for name in names if (name, seed) not in done]
        if not missing:
            continue
        start = study.train_short(seed)
        for name in missing:
            if name == SHORT_ONLY:
                yield from study.measured(study.programs[0], start, recipe=name, seed=seed)
            else:
                state = study.train_long(jax.tree.map(jnp.copy, start), name, seed)
                yield from study.measured(study.programs[1], state, recipe=name, seed=seed)


def finished(rows: Sequence[Row]) -> set[tuple[str, int]]:
    """Recipes and seeds with all their rows; the loss of the last positions comes last."""
    return {
        (row["recipe"], row["seed"])
        for row in rows
        if row["part"] == "position" and row["stop"] == row["length"]
    }


def stages_of(c: ConfigDict, recipe: str) -> Stages:
    texts = (c.short_stage, f"{c.long_stage},{recipe}")
    short, long = (_training.stage_of(text) for text in texts)
    return Stages((short, long))


class Study:
    """The two programs that all recipes share, and the texts of each."""

    def __init__(self, c: ConfigDict) -> None:
        self.c, self.world = c, Recall(c.num_keys, c.num_values)
        self.stages = stages_of(c, next(iter(c.recipes.values())))
        self.short, self.long = self.stages.stages
        shape = spec.llama(
            vocab_size=self.world.vocab_size, trained_length=self.short.length,
            **c.model.to_dict(),
        )  # fmt: skip
        program = TrainStep(
            shape,
            (policies.FULL,) * shape.num_layers,
            mesh.make(from_config(c.mesh, mesh.MeshShape)),
            partition.parse(c.strategy),
            parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
            lambda step: step,  # each stage has its own
            dtype=_training.DTYPES[_training.known(c.dtype, _training.DTYPES, "dtype")],
            remat=c.remat,
        )
        self.programs = self.stages.programs(program)
        self.place = {"mesh": program.mesh, "strategy": program.strategy}
        self.share = batches.share(**self.place)

    # --- Training ---------------------------------------------------------------------------------

    def train_short(self, seed: int) -> State:
        """The state after the short stage, which all recipes go on from."""
        tokens = min(self.short.tokens, DISTINCT)
        corpus = self.written(tokens, self.short.length, seed, 0)
        data = self.loader([corpus], self.short, seed)
        state = self.programs[0].init(key=jax.random.key(seed))
        return self.fit(0, state, data, label=f"seed {seed}, short")

    def train_long(self, state: State, name: str, seed: int) -> State:
        _, stage = stages_of(self.c, self.c.recipes[name]).stages
        data = self.loader(self.corpora(stage, seed), stage, seed + 1)
        return self.fit(1, state, data, label=f"seed {seed}, {name}")

    def corpora(self, stage: Stage, seed: int) -> list[store.TokenStore]:
        """Short and long documents, for about one epoch of the stage if that is not too much."""
        plan, tokens = parse_plan(stage.plan), min(stage.tokens, DISTINCT)
        long = self.c.long_share
        if isinstance(plan, Mixture):
            long = plan.weights[1] / sum(plan.weights)
        return [
            self.written(round(tokens * (1 - long)), self.short.length, seed, 1),
            self.written(round(tokens * long), self.long.length, seed, 2),
        ]

    def written(self, tokens: int, size: int, seed: int, stream: int) -> store.TokenStore:
        count = -(-tokens // size)
        return store.from_documents(self.world.documents(count, size, seed=(seed, stream)))

    def loader(self, corpora: Sequence[store.TokenStore], stage: Stage, seed: int) -> Prefetched:
        transforms = parse_transforms(stage.transforms, vocab_size=self.world.vocab_size)
        loaded = Loader(corpora, parse_plan(stage.plan), length=stage.length, rows=stage.batch,
                        seed=seed, transforms=transforms)  # fmt: skip
        return Prefetched(loaded, **self.share._asdict())

    def fit(self, index: int, state: State, data: Prefetched, *, label: str) -> State:
        first = self.stages.ends[index] - self.stages.stages[index].steps
        with Progress(self.stages.ends[index], label=label, start=first) as progress:
            return fit(
                self.programs[index].step,
                state,
                lambda step: batches.put(data.batch(step - first), **self.place, share=self.share),
                steps=self.stages.ends[index],
                watch=lambda done, metrics: progress.update(done, loss=float(metrics.loss)),
            )

    # --- Measuring --------------------------------------------------------------------------------

    def measured(
        self, program: TrainStep, state: State, *, recipe: str, seed: int
    ) -> Iterator[Row]:
        """Accuracy of needles by distance, and the loss of long documents by position."""
        size, facts = self.short.length, {"recipe": recipe, "seed": seed}
        for length in (size + 3, self.long.length):
            needles = self.world.needles(self.c.contexts, size, length, seed=(seed, 3))
            right = self.answers(program, state, needles) == needles.answers
            width = self.long.length // EIGHTHS
            for start in range(0, length, width):
                at_distance = (needles.distances >= start) & (needles.distances < start + width)
                if at_distance.any():
                    yield {"part": "needle", **facts, "length": length, "start": start,
                           "stop": start + width, "questions": int(at_distance.sum()),
                           "accuracy": float(right[at_distance].mean())}  # fmt: skip
        length = self.long.length
        texts = self.world.documents(self.c.documents, length, seed=(seed, 4))
        tokens = np.stack(texts)
        nll = self.each(
            tokens, lambda rows: program.nll(state, {"tokens": rows[:, :-1],
                                                     "targets": rows[:, 1:]}),
        )  # fmt: skip
        for block in perplexity.by_position(list(nll), block=length // EIGHTHS, first=0):
            yield {"part": "position", **facts, "length": length, "start": block.start,
                   "stop": block.stop, "loss": block.nll}  # fmt: skip

    def answers(self, program: TrainStep, state: State, needles: Needles) -> np.ndarray:
        """The likeliest token after each question, [B, Q]."""
        questions = needles.answers.shape[1]
        answer = partial(_likeliest, program, questions)
        return self.each(needles.tokens, lambda rows: answer(state.params, rows))

    def each(self, rows: np.ndarray, measure: Callable[[Array], Array]) -> np.ndarray:
        """`measure` of some rows at a time, over all of them."""
        results = []
        for start in range(0, len(rows), AT_ONCE):
            chunk = rows[np.arange(start, start + AT_ONCE) % len(rows)]  # of one shape
            placed = batches.put({"tokens": chunk}, **self.place)["tokens"]
            results.append(np.asarray(measure(placed)))
        return np.concatenate(results)[: len(rows)]


@partial(jax.jit, static_argnums=(0, 1))
def _likeliest(program: TrainStep, questions: int, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = program.module.apply({"params": params}, tokens, positions=positions)
    return heads.lm(program.spec, params, hidden[:, -2 * questions :: 2]).argmax(-1)


# --- Showing --------------------------------------------------------------------------------------


def by_seed(rows: Sequence[Row], recipe: str) -> dict[str, dict[int, float]]:
    """Column -> seed -> value of one recipe."""
    of_recipe = [row for row in rows if row["recipe"] == recipe]
    long = max(row["length"] for row in rows)
    values: dict[str, dict[int, float]] = {}
    for seed in dict.fromkeys(row["seed"] for row in of_recipe):
        of_seed = [row for row in of_recipe if row["seed"] == seed]
        needles = [row for row in of_seed if row["part"] == "needle"]
        for column, chosen in (
            ("needles, one document", [row for row in needles if row["length"] < long]),
            (f"needles, {long:,} tokens", [row for row in needles if row["length"] == long]),
        ):
            questions = sum(row["questions"] for row in chosen)
            right = sum(row["questions"] * row["accuracy"] for row in chosen)
            values.setdefault(column, {})[seed] = right / questions
        losses = [row["loss"] for row in of_seed if row["part"] == "position"]
        values.setdefault("loss, long documents", {})[seed] = float(np.mean(losses))
        values.setdefault("loss, last eighth", {})[seed] = losses[-1]
    return values


def table(rows: list[Row]) -> list[Row]:
    """Means over seeds with 95 % intervals, and the needles found beyond plain packing by the same
    seeds.
    """
    done = finished(rows)
    rows = [row for row in rows if (row["recipe"], row["seed"]) in done]
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    measured = {recipe: by_seed(rows, recipe) for recipe in recipes}
    lines = []
    for recipe, columns in measured.items():
        line: Row = {"recipe": recipe}
        for column, values in columns.items():
            line[column] = _seeds.interval_text(list(values.values()))
        if "plain" in measured and recipe not in ("plain", SHORT_ONLY):
            column = list(columns)[1]
            base = measured["plain"][column]
            more = [x - base[seed] for seed, x in columns[column].items() if seed in base]
            line["needles beyond plain"] = _seeds.interval_text(more) if more else None
        lines.append(line)
    return lines


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    long = max(row["length"] for row in rows)
    needles = [row for row in rows if row["part"] == "needle" and row["length"] == long]
    return {
        "long_context_data": plots.curves(
            needles, x="stop", y="accuracy", by="recipe", y_limits=(-0.04, 1.04),
            x_label="distance of the answer (tokens)", y_label="needles found (share)",
        ),
        "by_position": plots.curves(
            [row for row in rows if row["part"] == "position"], x="stop", y="loss", by="recipe",
            x_label="position (tokens)", y_label="loss of long documents (nats/token)",
        ),
    }  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
