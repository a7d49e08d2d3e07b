"""lminf rerank MODEL FOLDER: whether a model's ranking of documents obeys an instruction.

FOLDER is a collection of FollowIR. With --out=FILE every query is a line of that file as soon as it
is measured; the same command goes on, and other policies add theirs.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from lminf.atomic import check_space
from lminf.commands import _model
from lminf.evals import follow_ir, score
from lminf.evals.follow_ir import QueryScores
from lminf.lm.prefix import SharedPrefix
from lminf.run import folder, tables
from lminf.run.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("folder", help="a published collection of FollowIR")
    parser.add_argument("--out", metavar="FILE", help=".jsonl; a query a line, to go on from")


def run(args: argparse.Namespace) -> None:
    queries = follow_ir.read(args.folder)
    rows = folder.read_lines(Path(args.out)) if args.out else []
    if args.out:
        check_space(Path(args.out), 0)
    lm = _model.load(args)
    rank = follow_ir.by_model(SharedPrefix(lm))
    columns = {"model": args.model, "policy": lm.policy.name, "dtype": args.dtype,
               "weights": args.weights, "scaling": args.scaling}  # fmt: skip
    measured: list[QueryScores] = []
    with Progress(len(queries), label=lm.policy.name, unit="queries") as progress:
        for count, query in enumerate(queries, 1):
            identity = {**columns, "query_digest": query.digest}
            complete = (row for row in rows if row.keys() >= set(QueryScores._fields))
            row = next((row for row in complete if identity.items() <= row.items()), None)
            if row is None:
                row = {**identity, **follow_ir.measure(rank, query)._asdict()}
                if args.out:
                    folder.append_line(Path(args.out), row)
            measured.append(QueryScores(*(row[name] for name in QueryScores._fields)))
            progress.update(count)
    Console(highlight=False).print(tables.rich_table([line(measured)], title=lm.policy.name))


def line(measured: list[QueryScores]) -> dict[str, Any]:
    """The line of the table: means over queries with their 95 % intervals."""
    result = follow_ir.summary(measured)
    return {
        "queries": len(measured),
        "with a document ruled out": result.queries,
        "p-MRR": score.value_text(result.p_mrr, digits=3),
        "MAP, original instruction": score.value_text(result.map_original, digits=3),
        "MAP, changed instruction": score.value_text(result.map_changed, digits=3),
        "nDCG@5, original": score.value_text(result.ndcg_original, digits=3),
        "nDCG@5, changed": score.value_text(result.ndcg_changed, digits=3),
    }
