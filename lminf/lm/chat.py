"""A language model whose prompts are messages of a user, in the chat template of the model.

A prompt of a benchmark ends with what its answer begins with, such as `Answer:` or `The pass key
is`. That becomes the beginning of the assistant's reply, as RULER's release has it: a model that is
asked with it in the message repeats it first, or answers something else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Unpack

import numpy as np
from jaxtyping import Float32, Int

from lminf.data.tokenizers import MESSAGE
from lminf.lm.prefix import SharedPrefix
from lminf.lm.protocol import GenerateOptions, Score, check_apart

ENDS = re.compile(r"\n|[.?] ")  # what a beginning of an answer may follow


def split_lead(prompt: str) -> tuple[str, str]:
    """The message and the beginning of the reply: what follows the last line or sentence, unless it
    is a sentence itself.
    """
    start = max((match.end() for match in ENDS.finditer(prompt)), default=0)
    lead = prompt[start:]
    if not start or not lead or lead[-1] in ".?!" or lead[-1].isspace():
        return prompt, ""
    return prompt[:start].rstrip(), lead


@dataclass(frozen=True)
class ChatModel:
    """A LanguageModel whose answers are those of the assistant to each prompt.

    Special tokens are written by the template alone. A model without one is refused.
    """

    model: SharedPrefix

    def __post_init__(self):
        _ = self._frame  # refuses here

    @cached_property
    def _frame(self) -> list[str]:
        return self.model.lm.tokenizer.chat_frame()

    def encode(self, prompt: str, answer: str = "") -> Int[np.ndarray, " T"]:
        """Token ids of the conversation up to where the assistant goes on, after this answer."""
        message, lead = split_lead(prompt)
        *head, last = (piece.replace(MESSAGE, message) for piece in self._frame)
        reply = lead + answer if lead else answer.lstrip(" ")
        return self.model.lm.tokenizer.encode_pieces([*head, last + reply])

    def count_tokens(self, text: str) -> int:
        return len(self.encode(text))

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """Of each continuation as what the assistant goes on with."""
        encoded = {prompt: self.encode(prompt) for prompt in prompts}
        pairs = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            tokens = self.encode(prompt, continuation)
            check_apart(encoded[prompt], tokens, prompt, continuation)
            pairs.append((tokens, len(encoded[prompt])))
        return self.model.score_pairs(pairs)

    def next(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B V"]:
        return self.model.next([self.encode(prompt) for prompt in prompts])

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        return self.model.embed(texts)

    def generate(self, prompts: Sequence[str], **options: Unpack[GenerateOptions]) -> list[str]:
        return self.model.generate([self.encode(prompt) for prompt in prompts], **options)
