"""lminf world bios --people 2000 --out FOLDER: a world whose truth is known, as token stores.

FOLDER gets a store for each split, such as FOLDER/train, with its texts beside it, questions.jsonl,
truth.jsonl and a tokenizer of whole words, so that training is
    python -m experiments.train_lm --config.data.path=FOLDER/train --config.data.tokenizer=FOLDER
bios        biographies of invented people, and questions about them
impossible  sentences in a language whose rules no human language has
"""

import argparse
from pathlib import Path

from lminf.checkpoints import hf_tokenizer
from lminf.config import closest, parse_choice
from lminf.data.worlds import bios, impossible
from lminf.data.worlds.world import World
from lminf.errors import InputError
from lminf.ranges import Range

OPTIONS = {  # world -> the options that it reads, with their defaults
    "bios": {"people": 2000, "augment": "single"},
    "impossible": {"language": "control", "sentences": 20_000, "tagged": None, "held_out": 1000},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("world", metavar="WORLD", help="bios or impossible")
    parser.add_argument("--out", required=True, help="a new folder for the stores")
    parser.add_argument("--seed", type=int, default=0, help="all that is random follows it (0)")
    of_bios = parser.add_argument_group("bios")
    of_bios.add_argument("--people", type=int, help="half of them may be asked about (2000)")
    of_bios.add_argument("--augment", help="single, or such as multi5+permute+fullname (single)")
    of_impossible = parser.add_argument_group("impossible")
    of_impossible.add_argument("--language", help=f"{', '.join(impossible.LANGUAGES)} (control)")
    of_impossible.add_argument("--sentences", type=int, help="of a small grammar (20000)")
    of_impossible.add_argument("--tagged", help="a text of one's own, each word as text/tag/lemma")
    of_impossible.add_argument("--held-out", type=int, help="sentences of the test split (1000)")


def run(args: argparse.Namespace) -> None:
    if "://" in args.out:
        raise InputError(f"--out={args.out}: a world is written into a folder; name one, and copy "
                         f"its stores from there")  # fmt: skip
    if problem := Range(min=0, max=2**31 - 1).problem(args.seed, whole=True):
        raise InputError(f"--seed={args.seed}: give {problem}")
    world = made(args)
    out = Path(args.out).expanduser()
    facts = world.write(out)
    hf_tokenizer.write(out, world.tokenizer)
    for name, written in facts.items():
        print(f"{out / name}: {written.tokens:,} tokens in {written.documents:,} documents")


def made(args: argparse.Namespace) -> World:
    """The world that the options describe; refuses those of another world."""
    if args.world not in OPTIONS:
        raise InputError(f"there is no world {args.world!r}; {closest(args.world, OPTIONS)}")
    given = {name: value for options in OPTIONS.values() for name in options
             if (value := getattr(args, name)) is not None}  # fmt: skip
    for name in given:
        if name not in OPTIONS[args.world]:
            raise InputError(f"--{name.replace('_', '-')} is not of the world {args.world}; "
                             f"leave it out")  # fmt: skip
    for name in ("sentences", "held_out"):
        if name in given and (problem := Range(min=1, max=10**7).problem(given[name], whole=True)):
            raise InputError(f"--{name.replace('_', '-')}={given[name]}: give {problem}")
    settings = OPTIONS[args.world] | given
    if args.world == "bios":
        augmentation = bios.parse_augmentation(settings["augment"])
        return bios.Bios(settings["people"], args.seed, augmentation).world()
    language = parse_choice(settings["language"], impossible.LANGUAGES, what="language")
    if settings["tagged"] and "sentences" in given:
        raise InputError("--sentences counts those of the grammar, and --tagged names a text "
                         "instead of it; leave one of the two out")  # fmt: skip
    tagged = (
        impossible.read_tagged(Path(settings["tagged"])) if settings["tagged"]
        else impossible.sentences(settings["sentences"], seed=args.seed)
    )  # fmt: skip
    return impossible.world(tagged, language, held_out=settings["held_out"], seed=args.seed)
