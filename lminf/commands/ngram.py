"""lminf ngram VERB INDEX …: counts of any sequence of tokens in a corpus, and what follows it.

build INDEX SOURCES      an index of token stores or texts, for --tokenizer MODEL
count INDEX TEXTS        how often each text occurs
prob INDEX TEXTS         the probability of each text's last token after the others
ntd INDEX TEXTS          what follows each text, by all of its occurrences
infgram INDEX TEXTS      the same of the longest end of each text that occurs
docs INDEX TEXT          documents around --k occurrences of a text
attribute INDEX FILES    the parts of texts that occur as they stand, of --min-len tokens or more
decontaminate INDEX FILES  the documents that hold at least 80 % of a text's 13-grams

A build that was killed goes on where it was when the same command is given again.
"""

import argparse
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lminf.commands.tokenize import named_tokenizer
from lminf.config import closest
from lminf.data import sources, store
from lminf.data.storage import Storage
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError
from lminf.ngram import build, matches, next_tokens
from lminf.ngram.encoding import WIDTHS, Encoding, Order
from lminf.ngram.index import Index, open_index
from lminf.ranges import Range
from lminf.run import lock
from lminf.run.progress import Progress

MOST_SHOWN = 10  # next tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("verb", metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("index", metavar="INDEX", help="a folder")
    parser.add_argument("words", nargs="+", metavar="TEXTS")
    parser.add_argument("--tokenizer", help="a model's name or folder, or bytes")
    parser.add_argument("--width", type=int, choices=WIDTHS, help="bytes of a token (2)")
    parser.add_argument("--order", choices=typing.get_args(Order),
                        help="of suffixes: by token id, or as published by bytes (id)")  # fmt: skip
    parser.add_argument("--ids", action="store_true", help="texts are token ids, as in 5613,4086")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB, of build (4)")
    parser.add_argument("--shard-tokens", type=int, default=build.MOST_SLOTS,
                        help="after which build begins another shard (2^39)")  # fmt: skip
    parser.add_argument("--k", type=int, default=3, help="documents (3)")
    parser.add_argument("--min-len", type=int, default=8, help="tokens of a span (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents drawn (0)")
    parser.add_argument("--max-support", type=int, default=next_tokens.MAX_SUPPORT,
                        help="suffixes read for what follows a text (1000)")  # fmt: skip


