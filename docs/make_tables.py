"""Pages that repeat what stands elsewhere: docs/experiments.md and the results in README.md.

    python docs/make_tables.py        writes both; `make docs` begins with it

From the headers of configs/ and the committed rows of docs/results/.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lminf.run import folder, header, tables

FOLDER = Path(__file__).resolve().parent
EXPERIMENTS, README = FOLDER / "experiments.md", FOLDER.parent / "README.md"
BEGIN, END = "<!-- results: docs/make_tables.py -->\n", "<!-- end of results -->\n"
# At the end of README, where they do not stand in the way of a reader without a browser.
ROWS = "<!-- the rows of these numbers: docs/make_tables.py -->\n"
# Entries of headers that name other forms.
VARIANTS = ("Sizes", "Pod", "Choosing", "Long", "All", "Loss")
OPENING = """\
# Experiments

What each asks, how to run it, how long it takes, what to expect and what was measured here. Written
by `docs/make_tables.py` from the headers of `configs/` and the committed rows of `docs/results/`
and `docs/studies/`; each report names its machine, its versions and its configuration. `lminf list
NAME` prints a header.

Every experiment takes `--config=:tiny`, `--config.FIELD=VALUE` and `--out=DIR`, and leaves a folder
with its configuration, environment, `rows.jsonl`, figures and `report.md`. One that is stopped, by
Ctrl-C or SIGTERM, keeps its rows; `train_lm`, `long_context_eval`, `passkey`, `kv_cache` and sweeps
go on when their command is given again with the same `--out`.
"""


def experiments() -> str:
    """The page of all experiments."""
    return "\n".join([OPENING, *(section(found) for found in header.experiments())])


def section(found: header.Header) -> str:
    entries = found.entries
    lines = [f"## {found.name}", "", found.title, "", f"**{entries['Question']}**", ""]
    # The full form takes minutes to days; the tiny ones run in the tests.
    lines += ["```console", entries["Command"]]
    if "Tiny" in entries:
        lines.append(tiny(found))
    lines += ["```", ""]
    for name in ("Paper", "Data", "Time", "Expected", "Tiny", *VARIANTS):
        if name in entries:
            lines.append(f"- {name}: {plain(entries[name])}")
    return "\n".join([*lines, "", *measured(found.name)])


def tiny(found: header.Header) -> str:
    """The command of the tiny form."""
    if found.entries["Command"].startswith("lminf sweep"):
        return re.sub(r"(--config=\w+):\w+", r"\1:tiny", found.entries["Command"])
    return f"python -m experiments.{found.name} --config=:tiny"


def measured(name: str) -> list[str]:
    """What lies in docs/results and docs/studies, of this experiment (NAME) and of its variants
    (NAME_VARIANT).
    """
    runs = [path.parent for home in ("results", "studies")
            for path in sorted((FOLDER / home).glob(f"{name}*/rows.jsonl"))
            if path.parent.name == name or path.parent.name.startswith(f"{name}_")]  # fmt: skip
    if not runs:
        return ["Measured: no rows are committed.", ""]
    return [line for run in runs for line in one_run(name, run)]


def one_run(name: str, run: Path) -> list[str]:
    """How long it took, and the experiment's own table of its rows."""
    module = importlib.import_module(f"lminf.experiments.{name}")
    rows = folder.RunFolder(run).rows()
    shown = module.table(rows) if hasattr(module, "table") else rows
    report = (run / "report.md").read_text()
    took = re.search(r"^Time: (.*?)\.? *$", report, re.MULTILINE)
    what = f", `:{run.name.removeprefix(f'{name}_')}`" if run.name != name else ""
    # Of a run in several calls the report knows the time of the last, which says nothing.
    seconds = f" in {took[1]}" if took and "several calls" not in took[1] else ""
    where = f"{run.parent.name}/{run.name}"
    links = f"([rows]({where}/rows.jsonl), [report]({where}/report.md))"
    return [f"Measured{what}{seconds} {links}:", "", tables.markdown(shown), ""]


def plain(text: str) -> str:
    """Without what Markdown would read as markup: globs and <…>."""
    return text.replace("*", "\\*").replace("<", "\\<")


# --- README ---------------------------------------------------------------------------------------

