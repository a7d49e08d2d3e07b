"""Command lines of experiments: overrides of every field, config files, variants."""

import contextlib
import io
import random
from pathlib import Path
from typing import Any

from lminf.attention.policy import POLICIES
from lminf.config import CLASS, parse_choice
from lminf.data.loader import parse_plan
from lminf.experiments import _training
from lminf.run import header, request
from tests.fuzz import mutate as damage
from tests.run.resolved import forms

WORDS = (
    "", "none", "None", "nan", "-inf", "1e999", "-1", "0", "0.5", "9" * 30, "9" * 5000, "(", "()",
    "(1,)", "(1,'a')", "(None,)", "[1]", "{}", "true", "'", '"', "full", "full:", "full:a=1",
    "window:window=-1", "lm_infinite:window=(1,2),sinks=nan", "cosine:peak=-1,floor=1,warmup=1",
    "wsd", "adamw:b1=2", "adamw:weight_decay=nan", "lora:rank=0", "\x00", "\x1b[2J", "é" * 50,
    "x=y", "a,b", "--out", "../..", "zero3+", "+", "mixture:weights=(1,-1)", "=",
    "decomposition:shortest=99", "infinite_hip:topk=(1,2)", "(" * 3000,
    "1" + "0" * 400,
    "__import__('os').getcwd()", "lambda: 0", "1+1", "1_000", "0x10", "1e3", "True",
)  # fmt: skip


def seeds(folder: Path) -> None:
    """One file an experiment: its name, then words of its command, each on a line."""
    for found in header.experiments():
        asked = request.parse(found.name, [])
        assert asked is not None
        fields = [
            f"--config.{name}={value}"
            for name, value in request.leaves(asked.config)
            if not name.endswith(CLASS)
        ]
        form = random.Random(found.name).choice(forms(found.name))
        words = [f"--config={found.name}:{form}", *fields]
        (folder / found.name).write_text("\n".join(words))


def mutate(rng: random.Random, path: Path) -> None:
    """A few of the words, one of them with another value, name or ending."""
    lines = path.read_text().splitlines()
    chosen = rng.sample(lines, min(len(lines), rng.randrange(1, 4)))
    index = rng.randrange(len(chosen))
    name, _, value = chosen[index].partition("=")
    changed = damage.change_bytes(rng, value.encode()).decode(errors="replace")
    values = (rng.choice(WORDS), changed, f"{value}{rng.choice(WORDS)}", f"-{value}")
    names = (name, name, name, name, name[:-1], f"{name}.x", name.rpartition(".")[0], "--config")
    chosen[index] = f"{rng.choice(names)}={rng.choice(values)}".replace("\n", " ")
    if rng.random() < 0.1:
        chosen.append(rng.choice(WORDS).replace("\n", " "))
    path.write_text("\n".join(chosen), encoding="utf-8", errors="surrogatepass")


def read(path: Path) -> None:
    words = path.read_text(encoding="utf-8", errors="replace").split("\n")
    with contextlib.redirect_stdout(io.StringIO()):
        asked = request.parse(path.name, words)
    if asked is None:
        return
    c: Any = asked.config
    for text in c.get("policies", ()) if path.name in ("passkey", "decode_cost") else ():
        parse_choice(text, POLICIES, what="policy")
    if path.name == "train_lm" and c.data.tokenizer == "bytes" and not c.init:
        _training.check(c)
        parse_plan(c.data.plan)
        if c.model.num_layers < 100 and c.model.width < 1 << 12:
            _training.program_of(c, _training.shape_to_plan(c), absent=8)
