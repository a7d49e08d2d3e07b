"""The ∞-gram index beside infini-gram on the same files: time of building and of every query.

    pip install infini-gram==2.6.0
    python -m benchmarks.ngram build --work=FOLDER
    python -m benchmarks.ngram answers --work=FOLDER
    python -m benchmarks.ngram speed --work=FOLDER --out=benchmarks/results/ngram.jsonl

`build` indexes the kernel's documentation (apt install linux-doc-6.1) with the tokenizer of
SmolLM2, all but every twentieth document, by both, in turns. `answers` compares all answers to
10,000 queries from the documents left out. `speed` times single queries and batches of 1,000, both
sides in turns, infini-gram with its index loaded into memory; of growing parts of the corpus too.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lminf.commands.tokenize import named_tokenizer
from lminf.data import documents, sources
from lminf.ngram import build, next_tokens, sorting
from lminf.ngram.encoding import Encoding
from lminf.ngram.index import Index, open_index
from lminf.run import environment

TEXTS = Path("/usr/share/doc/linux-doc-6.1/Documentation")
SUFFIXES = (".rst", ".txt", ".rst.gz", ".txt.gz")
TOKENIZER = "smollm2-135m-instruct"
ENCODING = Encoding(2, "bytes")  # as infini-gram has it
END_ID = 2  # <|im_end|>, which no document holds
PARTS = (16, 4, 1)  # of the corpus: one document in so many
HELD_OUT = 20  # one document in so many is none of the index
CONTEXT = 500  # tokens before the one that an ∞-gram is asked for
GIB = 2**30


def corpus(work: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(documents of the index, those left out) as tokens; kept in the folder."""
    kept = work / "documents.npz"
    if not kept.exists():
        tokenizer = named_tokenizer(TOKENIZER)
        paths = [str(path) for path in TEXTS.rglob("*")
                 if path.name.endswith(SUFFIXES) and not path.is_symlink()]  # fmt: skip
        files = sorted(documents.find(paths), key=lambda each: sources.digest(str(each.path)))
        texts = ("".join(piece.text for piece in documents.read(file)) for file in files)
        ids = [tokenizer.encode(text).astype(np.uint16) for text in texts]
        work.mkdir(parents=True, exist_ok=True)
        np.savez(kept, tokens=np.concatenate(ids), sizes=[len(each) for each in ids])
    with np.load(kept) as arrays:
        ids = np.split(arrays["tokens"], np.cumsum(arrays["sizes"])[:-1])
    held_out = ids[::HELD_OUT]
    return [each for i, each in enumerate(ids) if i % HELD_OUT], held_out


def build_ours(work: Path, part: int, *, own: bool) -> dict[str, Any]:
    """Seconds of a build from tokens in memory, and of its sort alone."""
    out = work / f"ours-{part}"
    shutil.rmtree(out, ignore_errors=True)
    ids, _ = corpus(work)
    made = build.of_documents(ids[::part], tokenizer=TOKENIZER,
                              tokenizer_digest=named_tokenizer(TOKENIZER).digest)  # fmt: skip
    started = time.perf_counter()
    index = build.build(made, out, encoding=ENCODING, memory_bytes=8 * GIB)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in out.iterdir())
    row = {"side": "lminf", "slots": index.slots, "seconds": seconds}
    return {**row, **sort_ours(work, part, own=own), "bytes_per_token": size / index.slots}


def sort_ours(work: Path, part: int, *, own: bool) -> dict[str, float]:
    """Seconds of the table alone, from the file of tokens to the file of the table: in memory, and
    by our own sort of a sixteenth of the suffixes at a time."""
    index = open_index(work / f"ours-{part}")
    table, shard = work / "table", index.shards[0]
    found = {}
    sixteenth = shard.slots * sorting.SLOT_BYTES // 16
    sorts = {"sort_seconds": 8 * GIB} | ({"own_sort_seconds": sixteenth} if own else {})
    for name, memory in sorts.items():
        table.unlink(missing_ok=True)
        started = time.perf_counter()
        sorting.write_table(shard.tokens, ENCODING, table, memory_bytes=memory)
        found[name] = time.perf_counter() - started
        same = table.read_bytes() == (work / f"ours-{part}" / "table.0").read_bytes()
        assert same, f"{name}: another table"
    return found


