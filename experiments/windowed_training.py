"""Trains under windows and in full at one length, and reads many times that length.

Models of one seed start from the same parameters and see the same batches, and all read the same
text: differences between them are paired.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention import rope
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import FULL, AnyPolicy
from lminf.config import from_config, parse_choice
from lminf.data import sources, windows
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _policy_training, _seeds
from lminf.experiments._main import main
from lminf.experiments._policy_training import Training
from lminf.experiments._training import DTYPES, known
from lminf.models import cost, layer_policies
from lminf.parallel import mesh, partition
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import compiled
from lminf.train.step import REMAT, TrainStep

REREAD = "re-read"  # each token in a fresh window of the trained length: what windows replace
TIMED = 8  # steps of each policy and length


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses readings that are none, before an hour is spent."""
    if "full" not in c.policies:
        raise InputError(
            f"--config.policies={c.policies}: what windows are compared with is missing; add full"
        )
    if c.batch * c.length < c.length * c.times:
        raise InputError(
            f"--config.batch={c.batch}: a step of {c.batch * c.length} tokens holds no row of "
            f"{c.length * c.times}; give times={c.batch} at most, or a larger batch"
        )
    Study(c)


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    study, rows = Study(c), out.rows()
    timed = [row for row in rows if row["part"] == "speed"]  # the last part
    if len(timed) == 2 * len(study.trained):  # at two lengths
        return
    done = finished(rows, study)
    out.keep(lambda row: (row["trained"], row.get("seed")) in done)  # what an interrupted call left
    for seed in range(c.seed, c.seed + c.replicates):
        for name in study.trained:
            if (name, seed) not in done:
                yield from study.measured(name, seed)
    yield from study.speeds()


def finished(rows: Sequence[Row], study: "Study") -> set[tuple[str, int]]:
    """(training policy, seed) of the models whose every reading is there."""
    counts: dict[tuple[str, int], int] = {}
    for row in rows:
        if row["part"] == "position":
            key = row["trained"], row["seed"]
            counts[key] = counts.get(key, 0) + 1
    return {key for key, count in counts.items() if count == len(study.expected(key[0]))}


