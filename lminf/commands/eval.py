"""lminf eval TASK[,TASK…]: how well models answer under policies, by task and prompt length.

The run is one of the experiment effective_length, and `lminf show` shows it again. The same command
with the same --out goes on where a run was stopped; tasks, policies and lengths may be added.
"""

import argparse
import re
from collections.abc import Sequence

from lminf.config import signature, split_choices
from lminf.errors import InputError

LENGTH = re.compile(r"([1-9][0-9]{0,8})(k?)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", nargs="?", metavar="TASK[,TASK…]",
                        help="as in ruler,babilong:facts=2; --list prints them")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the tasks and their fields")
    parser.add_argument("--model", default="smollm2-135m-instruct",
                        help="a table name, a folder, a .gguf file, owner/name; default: "
                        "smollm2-135m-instruct")  # fmt: skip
    parser.add_argument("--chat", action="store_true",
                        help="prompts are messages, in the chat template of the model")  # fmt: skip
    parser.add_argument("--dtype", default="float32",
                        help="of weights, activations and caches: float32, bfloat16 or float16 "
                        "(float32)")  # fmt: skip
    parser.add_argument("--policy", default="full", metavar="P[,P…]",
                        help="as in full,lm_infinite:window=4096,sinks=10 (full)")  # fmt: skip
    parser.add_argument("--lengths", default="4k", metavar="N[,N…]",
                        help="tokens of the whole prompt, k for 1,024 (4k)")  # fmt: skip
    parser.add_argument("--instances", type=int, default=50,
                        help="of each task at each level and length (50)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--out", help="the run's folder; default: a new one below runs/")


def run(args: argparse.Namespace) -> None:
    if args.list:
        print_tasks()
        return
    if args.tasks is None:
        raise InputError("no task is named; `lminf eval --list` lists what there is")
    fields = {
        "tasks": tuple(split_choices(args.tasks)),
        "model": args.model,
        "chat": args.chat,
        "dtype": args.dtype,
        "policies": tuple(split_choices(args.policy)),
        "lengths": lengths_of(args.lengths),
        "instances": args.instances,
        "seed": args.seed,
    }
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    words += [f"--out={args.out}"] if args.out else []
    from lminf.experiments import _main, effective_length

    _main.main(
        effective_length.run, effective_length.plot, table=effective_length.table, resumes=True,
        may_change=effective_length.MAY_CHANGE,
        argv=[*words, *(["--debug"] if args.debug else [])],
    )  # fmt: skip


def lengths_of(text: str) -> Sequence[int]:
    """`4k,16384` as numbers of tokens."""
    lengths = []
    for word in text.split(","):
        match = LENGTH.fullmatch(word.strip())
        if not match:
            raise InputError(f"--lengths={text}: {word!r} is no length; write 4096 or 4k")
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(lengths)


def print_tasks() -> None:
    """Two lines a task: its fields with their defaults; what it asks for, scope and diffusion."""
    from lminf.evals.suites import catalog

    suites = {kind: name for name, kinds in catalog.SUITES.items() for kind in kinds}
    for name, kind in catalog.TASKS.items():
        title = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        suite = f"; of {suites[kind]}" if kind in suites else ""
        print(signature(kind, name))
        print(f"    {title} Scope {kind.scope}, diffusion {kind.diffusion}{suite}.")
    print(
        "\nA suite's name means all of its tasks. A task is measured at levels of its difficulty "
        "unless the\nfield is given: niah_multikey at five depths, niah_multikey:depth=0.5 at one."
    )
