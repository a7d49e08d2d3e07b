"""SmolLM2 in lm-evaluation-harness: lminf beside `hf`, the harness's own model over transformers.

    python -m benchmarks.harness
    python -m benchmarks.harness --limit=20 --length=4000 --policy=lm_infinite:window=1024,sinks=10

Needs the extra `benchmarks`. Two of RULER's tasks, whose prompts the harness makes, and two on
Python's documentation: which of four phrases goes on, and how likely texts are. Prints a table,
and of every side the largest difference of its log-likelihoods from those of `hf`, in nats, and
how many of its answers are those of `hf`, letter by letter.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api import registry

from lminf import checkpoints
from lminf.data import sources
from lminf.evals import harness  # noqa: F401  registers the model
from lminf.run import environment

MODEL = "smollm2-135m-instruct"
RULER = ("niah_single_1", "ruler_vt")
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
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(f"{folder}/{MODEL}", checkpoints.load(MODEL))
        asked = {
            "hf": {"dtype": "float32", "device": "cpu"},
            "lminf full": {"policy": "full", "batch_size": "auto"},
            f"lminf {args.policy}": {"policy": args.policy, "batch_size": "auto"},
        }
        measured = {}
        for name, more in asked.items():
            lm = registry.get_model(name.split()[0])(f"{folder}/{MODEL}", **more)
            started = time.perf_counter()
            measured[name] = measure(lm, f"{folder}/{MODEL}", args)
            print(f"{name}: {time.perf_counter() - started:.0f} s")
    print(f"\nn = {args.limit} a task, {environment.cpu_model()}\n")
    print("| task | model | score | nats from hf | answers as hf |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name in measured["hf"]:
        for side, found in measured.items():
            print(line(name, side, found[name], measured["hf"][name]["responses"]))


def measure(lm: Any, folder: str, args: Any) -> dict[str, Any]:
    """Of each task its score and its responses."""
    results = lm_eval.simple_evaluate(
        model=lm, tasks=tasks(args.limit), limit=args.limit, bootstrap_iters=0,
        metadata={"tokenizer": folder, "max_seq_lengths": [args.length]},
    )  # fmt: skip
    metrics = ("acc", "bits_per_byte", str(args.length))
    return {
        name: {
            "score": next(scores[f"{m},none"] for m in metrics if f"{m},none" in scores),
            "responses": [r for sample in results["samples"][name] for r in sample["resps"]],
        }
        for name, scores in results["results"].items()
    }


def line(name: str, side: str, found: Mapping[str, Any], theirs: Sequence[Any]) -> str:
    nats, same = "", ""
    pairs = [(mine[0], other[0]) for mine, other in zip(found["responses"], theirs, strict=True)]
    if isinstance(pairs[0][0], str):
        same = f"{sum(mine == other for mine, other in pairs)} of {len(pairs)}"
    else:
        nats = f"{max(abs(np.ravel(mine)[0] - np.ravel(other)[0]) for mine, other in pairs):.1e}"
    return f"| {name} | {side} | {found['score']:.3f} | {nats} | {same} |"


if __name__ == "__main__":
    main()
