"""The tasks by name: `single_needle`, `babilong:facts=2`, or the name of a suite for all of its.

A task whose class has `levels` is measured at each of them unless the field is given.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lminf.config import closest, parse_choice
from lminf.errors import InputError
from lminf.evals.key_value import KeyValue
from lminf.evals.passkey import Passkey
from lminf.evals.suites import (
    ada_leval,
    benchmark_files,
    needle_threading,
    ruler,
    ruler_aggregation,
)
from lminf.evals.suites.babilong import BABILong
from lminf.evals.suites.infinite_bench import InfiniteBench
from lminf.evals.suites.long_icl import LongICL
from lminf.evals.suites.long_ins import LongIns
from lminf.evals.suites.long_write import LongBenchWrite, LongWrite
from lminf.evals.suites.longbench import LongBench, LongBenchV2
from lminf.evals.suites.loogle import LooGLE
from lminf.evals.suites.m4le import M4LE
from lminf.evals.suites.many_shot import ManyShot
from lminf.evals.task import Task

SUITES: Mapping[str, Sequence[Any]] = {
    "needle_threading": (
        needle_threading.SingleNeedle,
        needle_threading.MultiNeedle,
        needle_threading.ConditionalNeedle,
        needle_threading.SingleThread,
        needle_threading.MultiThread,
        needle_threading.BranchedThread,
    ),
    "ruler": (
        ruler.MultiKey,
        ruler.MultiValue,
        ruler.MultiQuery,
        ruler.VariableTracking,
        ruler_aggregation.CommonWords,
        ruler_aggregation.DocumentQA,
    ),
    "ada_leval": (ada_leval.TSort, ada_leval.BestAnswer),
}
# The tasks of published files, which their field `path` gives.
FILES: tuple[Any, ...] = (
    LongBench,
    LongBenchV2,
    InfiniteBench,
    LooGLE,
    benchmark_files.NeedleThreadingFile,
    benchmark_files.BestAnswerFile,
    benchmark_files.TSortFile,
    benchmark_files.LongInsFile,
    benchmark_files.M4LEFile,
    benchmark_files.SuperGPQA,
    LongICL,
    LongBenchWrite,
)
KINDS: tuple[Any, ...] = (
    Passkey, KeyValue, *(kind for kinds in SUITES.values() for kind in kinds), BABILong, LongIns,
    ManyShot, M4LE, LongWrite, *FILES,
)  # fmt: skip
TASKS: Mapping[str, Any] = {kind.name: kind for kind in KINDS}
IN_NATS = ("copy_gain", "needle_margin", "key_value_margin")  # no shares of right answers


def parse(text: str) -> list[Task]:
    """The tasks that a text such as `babilong:facts=2` means: a suite's, or one at its levels."""
    name, _, fields = text.strip().partition(":")
    if name in SUITES:
        if fields:
            raise InputError(
                f"{text!r} gives fields to a suite; give them to one of its tasks: "
                f"{', '.join(kind.name for kind in SUITES[name])}"
            )
        return [task for kind in SUITES[name] for task in parse(kind.name)]
    if name in IN_NATS:
        raise InputError(
            f"{name} is measured in nats, which no answer tells; `lminf run "
            f"long_context_retrieval` measures it"
        )
    if name == "follow_ir":
        raise InputError(
            "follow_ir compares two rankings of many documents, which no answer to a prompt is; "
            "`lminf rerank MODEL FOLDER` measures it"
        )
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}; {closest(name, [*TASKS, *SUITES])}")
    written = [text]
    if levels := TASKS[name].levels:
        field, values = levels
        if not re.search(rf"(^|,)\s*{field}\s*=", fields):
            joint = "," if fields else ":"
            written = [f"{text}{joint}{field}={value}" for value in values]
    return [parse_choice(each, TASKS, what="task") for each in written]
