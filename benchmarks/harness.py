"""SmolLM2 in lm-evaluation-harness: lminf beside `hf`, the harness's own model over transformers.

    python -m benchmarks.harness
    python -m benchmarks.harness --limit=20 --length=4000 --policy=lm_infinite:window=1024,sinks=10

Needs the extra `benchmarks`. Two of RULER's tasks, whose prompts the harness makes, and two on
Python's documentation: which of four phrases goes on, and how likely texts are. Prints a table,
and of every side the largest difference of its log-likelihoods from those of `hf` in float32 and in
float64, in nats, and how many of its answers are those of `hf`, letter by letter. What float32
rounds away is the distance of `hf` from itself in float64. `--out` adds the lines to a .jsonl file.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api import registry
from rich.console import Console

from lminf import checkpoints
from lminf.data import sources
from lminf.evals import harness  # noqa: F401  registers the model
from lminf.run import environment, folder, tables

MODEL = "smollm2-135m-instruct"
RULER = ("niah_single_1", "ruler_vt")
EXACT = "hf in float64"
CONTEXT, PHRASE, TEXT = 150, 8, 400  # words: before a phrase, of a phrase, of a text


def phrases(count: int) -> list[dict[str, Any]]:
    """Contexts with four phrases of the same text, of which one goes on."""
    words, random = sources.text_of(None).split(), np.random.default_rng(0)
    rows = []
    for _ in range(count):
        first, *others = random.integers(CONTEXT, len(words) - PHRASE, 4)
        shown = [" " + " ".join(words[at : at + PHRASE]) for at in (first, *others)]
        order = random.permutation(4)
        rows.append({
            "text": " ".join(words[first - CONTEXT : first]),
            "choices": [shown[index] for index in order], "answer": order.tolist().index(0),
        })  # fmt: skip
    return rows


def texts(count: int) -> list[dict[str, Any]]:
    words = sources.text_of(None).split()
    return [{"text": " ".join(words[n * TEXT : (n + 1) * TEXT])} for n in range(count)]


def task(name: str, rows: Callable[[int], list[dict[str, Any]]], count: int, **more: Any) -> Any:
    """As the harness takes it."""
    made = {"test": datasets.Dataset.from_list(rows(count))}
    return {"task": name, "custom_dataset": lambda **_: made, "test_split": "test", **more}


def tasks(count: int) -> list[Any]:
    phrased = task(
        "phrases", phrases, count, output_type="multiple_choice", doc_to_text="{{text}}",
        doc_to_choice="{{choices}}", doc_to_target="{{answer}}", target_delimiter="",
    )  # fmt: skip
    rolled = task(
        "texts", texts, count, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    return [phrased, rolled, *RULER]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=4, help="questions of each task (4)")
    parser.add_argument("--length", type=int, default=1000, help="tokens of RULER's prompts (1000)")
    parser.add_argument("--policy", default="lm_infinite:window=512,sinks=10", help="beside full")
    parser.add_argument("--out", type=Path, help=".jsonl, a line for each task and side")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints.save(f"{temporary}/{MODEL}", checkpoints.load(MODEL))
        asked = {
            "hf": {"dtype": "float32", "device": "cpu"},
            EXACT: {"dtype": "float64", "device": "cpu"},
            "lminf full": {"policy": "full", "batch_size": "auto"},
            f"lminf {args.policy}": {"policy": args.policy, "batch_size": "auto"},
        }
        measured = {}
        for name, more in asked.items():
            lm = registry.get_model(name.split()[0])(f"{temporary}/{MODEL}", **more)
            started = time.perf_counter()
            measured[name] = measure(lm, f"{temporary}/{MODEL}", args)
            print(f"{name}: {time.perf_counter() - started:.0f} s")
    facts = {
        "questions": args.limit,
        "ruler_tokens": args.length,
        "processor": environment.cpu_model(),
    }
    rows = [
        {"task": task, "model": side, "score": found[task]["score"],
         **differences(found[task]["responses"],
                       *(measured[name][task]["responses"] for name in ("hf", EXACT))),
         **facts}
        for task in measured["hf"] for side, found in measured.items()
    ]  # fmt: skip
    for row in rows if args.out else []:
        folder.append_line(args.out, row)
    shown = [
        {name: f"{value:.1e}" if name.startswith("nats") and value is not None else value
         for name, value in row.items()}
        for row in rows
    ]  # fmt: skip
    Console(width=200).print(tables.rich_table(shown))


def measure(lm: Any, model: str, args: Any) -> dict[str, Any]:
    """Of each task its score and its responses."""
    results = lm_eval.simple_evaluate(
        model=lm, tasks=tasks(args.limit), limit=args.limit, bootstrap_iters=0,
        metadata={"tokenizer": model, "max_seq_lengths": [args.length]},
    )  # fmt: skip
    metrics = ("acc", "bits_per_byte", str(args.length))
    return {
        name: {
            "score": next(scores[f"{m},none"] for m in metrics if f"{m},none" in scores),
            "responses": [r for sample in results["samples"][name] for r in sample["resps"]],
        }
        for name, scores in results["results"].items()
    }


def differences(mine: Sequence[Any], theirs: Sequence[Any], exact: Sequence[Any]) -> dict[str, Any]:
    """Of log-likelihoods the largest distances in nats, or how many answers are the same."""
    if isinstance(mine[0][0], str):
        same = sum(one == other for one, other in zip(mine, theirs, strict=True))
        return {"nats_from_hf": None, "nats_from_float64": None, "answers_as_hf": same}
    values, *others = (np.array([np.ravel(each[0])[0] for each in of], np.float64)
                       for of in (mine, theirs, exact))  # fmt: skip
    far = [float(abs(values - other).max()) for other in others]
    return {"nats_from_hf": far[0], "nats_from_float64": far[1], "answers_as_hf": None}


if __name__ == "__main__":
    main()
