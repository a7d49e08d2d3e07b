"""LongICLBench's files: examples of every label, in rounds, and a text whose label is asked for.

Source: Li et al. 2024, arXiv:2404.02060. `path` holds the texts to label and `shots` the examples,
in one of the forms of its sets: text or sentence, and label or relation; relations name their
subject_entity and object_entity too. Accuracy; the release scores relations by F1 over all answers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lminf.errors import InputError
from lminf.evals.suites import published
from lminf.evals.suites.published import PublishedTask, Question, Record
from lminf.ranges import Range


@dataclass(frozen=True)
class LongICL(PublishedTask):
    """A set of LongICLBench: the label of a text, from examples of all labels."""

    too_long: Literal["middle", "refuse"] = "refuse"  # half an example says nothing
    shots: str = ""
    rounds: Annotated[int, Range(min=1, max=100)] = 1  # examples of each label
    order: Literal["rounds", "grouped"] = "rounds"  # grouped: those of a label together

    name = "long_icl"
    scope, diffusion = "high", "low"
    max_new_tokens = 24
    stop = ("\n",)

    def questions(self) -> list[Question]:
        if not self.shots:
            raise InputError("long_icl needs a file of examples; give it with shots=FILE")
        examples = self._chosen(self._labelled(self.shots))
        known = {label for _, label in examples}
        context = "".join(f"{text}\nLabel: {label}\n\n" for text, label in examples)
        return [
            Question("Give the label of the last text, one of those of the examples.\n\n", context,
                     f"{text}\nLabel:", label)
            for text, label in self._labelled(self.path) if label in known
        ]  # fmt: skip

    def _labelled(self, path: str) -> list[tuple[str, str]]:
        """Texts as they are shown, with their labels."""
        records = published.read_records(path, "LongICLBench", ())
        return [(_shown(record, path), str(_field(record, LABELS, path))) for record in records]

    def _chosen(self, examples: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The first examples of each label: a round has one of each, as far as there are any."""
        by_label: dict[str, list[tuple[str, str]]] = {}
        for example in examples:
            by_label.setdefault(example[1], []).append(example)
        chosen = [members[: self.rounds] for members in by_label.values()]
        if self.order == "grouped":
            return list(itertools.chain(*chosen))
        return [m[turn] for turn in range(self.rounds) for m in chosen if turn < len(m)]

    def parse(self, completion: str) -> str:
        return completion.strip().rstrip(".")

    def score(self, answer: str, instance: Any) -> float:
        return float(answer == instance.answer)


TEXTS, LABELS = ("text", "sentence"), ("label", "relation")


def _field(record: Record, names: Sequence[str], path: str) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise InputError(
        f"a record of {path} has neither {' nor '.join(map(repr, names))} (it has "
        f"{', '.join(map(repr, list(record)[:8]))}): it is not of a set of LongICLBench that is "
        f"read here"
    )


def _shown(record: Record, path: str) -> str:
    text = f"Text: {_field(record, TEXTS, path)}"
    if "subject_entity" in record and "object_entity" in record:
        text += f"\nSubject: {record['subject_entity']}; object: {record['object_entity']}"
    return text