NAMES = {
    "full": "Full",
    "lm_infinite:window=4096,sinks=10": "LM-Infinite, window 4096, sinks 10",
    "lm_infinite:window=2048,sinks=10": "LM-Infinite, window 2048, sinks 10",
    "window:window=4096": "Window 4096",
    "re-read": "re-read (the costly way)",
}
WIDE = "lm_infinite:window=4096,sinks=10"


# What the labels of links begin with.
SHORT = {
    "length_generalization": "lg", "long_context_eval": "lce", "long_context_eval_long": "long",
    "decode_cost": "dc", "passkey": "pk", "vocab_law": "vl", "step_law": "sl",
    "train_throughput": "tt",
}  # fmt: skip


class Rows:
    """The committed rows of one experiment, each with a link to its line."""

    def __init__(self, name: str):
        self.name = name
        self.rows = folder.RunFolder(FOLDER / "results" / name).rows()

    def link(self, show: Callable[[Any], str], **facts: Any) -> str:
        """What `show` makes of the one row with these values, as a link to it."""
        found = [
            (line, row)
            for line, row in enumerate(self.rows, 1)
            if all(row.get(key) == value for key, value in facts.items())
        ]
        if len(found) != 1:
            raise LookupError(f"{len(found)} rows of {self.name} have {facts}; one is needed")
        line, row = found[0]
        return f"[{show(row)}][{SHORT[self.name]}{line}]"


def joined(lines: list[list[str]]) -> str:
    """Cells as the lines of a Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


FORGETTING_AND_LOOKING_UP = {
    "lm_infinite:window=2048,sinks=10": "LM-Infinite",
    "streaming:window=2048,sinks=10": "StreamingLLM",
    "topk:window=2048,sinks=10,topk=20,at=8,from_layer=4": "LM-Infinite and its top-k",
    "infllm:window=1024,sinks=10,topk=16,block=64,repr_topk=4,exec_block=512": "InfLLM",
}


def results() -> str:
    """The tables of the README."""
    laws = (
        "Vocabularies refitted to, and settings judged on, the published measurements "
        "([which to take](docs/scaling_laws.md);\nan interval that ends at 64 has draws without an "
        "optimum, at 1,000,000 it ends at the search's bound):\n"
    )
    parts = loss_by_position(), keys_by_depth(), costs(), laws, vocabularies(), gaps(), training()
    return "\n".join(parts)


def loss_by_position() -> str:
    rows = Rows("length_generalization")
    starts = sorted({row["start"] for row in rows.rows})
    heads = [f"{start // 1024}–{start // 1024 + 2}k" for start in starts]
    lines = [["nats/token", *heads, "seconds"], ["---", *["---:"] * (len(starts) + 1)]]
    for policy, name in NAMES.items():
        cells = [
            rows.link(lambda row: f"{row['nll']:.3f}", policy=policy, start=start)
            for start in starts
        ]
        took = rows.link(lambda row: f"{row['seconds']:.0f}", policy=policy, start=0)
        lines.append([name, *cells, took])
    return joined(lines)


def keys_by_depth() -> str:
    """Keys found in prompts past the trained length, by where they stand."""
    found = {length: Rows(name) for length, name in
             ((16_384, "long_context_eval"), (32_768, "long_context_eval_long"))}  # fmt: skip
    depths = sorted({row["depth"] for row in found[16_384].rows if row["task"] == "passkey"})
    heads = [f"{100 * depth:.0f} %" for depth in depths]
    lines = [["keys found", *heads], ["---", *["---:"] * len(heads)]]
    for length, rows in found.items():
        asked = {row["policy"] for row in rows.rows}
        for policy, name in FORGETTING_AND_LOOKING_UP.items():
            if policy not in asked:
                continue
            cells = [
                rows.link(
                    lambda row: f"{row['correct']}/{row['prompts']}",
                    task="passkey", policy=policy, length=length, depth=depth,
                )
                for depth in depths
            ]  # fmt: skip
            lines.append([f"{length:,} tokens, {name}", *cells])
    return joined(lines)


def costs() -> str:
    decode, passkey = Rows("decode_cost"), Rows("passkey")

    def cost(policy, position):
        milliseconds, mebibytes = (
            decode.link(show, policy=policy, position=position)
            for show in (
                lambda row: f"{row['ms_per_token']:.0f} ms",
                lambda row: f"{row['cache_bytes'] / 2**20:.0f} MiB",
            )
        )
        return f"{milliseconds}, {mebibytes}"

    def found(policy, length, depth):
        return passkey.link(
            lambda row: f"{row['correct']}/{row['prompts']}",
            policy=policy, length=length, depth=depth,
        )  # fmt: skip

    def keys(policy, length):
        return f"{found(policy, length, 0.1)} early, {found(policy, length, 0.9)} late"

    lines = [
        ["measured on two CPU cores", "Full", "LM-Infinite, window 4096"],
        ["---", "---", "---"],
        ["next token after 4,096, and its cache", cost("full", 4096), cost(WIDE, 4096)],
        ["after 16,384", cost("full", 16384), cost(WIDE, 16384)],
        ["after 100,000", "–", cost(WIDE, 100_000)],
        ["keys found in 3,300 tokens", keys("full", 3300), keys(WIDE, 3300)],
        ["in 8,000", keys("full", 8000), keys(WIDE, 8000)],
        ["in 10,000", keys("full", 10_000), keys(WIDE, 10_000)],
    ]
    return joined(lines)


APPROACHES = {
    "approach 1, equal compute": "isoflop-huber",
    "approach 2, derivative": "derivative",
    "approach 3, loss, as released": "loss-reference",
    "approach 3, one covariate": "loss-consistent-reference",
    "approach 3, true tokens": "loss-tokens",
}


def vocabularies() -> str:
    """The vocabulary that each refitted approach gives a model, and its 95 % interval."""
    rows = Rows("vocab_law")
    full = {row["law"].rpartition("-")[0]: row["law"] for row in rows.rows if "law" in row}
    sizes = {"3B": 3e9, "7B": 7e9, "13B": 13e9, "70B": 70e9}
    heads = [f"for {size} (95 %)" for size in sizes]
    lines = [["vocabulary", *heads], ["---", *["---:"] * len(sizes)]]
    for name, law in APPROACHES.items():
        cells = [
            rows.link(
                lambda row: f"{row['vocab']:,.0f} ({row['low']:,.0f}–{row['high']:,.0f})",
                part="prediction", law=full[law], n_nv=n_nv,
            )
            for n_nv in sizes.values()
        ]  # fmt: skip
        lines.append([name, *cells])
    return joined(lines)


LAWS = {"step": "step law", "microsoft": "Microsoft", "porian": "Porian et al.",
        "deepseek": "DeepSeek", "openai-lr": "OpenAI (rate)"}  # fmt: skip


def gaps() -> str:
    """How far above the best of the published grids each law's rate and batch end."""
    rows = Rows("step_law")
    cells = [rows.link(lambda row: f"{row['linear']:.1f}", part="gap", law=law) for law in LAWS]
    lines = [
        ["learning rate and batch by", *LAWS.values()],
        ["---", *["---:"] * len(LAWS)],
        ["loss above the best of 14 grids (per mille)", *cells],
    ]
    return joined(lines)


