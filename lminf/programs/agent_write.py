"""AgentWrite: a long text written paragraph by paragraph, after a plan of its own.

    plan     one call: a line for each paragraph, with its main point and its number of words
    write    a call for each paragraph: request + plan + what is written so far + this paragraph

A model that ends its answers early writes long texts so. Over a `Recorded` model every paragraph is
kept as it is written, and a run that was stopped goes on with the next one.
Source: Bai et al. 2024, LongWriter, arXiv:2408.07055; the sentences of the prompts are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lminf.errors import InputError
from lminf.lm.protocol import SequentialGenerator, TextGenerator, cut_at_stop

MOST_PARAGRAPHS = 50
PLAN_TOKENS = 4096
TOKENS_PER_WORD = 4  # of a paragraph's limit: twice its words, at two tokens a word
LINE = re.compile(r"Paragraph (\d+) - Main Point: (\S.*?) - Word Count: (\d+)(?: words)?")

PLAN = """\
Plan the text that this request asks for: divide it into paragraphs, and give each its main point
and the number of words that it will have. Write one line for each paragraph, in this form and with
nothing before or after:

Paragraph 1 - Main Point: what the paragraph says, in one sentence - Word Count: 400

Give every paragraph from 200 to 1000 words, and as many paragraphs as the whole text needs.

The request:
{request}

The plan:
"""
WRITE = """\
You are writing a long text by a plan, one paragraph after another.

The request:
{request}

The plan:
{plan}

What is written so far:
{written}

Go on with this paragraph alone. Repeat nothing, and write no title and no closing words unless the
paragraph itself is to have them:
{paragraph}

The paragraph:
"""


class Paragraph(NamedTuple):
    """One line of a plan."""

    main_point: str
    words: int


def parse_plan(text: str) -> list[Paragraph]:
    """The paragraphs of a plan. Lines that begin otherwise, as an introduction does, are skipped;
    a plan without paragraphs, with too many, or with a paragraph in another form is refused.
    """
    paragraphs = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith("Paragraph"):
            continue
        match = LINE.fullmatch(line)
        if match is None or int(match[1]) != len(paragraphs) + 1 or int(match[3]) < 1:
            raise InputError(
                f"the plan has the line {line[:120]!r} where 'Paragraph {len(paragraphs) + 1} - "
                f"Main Point: … - Word Count: …' belongs; ask another model, or plan anew"
            )
        paragraphs.append(Paragraph(match[2], int(match[3])))
    if not 1 <= len(paragraphs) <= MOST_PARAGRAPHS:
        raise InputError(
            f"the plan has {len(paragraphs) or 'no'} paragraphs, and 1 to {MOST_PARAGRAPHS} can be "
            f"written; ask for a shorter text, or another model: {text[:80]!r}"
        )
    return paragraphs


def plan_text(paragraphs: Sequence[Paragraph]) -> str:
    """The plan that parses as these paragraphs."""
    return "\n".join(
        f"Paragraph {number} - Main Point: {each.main_point} - Word Count: {each.words}"
        for number, each in enumerate(paragraphs, 1)
    )


@dataclass(frozen=True)
class AgentWrite(SequentialGenerator):
    """Answers each request by a plan and its paragraphs, as evaluations ask it to."""

    model: TextGenerator
    name: str = "agent_write"  # as rows call it

    def plan(self, request: str) -> list[Paragraph]:
        (reply,) = self.model.generate([PLAN.format(request=request)], max_new_tokens=PLAN_TOKENS)
        return parse_plan(reply)

    def write(self, request: str, *, max_new_tokens: int | None = None) -> str:
        """The paragraphs in the plan's order, with blank lines between them; `max_new_tokens` is
        of one paragraph, which may have twice the words of its plan in any case at most.
        """
        paragraphs = self.plan(request)
        lines, written = plan_text(paragraphs).split("\n"), []
        for line, paragraph in zip(lines, paragraphs, strict=True):
            prompt = WRITE.format(
                request=request, plan="\n".join(lines), written="\n\n".join(written), paragraph=line
            )
            most = TOKENS_PER_WORD * paragraph.words
            limit = most if max_new_tokens is None else min(most, max_new_tokens)
            (reply,) = self.model.generate([prompt], max_new_tokens=limit)
            if not reply.strip():
                raise InputError(
                    f"the model wrote nothing for {line[:80]!r}; ask another model, or for a "
                    f"shorter text"
                )
            written.append(reply.strip())
        return "\n\n".join(written)

    def generate_one(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        """The text that a request gets, cut at the first of the stop strings; a paragraph has at
        most `max_new_tokens`.
        """
        return cut_at_stop(self.write(prompt, max_new_tokens=max_new_tokens), stop)
