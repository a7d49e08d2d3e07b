"""Tasks in a run folder: answers go to its answers.jsonl as they come, rows to its rows.jsonl."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from lminf.attention.policy import head_policies
from lminf.errors import InputError
from lminf.evals import runner
from lminf.evals.needle import ANSWER_TOKENS, Needle
from lminf.evals.runner import Cell, Subject
from lminf.evals.task import Budget, Task
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from lminf.models import cost, decoder
from lminf.programs.segment_reading import SegmentReader
from lminf.run import folder
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

INSIDE, OUTSIDE = "inside what the policy sees", "outside its window"


def cells(tasks: Sequence[Task], lengths: Sequence[int], counts: Sequence[int]) -> list[Cell]:
    """Every task at every length, with the number of instances that goes with the length."""
    if tasks and len(counts) != len(lengths):
        raise InputError(
            f"{tasks[0].name}: numbers of prompts {counts} for lengths {lengths}; give one number "
            f"per length"
        )
    return [
        Cell(task, length, count)
        for length, count in zip(lengths, counts, strict=True)
        for task in tasks
    ]


def subject(c: ConfigDict, lm: LM, segments: SegmentReader | None = None) -> Subject:
    """The model under its policy, or as it reads in segments; rows tell what a query attends to,
    and whether needles stand in the policy's window.
    """
    attended = segments.attended_tokens(ANSWER_TOKENS) if segments else None

    def facts(length: int, needles: Sequence[Needle]) -> Mapping[str, Any]:
        window, tokens = (0, min(length, attended)) if attended else (lm.policy.window, length)
        return {
            "trained_length": lm.spec.trained_length,
            "key_in_window": all(needle.in_window(window) for needle in needles),
            "attended": attended or cost.attended_tokens(lm.policy),
            "cache_bytes": cost.cache_bytes(
                lm.spec, lm.decoder.policies, tokens=tokens, dtype=lm.dtype
            ),
        }

    name = segments.name if segments else lm.policy.name
    return Subject(segments or SharedPrefix(lm), {"model": c.model, "policy": name}, facts)


def bytes_after(lm: LM, tokens: int) -> dict[str, int]:
    """Bytes after a prompt of so many tokens with room for one more: of keys and values, and of
    a policy's state.
    """

    def after_prompt():
        caches = lm.init_caches(batch=1, capacity=tokens)
        return decoder.prepare_decoding(lm.spec, lm.decoder.policies, caches, length=tokens, room=1)

    sizes = {"cache_bytes": 0, "state_bytes": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(after_prompt)):
        is_kv = jax.tree_util.keystr(path[-1:]) in (".k", ".v", "['k']", "['v']")
        kind = "cache_bytes" if is_kv else "state_bytes"
        sizes[kind] += leaf.size * leaf.dtype.itemsize
    return sizes


def costs(lm: LM, length: int) -> dict[str, Any]:
    """Tokens that a query attends to after a text of this length, the mean over layers, and the
    bytes kept of it: keys, values, and what else the policy remembers.
    """
    seen = [
        part.capacity if part.needs_prompt else cost.attended_tokens(part)
        for part in head_policies(lm.policy)
    ]
    most = max(length if each is None else min(each, length) for each in seen)
    dense = getattr(lm.policy, "dense_layers", 0)  # of HiP: they attend to all
    return {
        "attended": most + round(dense / lm.spec.num_layers * (length - most)),
        "cache_bytes": sum(bytes_after(lm, length).values()),
    }


def last_only(lm: LM) -> bool:
    """Whether the policy selects for the last query of a call alone: the loss of a text that is
    read in chunks is then that of the policy without selection, to which it adds nothing.
    """
    return any(getattr(policy, "last_only", False) for policy in lm.decoder.policies)


def measure(
    c: ConfigDict,
    out: RunFolder,
    lm: LM,
    subjects: Sequence[Subject],
    cells: Sequence[Cell],
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> Iterator[Row]:
    """The rows that the folder lacks; lengths are in tokens of `lm`, as `encode` reads a prompt."""
    encode = encode or (lambda text: lm.encode(text)[0])
    answers = out / "answers.jsonl"
    with Progress(0, label="questions", unit="tokens") as progress:
        yield from runner.measure(
            subjects,
            cells,
            budget=lambda size: Budget(size, encode, f"tokens of {c.model}"),
            seed=c.seed,
            rows=out.rows(),
            answers=folder.read_lines(answers),
            record=partial(folder.append_line, answers),
            progress=progress.show,
        )
