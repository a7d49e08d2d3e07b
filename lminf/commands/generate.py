"""lminf generate MODEL PROMPT: what a model says next, as it says it."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lminf.commands import _model
from lminf.config import parse_choice
from lminf.data import sources
from lminf.errors import InputError, printable
from lminf.lm.acceptance import RULES
from lminf.lm.drafts import parse_draft
from lminf.lm.generate import Sampling
from lminf.lm.lm import LM
from lminf.lm.speculative import DRAFT_TOKENS, check_rule
from lminf.ranges import Range

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for tabs and ends of lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    _model.add_special(parser)
    parser.add_argument("prompt", nargs="?", help="default: standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, help="draw among the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw among the fewest that hold this much")
    parser.add_argument("--stop", action="append", default=[], help="text to end at; may repeat")
    parser.add_argument("--draft", help="what proposes tokens that the model then reads together: "
                        "prompt_lookup, ngram:FOLDER of an index, layers:8, "
                        "policy:lm_infinite:window=1024,sinks=4, retrieved:tokens=512, or a model "
                        "with the same tokenizer; greedy answers stay the same")  # fmt: skip
    parser.add_argument("--draft-tokens", type=int, help="that it proposes at a time (7)")
    parser.add_argument("--acceptance", help="of what it proposes: standard, or rapid:eta=10, "
                        "which moves the answer towards the draft's")  # fmt: skip
    parser.add_argument("--seed", type=_model.seed, help="of what is drawn (0)")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template; "
                        "without a prompt, a conversation, a line a turn")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    for name in ("top_k", "top_p", "seed"):
        if not args.temperature and getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} means nothing at temperature 0, where nothing is "
                f"drawn; give a --temperature too"
            )
    if problem := Range(min=0, max=1e6).problem(args.temperature):
        raise InputError(f"--temperature={args.temperature}: give {problem}")
    if "" in args.stop:
        raise InputError("--stop is empty, and every text ends so; give a text, or leave it out")
    args.seed = args.seed or 0
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens={args.max_new_tokens}: give at least 1")
    load = drafting(args)
    if args.chat:
        if args.special != "plain":
            raise InputError("--special=parse and --chat: what messages hold is always plain; "
                             "leave --special out")  # fmt: skip
        converse(load(args), args, sampling)
        return
    prompt = sources.piped(sys.stdin.read) if args.prompt is None else args.prompt
    if not prompt:
        raise InputError("the prompt is empty; write it behind the model's name, or pipe it in")
    lm = load(args)
    for _, piece in lm.stream(
        [prompt], max_new_tokens=args.max_new_tokens, sampling=sampling, stop=args.stop,
        seed=args.seed, special=args.special,
    ):  # fmt: skip
        show(piece)
    print()


def drafting(args: argparse.Namespace) -> Callable[[argparse.Namespace], LM]:
    """What loads the model, with its draft if it shall have one."""
    tokens = args.draft_tokens
    if args.draft is None:
        for name in ("draft_tokens", "acceptance"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} means nothing without --draft; give one too")
        return _model.load
    rule = parse_choice(args.acceptance or "standard", RULES, what="rule of acceptance")
    settings: dict[str, Any] = {"rule": rule}
    if tokens is not None:
        settings["num_draft_tokens"] = tokens
    check_rule(rule, args.temperature)
    if tokens is not None and (problem := DRAFT_TOKENS.problem(tokens, whole=True)):
        raise InputError(f"--draft-tokens={tokens}: give {problem}")

    def load(name: str) -> LM:
        return LM.from_pretrained(name, dtype=jnp.dtype(args.dtype), weights=args.weights)

    made = parse_draft(args.draft, model=args.model, load=load)

    def with_draft(args: argparse.Namespace) -> LM:
        lm = _model.load(args)
        return lm.with_draft(made(lm), **settings)

    return with_draft


def show(piece: str) -> None:
    """Prints a piece of what a model says, of which nothing acts on a terminal."""
    if sys.stdout.isatty():
        piece = CONTROL.sub(lambda match: printable(match[0]), piece)
    print(piece, end="", flush=True)


def converse(lm: LM, args: argparse.Namespace, sampling: Sampling) -> None:
    """One answer to the prompt; without one, a turn for each line of standard input."""
    messages: list[dict[str, str]] = []
    lines = [args.prompt] if args.prompt is not None else iter(_line, "")
    for line in lines:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        said = ""
        for piece in lm.chat(
            messages, max_new_tokens=args.max_new_tokens, sampling=sampling, stop=args.stop,
            seed=args.seed,
        ):  # fmt: skip
            show(piece)
            said += piece
        print()
        messages.append({"role": "assistant", "content": said})


def _line() -> str:
    return sources.piped(sys.stdin.readline)
