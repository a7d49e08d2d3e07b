"""lminf generate MODEL PROMPT: what a model says next, as it says it."""

import argparse
import sys

from lminf.commands import _model
from lminf.data import sources
from lminf.errors import InputError
from lminf.lm.generate import Sampling
from lminf.lm.lm import LM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("prompt", nargs="?", help="default: standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, help="draw among the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw among the fewest that hold this much")
    parser.add_argument("--stop", action="append", default=[], help="text to end at; may repeat")
    parser.add_argument("--seed", type=_model.seed, default=0)
    parser.add_argument("--chat", action="store_true", help="use the model's chat template; "
                        "without a prompt, a conversation, a line a turn")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens={args.max_new_tokens}: give at least 1")
    if args.chat:
        if args.special != "plain":
            raise InputError("--special=parse and --chat: what messages hold is always plain; "
                             "leave --special out")  # fmt: skip
        converse(_model.load(args), args, sampling)
        return
    prompt = sources.piped(sys.stdin.read) if args.prompt is None else args.prompt
    if not prompt:
        raise InputError("the prompt is empty; write it behind the model's name, or pipe it in")
    lm = _model.load(args)
    for _, piece in lm.stream(
        [prompt], max_new_tokens=args.max_new_tokens, sampling=sampling, stop=args.stop,
        seed=args.seed, special=args.special,
    ):  # fmt: skip
        print(piece, end="", flush=True)
    print()


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
            print(piece, end="", flush=True)
            said += piece
        print()
        messages.append({"role": "assistant", "content": said})


def _line() -> str:
    return sources.piped(sys.stdin.readline)