def training() -> str:
    rows = Rows("train_throughput")
    speeds: dict[int, dict[str, float]] = {}
    for row in rows.rows:
        if row["part"] == "speed":
            speeds.setdefault(row["round"], {})[row["side"]] = row["tokens_per_second"]
    by_ratio = sorted(speeds, key=lambda one: speeds[one]["lminf"] / speeds[one]["torch"])
    middle = by_ratio[len(by_ratio) // 2]  # both sides of one round: the machine is shared
    ours, theirs = (
        rows.link(
            lambda row: f"{row['tokens_per_second']:,.0f}", part="speed", side=side, round=middle
        )
        for side in ("lminf", "torch")
    )
    return f"Training 10M parameters: {ours} tokens/s, a plain torch loop {theirs}.\n"


def readme() -> str:
    """README.md with the tables that its rows give."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1].split(ROWS)[0]
    shown, names = results(), {short: name for name, short in SHORT.items()}
    labels = dict.fromkeys(re.findall(r"\]\[([a-z]+)(\d+)\]", shown))
    targets = "".join(
        f"[{short}{line}]: docs/results/{names[short]}/rows.jsonl#L{line}\n"
        for short, line in labels
    )
    return before + BEGIN + shown + END + after + ROWS + targets


if __name__ == "__main__":
    EXPERIMENTS.write_text(experiments(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