def build_peer(work: Path, part: int) -> dict[str, Any]:
    """Seconds of infini-gram's sort of the same file of tokens; its table has to be ours."""
    import infini_gram.indexing

    ours, out = work / f"ours-{part}", work / f"peer-{part}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name in ("tokenized.0", "offset.0"):
        shutil.copyfile(ours / name, out / name)
    program = Path(infini_gram.indexing.__file__).with_name("rust_indexing")
    program.chmod(0o755)
    before = os.getcwd()
    started = time.perf_counter()
    infini_gram.indexing.build_sa(
        Namespace(save_dir=str(out), temp_dir=str(out / "tmp"), worker_id=0, shards=1, workers=1,
                  mem=8, cpus=os.cpu_count(), token_width=ENCODING.width)
    )  # fmt: skip
    seconds = time.perf_counter() - started
    os.chdir(before)
    same = (out / "table.0").read_bytes() == (ours / "table.0").read_bytes()
    return {"side": "infini-gram", "sort_seconds": seconds, "table_is_ours": same}


def peer_engine(work: Path, part: int, *, loaded: bool) -> Any:
    from infini_gram.engine import InfiniGramEngine

    return InfiniGramEngine(
        index_dir=str(work / f"peer-{part}"), eos_token_id=END_ID, vocab_size=49152,
        token_dtype="u16", load_to_ram=loaded,
    )  # fmt: skip


def drawn_queries(work: Path, count: int, *, seed: int) -> list[list[int]]:
    """Contexts from the documents left out, each with the token after it."""
    _, held_out = corpus(work)
    random = np.random.default_rng(seed)
    long = [each for each in held_out if len(each) > CONTEXT + 1]
    sizes = np.array([len(each) for each in long], float)
    chosen = random.choice(len(long), count, p=sizes / sizes.sum())
    starts = [int(random.integers(0, len(long[i]) - CONTEXT)) for i in chosen]
    return [long[i][at : at + CONTEXT + 1].tolist() for i, at in zip(chosen, starts, strict=True)]


# kind -> (ours of many, infini-gram's of one, tokens of context; None: all)
Ask = tuple[Callable[[Index, Any], Any], Callable[[Any, list[int]], Any], int | None]


def _ids(found: dict[int, Any]) -> dict[int, int]:
    return {token: each["cont_cnt"] for token, each in found.items()}


KINDS: dict[str, Ask] = {
    "count 3": (
        lambda index, q: index.count(q).tolist(), lambda e, q: e.count(input_ids=q)["count"], 3,
    ),
    "count 8": (
        lambda index, q: index.count(q).tolist(), lambda e, q: e.count(input_ids=q)["count"], 8,
    ),
    "prob": (
        lambda index, q: list(zip(*(a.tolist() for a in index.prob(
            [x[:-1] for x in q], [x[-1] for x in q])[:2]), strict=True)),
        lambda e, q: tuple(e.prob(prompt_ids=q[:-1], cont_id=q[-1])[n]
                           for n in ("prompt_cnt", "cont_cnt")),
        4,
    ),
    "infgram_prob": (
        lambda index, q: list(zip(*(a.tolist() for a in index.infgram_prob(
            [x[:-1] for x in q], [x[-1] for x in q])), strict=True)),
        lambda e, q: tuple(e.infgram_prob(prompt_ids=q[:-1], cont_id=q[-1])[n]
                           for n in ("prompt_cnt", "cont_cnt", "suffix_len")),
        None,
    ),
    "ntd": (
        lambda index, q: distributions(next_tokens.ntd(index, q), len(q)),
        lambda e, q: _ids(e.ntd(prompt_ids=q)["result_by_token_id"]),
        2,
    ),
    "infgram_ntd": (
        lambda index, q: distributions(next_tokens.infgram_ntd(index, q), len(q)),
        lambda e, q: _ids(e.infgram_ntd(prompt_ids=q)["result_by_token_id"]),
        None,
    ),
}  # fmt: skip


def distributions(found: next_tokens.NextTokens, count: int) -> list[dict[int, int]]:
    """Token -> count of each prompt; infini-gram calls a separator the end of text."""
    names = {ENCODING.separator: END_ID}
    return [{names.get(t, t): n for t, n in found.of(i).items()} for i in range(count)]