class Study:
    """The programs of all policies, which its seeds share, and the text."""

    def __init__(self, c: ConfigDict) -> None:
        self.c, self.long = c, c.length * c.times
        parsed = [parse_policy(text) for text in c.policies]
        self.trained = {policy.name: self.program(policy) for policy in parsed}
        in_full = self.trained[FULL.name]
        read_with = dict.fromkeys([*parsed, *map(parse_policy, c.read_policies)])
        self.readers = {policy.name: self.attending(in_full, policy) for policy in read_with}
        for text in c.read_scalings:
            self.readers[text] = self.scaled(in_full, text)
        tokens = np.asarray(ByteTokenizer().encode(sources.text_of(c.text)))
        self.text, held_out = np.split(tokens, [round(len(tokens) * (1 - c.held_out))])
        at_once = c.batch * c.length // self.long
        self.held_out = windows.consecutive(
            held_out, length=self.long, rows=at_once, at_most=-(-c.contexts // at_once)
        )
        if (count := at_once * len(self.held_out)) < c.contexts:
            raise InputError(
                f"--config.contexts={c.contexts}: the held-out end of the text has {count} rows of "
                f"{self.long} bytes; hold out more of it, or give a longer text"
            )

    def program(self, policy: AnyPolicy) -> TrainStep:
        c = self.c
        strategy = partition.parse(c.strategy)
        laid_out = mesh.make(from_config(c.mesh, mesh.MeshShape))
        partition.check(strategy, laid_out)
        return dataclasses.replace(
            _policy_training.program(c, policy),
            mesh=laid_out,
            strategy=strategy,
            dtype=DTYPES[known(c.dtype, DTYPES, "dtype")],
            remat=known(c.remat, REMAT, "remat policy"),
        )

    def attending(self, program: TrainStep, policy: AnyPolicy) -> TrainStep:
        shape = program.spec
        return dataclasses.replace(
            program,
            policies=layer_policies.by_layer(
                policy, windows=shape.windows, num_kv_heads=shape.num_kv_heads
            ),
        )

    def scaled(self, program: TrainStep, text: str) -> TrainStep:
        scaling = parse_choice(text, rope.SCALINGS, what="rotary schedule")
        assert isinstance(program.spec.encoding, rope.Rotary)
        encoding = dataclasses.replace(program.spec.encoding, scaling=scaling)
        return dataclasses.replace(
            program, spec=dataclasses.replace(program.spec, encoding=encoding)
        )

    # --- Losses -----------------------------------------------------------------------------------

    def expected(self, name: str) -> list[tuple[str, int]]:
        """(reading, start of a block) of every row about a model trained under this policy."""
        readings = [*self.readers, REREAD] if name == FULL.name else [name]
        return [(reading, start) for reading in readings for start, _ in self.blocks()]

    def blocks(self) -> list[tuple[int, int]]:
        """The trained length, and then each block up to twice as far."""
        edges = [self.c.length * 2**i for i in range(self.c.times.bit_length())]
        edges = [edge for edge in edges if edge < self.long]
        return list(zip([0, *edges], [*edges, self.long], strict=True))

    def measured(self, name: str, seed: int) -> Iterator[Row]:
        """Trains a model under the policy of this name, and reads with it."""
        c = self.c
        data = windows.RandomWindows(self.text, length=c.length, rows=c.batch, seed=seed)
        training = Training(self.trained[name], data, seed=seed)
        with Progress(c.steps, label=f"seed {seed}, {name}") as progress:
            training.fit(c.steps, progress)
        readers = self.readers if name == FULL.name else {name: self.trained[name]}
        for reading, reader in readers.items():
            yield from self.by_position(
                training.nll(self.held_out, reader), reader,
                trained=name, seed=seed, read=reading,
            )  # fmt: skip
        if name == FULL.name:
            nll = np.concatenate([self.reread(training, batch) for batch in self.held_out])
            yield from self.by_position(nll, None, trained=name, seed=seed, read=REREAD)

    def by_position(self, nll: np.ndarray, reader: TrainStep | None, **facts: Any) -> Iterator[Row]:
        """Mean loss of each block, and what the reading needs: most tokens that a query attends to,
        and bytes of the caches at the end of the row; without a `reader`, of fresh windows.
        """
        length = self.long if reader else self.c.length
        program = reader or self.trained[FULL.name]
        attended = cost.attended_tokens(program.policies[0]) or length
        needs = {
            "attended": min(attended, length),
            "cache_bytes": cost.cache_bytes(
                program.spec, program.policies, tokens=length, dtype=program.dtype
            ),
        }
        for start, stop in self.blocks():
            loss = float(nll[:, start:stop].mean(dtype=np.float64))
            yield {"part": "position", **facts, "start": start, "stop": stop, "loss": loss,
                   "tokens": len(nll) * (stop - start), **needs}  # fmt: skip

    def reread(self, training: Training, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """[rows, T] nats: each token with between half the trained length and all of it before."""
        length, half = self.c.length, self.c.length // 2
        starts = [*range(0, self.long - length, half), self.long - length]
        fresh = {
            name: np.concatenate([rows[:, start : start + length] for start in starts])
            for name, rows in batch.items()
        }
        scored = training.nll([fresh]).reshape(len(starts), -1, length)
        nll = np.zeros(batch["tokens"].shape)
        nll[:, :half] = scored[0, :, :half]
        for start, window in zip(starts, scored, strict=True):
            nll[:, start + half : start + length] = window[:, half:]
        return nll

    # --- Speed and memory -------------------------------------------------------------------------

    def speeds(self) -> Iterator[Row]:
        """Of training steps of equally many tokens, in rows of both lengths."""
        c = self.c
        for length in (c.length, self.long):
            rows = c.batch * c.length // length
            data = windows.RandomWindows(self.text, length=length, rows=rows, seed=c.seed)
            trainings = [Training(program, data, seed=c.seed) for program in self.trained.values()]
            quartiles = _policy_training.quartiles(trainings, TIMED)
            for (name, program), (low, median, high) in zip(
                self.trained.items(), quartiles, strict=True
            ):
                arguments = compiled.shapes_of(program, rows, length)
                memory = compiled.memory_of(program.step.lower(*arguments).compile())
                yield {"part": "speed", "trained": name, "length": length, "rows": rows,
                       "ms_per_step": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high,
                       "steps": TIMED, "tokens_per_second": rows * length / median,
                       "held_bytes": memory.arguments, "peak_bytes": memory.total}  # fmt: skip


# --- Showing --------------------------------------------------------------------------------------


def losses(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, dict[int, Row]]]:
    """(trained, read) -> start of the block -> seed -> row."""
    by_pair: dict[tuple[str, str], dict[int, dict[int, Row]]] = {}
    for row in rows:
        if row["part"] == "position":
            blocks = by_pair.setdefault((row["trained"], row["read"]), {})
            blocks.setdefault(row["start"], {})[row["seed"]] = row
    return by_pair


def table(rows: list[Row]) -> list[Row]:
    """Mean losses of the first and the last block with 95 % intervals over seeds; the last one also
    above that of re-reading, and of the model trained in full and read alike, by the same seeds;
    and of trainings their speed and memory.
    """
    by_pair, lines = losses(rows), []
    for (trained, read), blocks in by_pair.items():
        first, last = (list(blocks[start].values()) for start in (min(blocks), max(blocks)))
        line: Row = {"trained with": trained, "read with": read}
        for block in (first, last):
            column = f"loss {block[0]['start']:,}–{block[0]['stop']:,}"
            line[column] = _seeds.interval_text([row["loss"] for row in block])
        for column, base in (
            ("last, above re-reading", (FULL.name, REREAD)),
            ("last, above trained in full", (FULL.name, read)),
        ):
            against = by_pair.get(base, {}).get(max(blocks), {})
            paired = [row["loss"] - against[row["seed"]]["loss"] for row in last
                      if row["seed"] in against and base != (trained, read)]  # fmt: skip
            line[column] = _seeds.interval_text(paired) if paired else None
        line |= {"attended": last[0]["attended"], "cache kB": last[0]["cache_bytes"] / 1e3}
        lines.append(line)
    for row in rows:
        if row["part"] == "speed":
            reading = {"trained with": row["trained"], "read with": row["trained"]}
            line = next(line for line in lines if reading.items() <= line.items())
            line[f"training tokens/s, rows of {row['length']:,}"] = round(row["tokens_per_second"])
            line[f"peak MB, rows of {row['length']:,}"] = row["peak_bytes"] / 1e6
    return lines


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Losses by position read without a window, and those with one above re-reading."""
    by_pair = losses(rows)
    base = by_pair.get((FULL.name, REREAD), {})
    loss: list[Row] = []
    above: list[Row] = []
    for (trained, read), blocks in by_pair.items():
        far = any(row["attended"] == row["stop"] for row in blocks[max(blocks)].values())
        for start, seeds in blocks.items():
            line: Row = {"read": read, "stop": next(iter(seeds.values()))["stop"]}
            if far or read == REREAD:
                loss.append({**line, **point([row["loss"] for row in seeds.values()])})
            elif paired := [row["loss"] - base[start][seed]["loss"] for seed, row in seeds.items()
                            if seed in base.get(start, {})]:  # fmt: skip
                how = "in full" if trained == FULL.name else "with the window that reads"
                above.append({**line, "trained": f"trained {how}", **point(paired)})
    settings: dict[str, Any] = {
        "x": "stop", "y": "value", "by": "read", "log_x": True, "x_label": "position (tokens)",
        "mark": min(row["stop"] for row in rows if row["part"] == "position"),
        "interval": ("low", "high"),
    }  # fmt: skip
    figures = {}
    if loss:  # an interrupted run may have one and not the other
        y_label = "held-out loss (nats/token)"
        figures["windowed_training"] = plots.curves(loss, y_label=y_label, **settings)
    if above:
        y_label = "loss above re-reading (nats/token)"
        figures["above_rereading"] = plots.curves(
            above, y_label=y_label, panel="trained", **settings
        )
    return figures


def point(values: Sequence[float]) -> Row:
    interval = _seeds.interval(values)
    return {"value": interval.mean, **score.ends(interval)}


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
