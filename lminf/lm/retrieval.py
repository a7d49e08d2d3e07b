"""What the draft of RAPID reads of a long prompt: the chunks that were retrieved for its end.

Source: Chen et al. 2025, RAPID, arXiv:2502.20330, whose chunks of 512 tokens are retrieved by the
similarity of embeddings, above a threshold; here BM25 ranks them, which asks no other model.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.errors import InputError
from lminf.lm import bm25
from lminf.ranges import Range


@dataclass(frozen=True)
class Retrieval:
    """What is read of a long prompt: its end, and the chunks before it that fit the end best."""

    tokens: Annotated[int, Range(min=2, max=2**30)]  # that are read, at most
    chunk: Annotated[int, Range(min=1, max=2**20)] = 64  # tokens
    question: Annotated[int, Range(min=1, max=2**20)] = 32  # tokens at the end, always read

    def __post_init__(self):
        ranges.check(self)
        if self.chunk + self.question > self.tokens:
            raise InputError(
                f"a chunk of {self.chunk} tokens and a question of {self.question} take more than "
                f"the {self.tokens} that are read; give smaller ones, or read more"
            )

    def of(self, tokenizer: Any, prompt: Int[np.ndarray, " P"]) -> Int[np.ndarray, " R"]:
        """What is read of this prompt, in its order; all of it, where that fits."""
        if len(prompt) <= self.tokens:
            return prompt
        begins = int(tokenizer.add_bos and prompt[0] == tokenizer.bos_id)
        question = prompt[len(prompt) - self.question :]
        starts = range(begins, len(prompt) - self.question, self.chunk)
        chunks = [prompt[start : start + self.chunk] for start in starts]
        chunks[-1] = chunks[-1][: len(prompt) - self.question - starts[-1]]
        scores = bm25.scores(
            [tokenizer.decode(each) for each in chunks], tokenizer.decode(question)
        )
        count = (self.tokens - self.question - begins) // self.chunk
        best = np.sort(np.argsort(-scores, kind="stable")[:count])
        return np.concatenate([prompt[:begins], *(chunks[index] for index in best), question])