def shortened(queries: list[list[int]], size: int | None) -> list[list[int]]:
    return queries if size is None else [query[-size:] for query in queries]


def answers(work: Path, count: int) -> Iterator[dict[str, Any]]:
    """How many of all answers are those of infini-gram; distributions of a tenth of the queries."""
    index, engine = open_index(work / "ours-1"), peer_engine(work, 1, loaded=True)
    drawn = drawn_queries(work, count, seed=0)
    for kind, (ours, theirs, size) in KINDS.items():
        queries = shortened(drawn if "ntd" not in kind else drawn[: count // 10], size)
        expected = [theirs(engine, query) for query in queries]
        same = sum(a == b for a, b in zip(ours(index, queries), expected, strict=True))
        one = sum(ours(index, [q])[0] == b
                  for q, b in zip(queries[:1000], expected[:1000], strict=True))  # fmt: skip
        yield {"part": "answers", "kind": kind, "queries": len(queries), "same": same,
               "same_of_first_1000_alone": one}  # fmt: skip


def speed(work: Path, *, singles: int, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Microseconds of processor time of a query, alone and in a batch, of both sides in turns."""
    for part in PARTS:
        index = open_index(work / f"ours-{part}")
        has_peer = (work / f"peer-{part}").exists()
        engine = peer_engine(work, part, loaded=True) if has_peer else None
        for kind, (ours, theirs, size) in KINDS.items():
            of_peer = batch // 10 if "ntd" in kind else batch
            alone, together = [], []
            for query in shortened(drawn_queries(work, singles, seed=1), size):
                pair = [timed(ours, index, [query])]
                pair += [timed(theirs, engine, query)] if engine else []
                alone.append(pair)
            for seed in range(rounds):
                queries = shortened(drawn_queries(work, batch, seed=2 + seed), size)
                pair = [timed(ours, index, queries) / batch]
                if engine:
                    pair += [timed(one_by_one, theirs, engine, queries[:of_peer]) / of_peer]
                together.append(pair)
            yield {
                "part": "speed", "kind": kind, "slots": index.slots,
                **of_turns("alone", alone), **of_turns("batch", together), "batch": batch,
                "singles": singles, "rounds": rounds,
            }  # fmt: skip


def one_by_one(ask: Callable[..., Any], engine: Any, queries: list[list[int]]) -> None:
    for query in queries:
        ask(engine, query)


def timed(ask: Callable[..., Any], *arguments: Any) -> float:
    """Microseconds of processor time, of all cores: others may use the machine."""
    started = time.process_time()
    ask(*arguments)
    return 1e6 * (time.process_time() - started)


def of_turns(name: str, pairs: list[list[float]]) -> dict[str, float]:
    """Medians, and that of the ratio of the same turn with its quartiles."""
    found = {f"{name}_us": statistics.median(pair[0] for pair in pairs)}
    if len(pairs[0]) > 1:
        found[f"{name}_us_peer"] = statistics.median(pair[1] for pair in pairs)
        ratios = [pair[0] / pair[1] for pair in pairs]
        low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
        found |= {f"{name}_ratio": median, f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    return found


def builds(work: Path, rounds: int) -> Iterator[dict[str, Any]]:
    for part in PARTS:
        for turn in range(rounds if part == 1 else 1):
            yield {
                "part": "build",
                "turn": turn,
                "of": part,
                **build_ours(work, part, own=turn == 0),
            }
            yield {"part": "build", "turn": turn, "of": part, **build_peer(work, part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("build", "answers", "speed"))
    parser.add_argument("--work", type=Path, required=True, help="a folder for the indexes")
    parser.add_argument("--rounds", type=int, default=3, help="turns (3)")
    parser.add_argument("--queries", type=int, default=10_000, help="of answers (10000)")
    parser.add_argument("--singles", type=int, default=200, help="single queries timed (200)")
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    args = parser.parse_args()
    made = {
        "build": lambda: builds(args.work, args.rounds),
        "answers": lambda: answers(args.work, args.queries),
        "speed": lambda: speed(args.work, singles=args.singles, batch=1000, rounds=args.rounds),
    }[args.what]
    for row in made():
        line = json.dumps({"processor": environment.cpu_model(), **row})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
