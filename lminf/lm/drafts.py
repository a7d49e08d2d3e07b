"""Drafts for speculative decoding: other models, parts of a model, what a text or a corpus repeats.

prompt_lookup:ngram=3                    what followed the last tokens earlier in the text
ngram:FOLDER                             what followed them in the corpus of an index
layers:8                                 the model's own first layers, and its head
policy:lm_infinite:window=1024,sinks=4   the model itself, seeing less of the text
retrieved:tokens=512                     the model itself, reading what was retrieved of the prompt
NAME_OR_FOLDER                           another model with the same tokenizer
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.attention import cache
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import PerLayer
from lminf.attention.sparse import SparsePolicy
from lminf.config import closest, parse_choice
from lminf.errors import InputError
from lminf.lm import generate
from lminf.lm.generate import GREEDY, Sampling
from lminf.lm.lm import LM
from lminf.lm.ngram_draft import ngram_draft
from lminf.lm.retrieval import Retrieval
from lminf.lm.speculative import Draft, Drafter, Proposal, Texts, read_prompts
from lminf.models import heads
from lminf.ranges import Range

KINDS = ("prompt_lookup", "retrieved", "ngram", "policy", "layers")  # beside models


def parse_draft(text: str, *, model: str, load: Callable[[str], LM]) -> Callable[[LM], Draft]:
    """The function of a model to the draft for it that a text describes. Whatever is wrong with the
    text is refused here; another model is loaded, by `load`, when the function is called. `model`
    is the name of the target model in errors.
    """
    kind, _, rest = text.partition(":")
    if kind == "prompt_lookup":
        lookup = parse_choice(text, {kind: PromptLookup}, what="draft")
        return lambda lm: lookup
    if kind == "retrieved":
        retrieval = parse_choice(text, {kind: Retrieval}, what="draft")
        return lambda lm: RetrievedDraft(lm, retrieval)
    if kind == "ngram":
        return ngram_draft(rest, model=model)
    if kind == "policy":
        policy = parse_policy(rest)
        return lambda lm: ModelDraft(lm.with_policy(policy))
    if kind == "layers":
        if not rest.isdecimal():
            raise InputError(f"the draft {text!r} has no number of layers; write layers:8")
        return lambda lm: ModelDraft(first_layers(lm, int(rest)))
    if rest and not Path(text).exists():  # a model's name has no colon
        raise InputError(f"there is no draft called {kind!r}; {closest(kind, KINDS)}")

    def loaded(lm: LM) -> Draft:
        draft = load(text)
        if draft.tokenizer.digest != lm.tokenizer.digest:
            raise InputError(
                f"the draft {text} has another tokenizer than {model}, so its tokens mean "
                f"something else; give a model of one family with it, or prompt_lookup"
            )
        return ModelDraft(draft)

    return loaded


# --- What a text repeats --------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptLookup:
    """Prompt lookup: the continuation of the latest earlier occurrence of the text's last tokens,
    by the longest n-gram that occurs earlier. A repetition is taken to continue.
    """

    ngram: Annotated[int, Range(min=1, max=1024)] = 3  # tokens, at most

    def __post_init__(self):
        ranges.check(self)

    def start(self, lm: Any, prompts: Texts, **settings: Any) -> "PromptLookup":
        del lm, prompts, settings
        return self

    def propose(self, texts: Texts, k: int, *, key: jax.Array) -> Proposal:
        del key
        return Proposal(np.stack([self._continued(text, k) for text in texts]))

    def _continued(self, text: Int[np.ndarray, " _"], k: int) -> Int[np.ndarray, " k"]:
        starts, start = np.arange(1, len(text)), None  # of what follows an n-gram
        for size in range(1, self.ngram + 1):
            starts = starts[starts >= size]
            starts = starts[text[starts - size] == text[-size]]
            if not len(starts):
                break
            start = starts[-1]
        return np.full(k, -1) if start is None else np.resize(text[start:], k)


# --- Models ---------------------------------------------------------------------------------------


def first_layers(lm: LM, count: int) -> LM:
    """The model's first layers, followed by its last norm and its head."""
    spec, params = lm.spec, dict(lm.params)
    if not 1 <= count < spec.num_layers:
        raise InputError(
            f"layers:{count}: the model has {spec.num_layers} layers; give 1 to "
            f"{spec.num_layers - 1} of them"
        )
    moe, dense = spec.moe, spec.moe.dense_layers if spec.moe is not None else 0
    if dense >= count:  # there are only layers of the first kind
        params["layers"], moe, dense = params.pop("first_layers"), None, 0
    params["layers"] = jax.tree.map(lambda x: x[: count - dense], params["layers"])
    spec = dataclasses.replace(
        spec, num_layers=count, windows=spec.windows[:count], moe=moe,
        layer_encodings=spec.layer_encodings[:count],
    )  # fmt: skip
    policy = lm.policy
    if isinstance(policy, PerLayer):
        policy = PerLayer(lm.decoder.policies[:count])
    return LM(spec, params, lm.tokenizer, policy, lm.dtype)


