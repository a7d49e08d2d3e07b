"""NLL along one endless stream of documents, the cache carried from chunk to chunk.

Source of the protocol: Han et al. 2024, arXiv:2308.16137 (the 200-million-token run).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int

from lminf.evals import perplexity
from lminf.lm.lm import LM


def token_nll(
    lm: LM, documents: Sequence[Int[np.ndarray, " _"]], *, chunk: int, seed: int
) -> tuple[Int[np.ndarray, " M"], Float32[np.ndarray, " M"]]:
    """Places in the stream of the scored tokens, and their NLL in nats.

    Documents come without BOS, in random order; a model that wants one gets it at the start. A
    chunk's first token is read and not scored: the protocol's losses are within chunks.
    """
    bos = lm.tokenizer.bos_id if lm.tokenizer.add_bos else None
    total = sum(len(document) for document in documents) + (bos is not None)
    chunks = perplexity.stream(documents, chunk=chunk, seed=seed, bos=bos)
    nll = np.concatenate(list(lm.stream_nll(chunks, longest=total)))
    places = np.arange(1, total)
    scored = places % chunk != 0
    return places[scored], nll[scored]
