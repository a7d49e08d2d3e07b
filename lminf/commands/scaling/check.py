"""lminf scaling check: published numbers against this code and the given files."""

from lminf import scaling
from lminf.run import tables as show
from lminf.scaling import (
    checks,
)
from lminf.scaling import tables as files


def check(args):
    found = list(checks.constants())
    skipped = []
    if args.vocab:
        found += checks.vocab_file(scaling.read_vocab(args.vocab))
    if args.step:
        columns, _, _ = files.read_columns(args.step, checks.DENSE_SHAPE_COLUMNS)
        found.append(checks.dense_shapes(columns))
        found += checks.step_file(scaling.read_step(args.step))
    if args.moe:
        columns, _, _ = files.read_columns(args.moe, checks.MOE_SHAPE_COLUMNS)
        found += checks.moe_shapes(columns)
        found += checks.moe_file(scaling.read_step(args.moe))
    if args.step_bootstrap:
        columns, _, _ = files.read_columns(args.step_bootstrap, tuple(checks.STEP_BOOTSTRAP))
        found += checks.bootstrap_file(columns)
    for flag in ("vocab", "step", "moe", "step_bootstrap"):
        if getattr(args, flag) is None:
            skipped.append(f"--{flag.replace('_', '-')} was not given: its checks did not run")
    failed = [row for row in found if row["ok"] is False]
    judged = sum(row["ok"] is not None for row in found)
    result = {
        "checks": found, "judged": judged, "failed": len(failed), "not_run": skipped,
    }  # fmt: skip

    def text(console):
        console.print(show.rich_table(found, digits=5))
        console.print(f"{judged} checks judged, {len(failed)} failed")
        for note in skipped:
            console.print(note)

    if not failed:
        return result, text
    first = failed[0]
    return (
        result,
        text,
        f"{len(failed)} of {judged} checks failed, the first: {first['what']} is "
        f"{first['value']:.6g}, expected {first['expected']:.6g} +- {first['tolerance']:.2g}",
    )