@dataclass(frozen=True)
class ModelDraft:
    """A language model, which reads all that was written, and as its prompts those of the model
    that it drafts for or `prompts`: a shorter context, such as what was retrieved from theirs.
    """

    lm: LM
    prompts: Texts | None = None

    def start(
        self, lm: Any, prompts: Texts, *, num_draft_tokens: int, max_new_tokens: int,
        sampling: Sampling,
    ) -> "_ModelDrafter":  # fmt: skip
        for policy in self.lm.decoder.policies:
            if policy.evict_every is not None:
                raise InputError(
                    f"the draft's {policy.name} evicts tokens that would be needed again where the "
                    f"model rejects what it proposes; give the draft another policy, such as "
                    f"lm_infinite or infllm"
                )
        draft_prompts = prompts if self.prompts is None else self.prompts
        self.lm.check_length(max(map(len, draft_prompts)) + max_new_tokens)
        read = read_prompts(
            self.lm, draft_prompts, room=max_new_tokens, spare=num_draft_tokens, sampling=GREEDY,
            key=jax.random.key(0),
        )  # fmt: skip
        theirs, ours = (
            np.array([len(text) for text in texts], np.int32) for texts in (prompts, draft_prompts)
        )
        return _ModelDrafter(
            self.lm, lm.spec.vocab_size, sampling, read.rewindable, theirs - ours, ours,
            num_draft_tokens + 1,
        )  # fmt: skip


@dataclass(frozen=True)
class RetrievedDraft:
    """A language model that reads what is retrieved of each prompt, and all that is written."""

    lm: LM
    retrieval: Retrieval

    def start(
        self, lm: Any, prompts: Texts, *, num_draft_tokens: int, max_new_tokens: int,
        sampling: Sampling,
    ) -> Drafter:  # fmt: skip
        shorter = [self.retrieval.of(self.lm.tokenizer, prompt) for prompt in prompts]
        return ModelDraft(self.lm, shorter).start(
            lm, prompts, num_draft_tokens=num_draft_tokens, max_new_tokens=max_new_tokens,
            sampling=sampling,
        )  # fmt: skip


@dataclass
class _ModelDrafter:
    """A model's caches of rows that each go on, and back, at their own pace."""

    lm: LM
    vocab_size: int  # of the model that it drafts for
    sampling: Sampling
    caches: generate.Caches
    replaced: Int[np.ndarray, " B"]  # tokens by which its prompts are shorter
    read: Int[np.ndarray, " B"]  # tokens of each row
    width: int  # tokens that a row has grown by, at most

    def propose(self, texts: Texts, k: int, *, key: jax.Array) -> Proposal:
        lm, rows = self.lm, zip(texts, self.replaced, strict=True)
        lengths = np.array([len(text) - replaced for text, replaced in rows], np.int32)
        positions = self.read[:, None] + np.arange(self.width, dtype=np.int32)[None]
        positions = np.where(positions < lengths[:, None], positions, -1)
        places = np.maximum(positions + self.replaced[:, None], 0)
        tokens = np.stack([text[place] for text, place in zip(texts, places, strict=True)])
        caches = tuple(cache.rewound(layer, self.read) for layer in self.caches)
        hidden, caches = _forward(lm, tokens, positions, caches)
        self.read = lengths
        # Policies that select remember more than slots hold, which what is proposed would change.
        states = [
            jax.tree.map(jnp.copy, layer.state) if isinstance(policy, SparsePolicy) else None
            for policy, layer in zip(lm.decoder.policies, caches, strict=False)
        ]
        drawn = []
        for step in range(k):
            if step:
                tokens, positions = drawn[-1][0][:, None], (lengths + step - 1)[:, None]
                hidden, caches = _forward(lm, tokens, positions, caches)
            drawn.append(
                _drawn(lm.spec, self.vocab_size, lm.params, hidden, positions, self.sampling,
                       jax.random.fold_in(key, step))
            )  # fmt: skip
        self.caches = tuple(
            layer if state is None else dataclasses.replace(layer, state=state)
            for layer, state in zip(caches, states, strict=True)
        )
        tokens = np.stack([np.asarray(token) for token, _ in drawn], 1)
        return Proposal(tokens, jnp.stack([probs for _, probs in drawn], 1))


def _forward(lm, tokens, positions, caches):
    return lm.on_one_device.forward(jnp.asarray(tokens), jnp.asarray(positions), caches)


@partial(jax.jit, static_argnums=(0, 1))
def _drawn(spec, vocab_size, params, hidden, positions, sampling, key):
    """The next token of each row [B], and the distribution [B, V] that it is drawn from."""
    last = hidden[jnp.arange(len(hidden), dtype=jnp.int32), positions.argmax(1)]
    logits = heads.lm(spec, params, last)  # of more or fewer rows, where a table is padded
    missing = max(vocab_size - logits.shape[1], 0)
    logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)[:, :vocab_size]
    token = generate.sample(logits, sampling, key=key)
    return token, generate.distribution(logits, sampling)