COUNT = Range(min=1, max=2**31 - 1)
SIZES = {
    "memory": Range(above=0), "shard_tokens": Range(min=2, max=build.MOST_SLOTS),
    "min_len": COUNT, "k": COUNT, "seed": Range(min=0, max=2**31 - 1), "max_support": COUNT,
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.verb not in VERBS:
        raise InputError(f"there is no verb {args.verb!r}; {closest(args.verb, VERBS)}")
    for name, stated in SIZES.items():
        if problem := stated.problem(getattr(args, name)):
            raise InputError(f"--{name.replace('_', '-')}={getattr(args, name)}: give {problem}")
    VERBS[args.verb](args)


# --- Building -------------------------------------------------------------------------------------


def build_index(args: argparse.Namespace) -> None:
    out = Path(args.index).expanduser()
    encoding = Encoding(args.width or 2, args.order or "id")
    corpus = corpus_of(args)
    with lock.held(out, option="INDEX"), Progress(0, label="sort", unit="tokens") as progress:
        index = build.build(
            corpus, out, encoding=encoding, memory_bytes=int(args.memory * 2**30),
            shard_slots=args.shard_tokens, progress=progress.show,
        )  # fmt: skip
    shards = "" if len(index.shards) == 1 else f" in {len(index.shards)} shards"
    print(f"{out}: {index.slots:,} slots in {index.documents:,} documents{shards}")


def corpus_of(args: argparse.Namespace) -> build.Corpus:
    """Of one token store, or of texts for --tokenizer."""
    if len(args.words) == 1 and is_store(args.words[0]):
        if args.tokenizer:
            raise InputError(f"{args.words[0]} is a token store, which knows its tokenizer; leave "
                             f"--tokenizer out")  # fmt: skip
        return build.of_store(args.words[0])
    if not args.tokenizer:
        raise InputError(f"{', '.join(args.words)}: no token store; name a --tokenizer for texts, "
                         f"a model's or bytes")  # fmt: skip
    tokenizer, out = named_tokenizer(args.tokenizer), Path(args.index).expanduser()
    return build.of_texts(args.words, tokenizer, name=args.tokenizer, out=out)


def is_store(word: str) -> bool:
    local = Path(word).expanduser() / store.FACTS
    return store.read_facts(Storage(word)) is not None if "://" in word else local.exists()


# --- Queries --------------------------------------------------------------------------------------


class Opened:
    """An index with the tokenizer of its texts."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        published = Encoding(args.width or 2, args.order or "bytes")
        given = published if args.width or args.order else None
        self.index: Index = open_index(args.index, encoding=given)
        facts = self.index.facts
        name = args.tokenizer or (facts.tokenizer if facts else None)
        self.tokenizer: Tokenizer | None = None
        if name and not args.ids:
            self.tokenizer = named_tokenizer(name)
            digest = self.tokenizer.digest
            self.index = open_index(args.index, encoding=given, tokenizer_digest=digest)
        elif not args.ids:
            raise InputError(f"{args.index} names no tokenizer; give --tokenizer, or --ids")

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is not None:
            ids = self.tokenizer.encode(text).tolist()
        else:
            words = text.replace(",", " ").split()
            if not all(word.isdecimal() for word in words):
                raise InputError(f"{text[:40]!r} is no list of token ids; write 5613,4086,9068")
            ids = [int(word) for word in words]
            self._check_vocabulary(ids)
        if not ids:
            raise InputError("a text is empty; give at least one token")
        return ids

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        """Refuses ids that no text has, which would be counted 0 times; separators are counted."""
        facts, separator = self.index.facts, self.index.encoding.separator
        if facts is None or facts.vocab_size is None:
            return
        beyond = [token for token in ids if token >= facts.vocab_size and token != separator]
        if beyond:
            raise InputError(
                f"token id {beyond[0]} is beyond the tokenizer {facts.tokenizer} of this index, "
                f"whose ids are 0 to {facts.vocab_size - 1}; give ids of its tokenizer"
            )

    def show(self, ids: Sequence[int]) -> str:
        """Token ids as text."""
        if self.tokenizer is None:
            return ",".join(map(str, ids))
        kept = [token for token in ids if token != self.index.encoding.separator]
        return self.tokenizer.decode(kept) + (" <end>" if len(kept) < len(ids) else "")


def queries(args: argparse.Namespace) -> tuple[Opened, list[list[int]]]:
    opened = Opened(args)
    return opened, [opened.encode(text) for text in args.words]


def show(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    print(json.dumps(row) if args.json else text)


def count(args: argparse.Namespace) -> None:
    opened, token_ids = queries(args)
    for text, occurrences in zip(args.words, opened.index.count(token_ids).tolist(), strict=True):
        show(args, {"text": text, "count": occurrences}, f"{occurrences:>12,}  {text}")


def prob(args: argparse.Namespace) -> None:
    opened, encoded = queries(args)
    if short := next((t for t, ids in zip(args.words, encoded, strict=True) if len(ids) < 2), None):
        raise InputError(f"{short!r} is one token; give at least one before the last")
    counts = opened.index.prob([ids[:-1] for ids in encoded], [ids[-1] for ids in encoded])
    for i, text in enumerate(args.words):
        row = {"text": text, "prompt_count": int(counts.prompt_count[i]),
               "count": int(counts.cont_count[i]), "prob": float(counts.prob[i])}  # fmt: skip
        show(args, row, f"{row['prob']:.4f} = {row['count']:,} / {row['prompt_count']:,}  {text}")


def ntd(args: argparse.Namespace, *, longest_suffix: bool = False) -> None:
    opened, token_ids = queries(args)
    distribution = next_tokens.infgram_ntd if longest_suffix else next_tokens.ntd
    followers = distribution(opened.index, token_ids, max_support=args.max_support)
    for i, text in enumerate(args.words):
        tokens = sorted(followers.of(i).items(), key=lambda item: -item[1])
        matched = opened.show(token_ids[i][len(token_ids[i]) - int(followers.suffix_len[i]) :])
        total = int(followers.prompt_count[i])
        row = {
            "text": text, "suffix": matched, "suffix_len": int(followers.suffix_len[i]),
            "prompt_count": total, "approx": bool(followers.approx[i]), "tokens": dict(tokens),
        }  # fmt: skip
        lines = [f"{count / total:8.4f}  {count:>10,}  {opened.show([token])!r}"
                 for token, count in tokens[:MOST_SHOWN]]  # fmt: skip
        about = "about " if followers.approx[i] else ""
        head = f"after {matched!r} ({about}{total:,} times)"
        if len(tokens) > MOST_SHOWN:
            head += f", the {MOST_SHOWN} most frequent of {len(tokens):,} next tokens"
        show(args, row, "\n".join([head, *lines]))


def infgram(args: argparse.Namespace) -> None:
    ntd(args, longest_suffix=True)


def docs(args: argparse.Namespace) -> None:
    opened, token_ids = queries(args)
    for text, ids in zip(args.words, token_ids, strict=True):
        documents = opened.index.docs(ids, args.k, seed=args.seed)
        if not documents:
            raise InputError(f"{text[:40]!r} does not occur in {args.index}; give another text")
        for each in documents:
            shown = opened.show(each.tokens.tolist())
            row = {"shard": each.shard, "document": each.number, "start": each.start,
                   "length": each.length, "metadata": each.metadata, "text": shown}  # fmt: skip
            where = f"document {each.number} of shard {each.shard}, {each.length:,} tokens"
            show(args, row, f"{where}, from {each.start:,} on: {each.metadata}\n{shown}\n")


def attribute(args: argparse.Namespace) -> None:
    opened = Opened(args)
    for path in args.words:
        ids = opened.encode(sources.read_text(path))
        for span in matches.attribute(opened.index, ids, min_len=args.min_len):
            text = opened.show(ids[span.start : span.start + span.length])
            row = {"file": path, **span._asdict(), "span": text}
            show(args, row, f"{span.length:>6} tokens, {span.occurrences:,} times: {text!r}")


def decontaminate(args: argparse.Namespace) -> None:
    opened = Opened(args)
    texts = [opened.encode(sources.read_text(path)) for path in args.words]
    for match in matches.contaminated(opened.index, texts):
        metadata = opened.index.shards[match.shard].metadata(match.document)
        row = {**match._asdict(), "file": args.words[match.text], "metadata": metadata}
        show(args, row, f"document {match.document} of shard {match.shard} holds "
             f"{100 * match.share:.0f} % of {row['file']}: {metadata}")  # fmt: skip


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": build_index, "count": count, "prob": prob, "ntd": ntd, "infgram": infgram,
    "docs": docs, "attribute": attribute, "decontaminate": decontaminate,
}  # fmt: skip
