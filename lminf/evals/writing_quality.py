"""S_q of LongWriter: how good a long text is, as a language model judges it.

A judge rates six sides of a text from 1 to 5; a rating s is the share (s - 1) / 4, and the score is
their mean, which the paper gives in percent. `overall` is the paper's mean of it and the score of
the length. Source: Bai et al. 2024, arXiv:2408.07055; the sentences of the prompt are ours.
"""

import json
from collections.abc import Mapping

from lminf.errors import InputError
from lminf.lm.protocol import TextGenerator

SIDES = (
    "Relevance", "Accuracy", "Coherence", "Clarity", "Breadth and Depth", "Reading Experience",
)  # fmt: skip
REPLY_TOKENS = 1024
JUDGE = """\
Judge a text that was written for a request. Rate each of these sides with a whole number from 1
(bad) to 5 (excellent):

Relevance: the text is about what is asked, all of it and nothing else
Accuracy: what it states is true and agrees with the request
Coherence: it is in order, and one part leads to the next
Clarity: it is said plainly and can be understood
Breadth and Depth: it covers the subject, and goes into it
Reading Experience: it is pleasant to read and holds the reader

The length of the text is judged elsewhere: let it count for nothing.

The request:
{request}

The text:
{text}

Reply with nothing but a JSON object, such as {example}
"""


def judge_prompt(request: str, text: str) -> str:
    example = json.dumps(dict.fromkeys(SIDES, 3))
    return JUDGE.format(request=request, text=text, example=example)


def parse_ratings(reply: str) -> dict[str, int]:
    """The six ratings in a judge's reply: those of its first JSON object. A reply without one, or
    whose ratings are not the six, from 1 to 5, is refused.
    """
    start = reply.find("{")
    try:
        ratings, _ = json.JSONDecoder().raw_decode(reply[max(start, 0) :])
    except (ValueError, RecursionError) as error:
        raise _refused("holds no JSON object", reply) from error
    if not isinstance(ratings, dict):
        raise _refused("holds no JSON object", reply)
    for side in SIDES:
        if side not in ratings:
            raise _refused(f"has no rating of {side!r}", reply)
        if type(ratings[side]) is not int or not 1 <= ratings[side] <= 5:
            raise _refused(f"rates {side!r} as {ratings[side]!r}, not 1 to 5", reply)
    return {side: ratings[side] for side in SIDES}


def _refused(problem: str, reply: str) -> InputError:
    return InputError(
        f"the judge's reply {problem}; ask a model that follows the form: {reply[:120]!r}"
    )


def quality_score(ratings: Mapping[str, int]) -> float:
    """S_q as a share: 0 where every rating is 1, 1 where every rating is 5."""
    return sum((ratings[side] - 1) / 4 for side in SIDES) / len(SIDES)


def quality(judge: TextGenerator, request: str, text: str) -> float:
    """S_q of a text, as a share. An empty text is judged too."""
    (reply,) = judge.generate([judge_prompt(request, text)], max_new_tokens=REPLY_TOKENS)
    return quality_score(parse_ratings(reply))


def overall(length_score: float, quality_score: float) -> float:
    """The mean of S_l (lminf.evals.metrics.length_score) and S_q, as a share."""
    return (length_score + quality_score) / 2
