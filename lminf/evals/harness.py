"""lminf's models in EleutherAI's lm-evaluation-harness, under the name `lminf`.

    lminf harness run --tasks lambada_openai
        --model_args pretrained=smollm2-135m-instruct,policy=lm_infinite:window=4096,sinks=10

Its three kinds of requests are answered as by its model `hf`: special tokens that stand in a text
are parsed, a context that is empty is the BOS, and texts of `loglikelihood_rolling` are read in
windows of the trained length. But prompts are read whole, under every policy, unless max_length is
given. This module needs the extra `harness`.

Source: https://github.com/EleutherAI/lm-evaluation-harness, release 0.4.13.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api import model, registry  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from lminf.attention.parsing import parse_policy
from lminf.attention.policy import AnyPolicy
from lminf.config import closest
from lminf.errors import InputError
from lminf.lm import generate
from lminf.lm.generate import GREEDY, Sampling
from lminf.lm.lm import DTYPES, LM
from lminf.lm.prefix import BATCH_TOKENS, Pair, SharedPrefix
from lminf.lm.protocol import OnAnswer
from lminf.models import quantization

MODEL = "lminf"  # what the harness calls it
ARGUMENTS = ("pretrained", "policy", "dtype", "weights", "max_length", "batch_size")
NEW_TOKENS = 256  # of an answer, where a task does not say: the harness's own default
NO_EFFECT = {"num_beams": 1, "repetition_penalty": 1.0}  # options of tasks, at these values

log = logging.getLogger("lm_eval.lminf")  # below the harness's, which prints it


class GenerationOptions(NamedTuple):
    """How the answers of a task are generated."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


@registry.register_model(MODEL)
class HarnessLM(model.LM):
    """A model as the harness asks it, under one policy."""

    def __init__(
        self,
        pretrained: str,
        *,
        policy: str | None = None,
        dtype: str = "float32",
        weights: str = "float",
        max_length: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **fields: Any,
    ):
        """`fields` are those of the policy, which the harness takes for arguments because it
        splits them at commas. Of prompts longer than `max_length` (tokens) the last ones are read.
        `device` is the harness's word for one of torch's; JAX finds its own.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype}: {closest(str(dtype), DTYPES)}")
        if max_length is not None and (type(max_length) is not int or max_length < 2):
            raise InputError(f"max_length={max_length}: give a number of at least 2 tokens")
        if not re.fullmatch(r"auto|[1-9]\d*", str(batch_size)):
            raise InputError(f"--batch_size {batch_size}: give a number of prompts, or auto")
        rows = None if batch_size == "auto" else int(batch_size)
        self.lm = LM.from_pretrained(
            str(pretrained), policy=parsed(policy, fields), dtype=jnp.dtype(dtype), weights=weights
        )
        self.name, self.max_length = str(pretrained), max_length
        self.shared = SharedPrefix(self.lm, rows)

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests tells tokenizers from one another by."""
        return f"{self.name.replace('/', '__')}-{self.lm.tokenizer.digest[:12]}"

    def get_model_info(self) -> Mapping[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model_num_parameters": quantization.parameters(self.lm.params),
            "model_dtype": jnp.dtype(self.lm.dtype).name,
            "policy": self.lm.policy.name,
        }

    # --- Log-likelihoods --------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability (nats) of each continuation after its context, and whether every
        token of it is the most likely one. A context of several continuations is read once.
        """
        pairs = self._cut([self._pair(*request.args) for request in requests])
        groups: dict[bytes, list[int]] = {}
        for index, (tokens, start) in enumerate(pairs):
            groups.setdefault(tokens[:start].tobytes(), []).append(index)
        answers: list[Any] = [None] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood") as progress:
            for members in groups.values():
                scores = self.shared.score_tokens([pairs[index] for index in members])
                for index, score in zip(members, scores, strict=True):
                    answers[index] = score.log_prob, score.greedy
                    self.cache_hook.add_partial(
                        "loglikelihood", requests[index].args, answers[index]
                    )
                progress.update(len(members))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability (nats) of each text, in windows of max_length tokens, or else of
        the trained length, each of which has as much context as a window can.
        """
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self._encode(text).tolist(), prefix_token=self._prefix_token,
                max_seq_len=self.max_length or self.lm.context_length, context_len=1,
            )  # fmt: skip
            answers.append(
                sum(self._log_prob(*utils.make_disjoint_window(window)) for window in windows)
            )
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _log_prob(self, context: list[int], predicted: list[int]) -> float:
        nll = self.lm.token_nll([*context, *predicted])[-len(predicted) :]
        return -float(nll.sum(dtype=np.float64))

    def _pair(self, context: str, continuation: str) -> Pair:
        """Token ids of both and where the continuation begins."""
        if context:
            tokens, start = (
                self._encode(context + continuation),
                len(self._encode(context.rstrip())),
            )
        else:
            tokens, start = self._encode(continuation, bos=False), 1
            if tokens[:1].tolist() != [self._prefix_token]:
                tokens = np.insert(tokens, 0, self._prefix_token)
        if not 0 < start < len(tokens):
            raise InputError(
                f"the context {context[-40:]!r} and the continuation {continuation[:40]!r} are "
                f"{len(tokens)} tokens, of which the context has {start}; each needs at least one"
            )
        return tokens, start

    def _cut(self, pairs: list[Pair]) -> list[Pair]:
        """Of each text no more than max_length tokens are read: the last ones."""
        if self.max_length is None:
            return pairs
        most = self.max_length + 1  # the last token is predicted and not read
        if longest := max((len(ids) - start for ids, start in pairs if start - len(ids) + most < 1),
                          default=0):  # fmt: skip
            raise InputError(
                f"a continuation of {longest} tokens leaves no room for a context; give a "
                f"max_length of more than {longest}"
            )
        self._warn(sum(len(ids) > most for ids, _ in pairs))
        return [(ids[-most:], start - max(len(ids) - most, 0)) for ids, start in pairs]

    def _warn(self, cut: int) -> None:
        if cut:
            log.warning(
                "%d prompts are longer than max_length=%d: their ends are read", cut,
                self.max_length,
            )  # fmt: skip

    # --- Answers ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop text or end token."""
        ways = [generation_options(request.args[1]) for request in requests]
        prompts = [
            self._last(self._encode(request.args[0]), way.max_new_tokens)
            for request, way in zip(requests, ways, strict=True)
        ]
        self._warn(sum(cut for _, cut in prompts))
        groups: dict[Any, list[int]] = {}
        for index, (ids, _) in enumerate(prompts):  # those read side by side are filled up alike
            groups.setdefault((ways[index], -len(ids) // generate.STEP), []).append(index)
        answers = [""] * len(prompts)
        with tqdm(total=len(prompts), disable=disable_tqdm, desc="generate_until") as progress:
            for (way, _), members in sorted(groups.items(), key=lambda group: group[0][1]):

                def keep(place: int, text: str, members: list[int] = members) -> None:
                    index = members[place]
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update()

                self._write([prompts[index][0] for index in members], way, keep)
        return answers

    def _write(
        self, prompts: Sequence[Int[np.ndarray, " _"]], way: GenerationOptions, keep: OnAnswer
    ) -> None:
        """Answers to prompts of about one length, of which one that is drawn has the random stream
        of its place.
        """
        most, stop, sampling = way
        if sampling == GREEDY:
            self.shared.generate(prompts, max_new_tokens=most, stop=stop, on_answer=keep)
            return
        rows = self.shared.rows or max(1, BATCH_TOKENS // max(map(len, prompts)))
        for first in range(0, len(prompts), rows):
            texts = self.lm.generate(
                prompts[first : first + rows], max_new_tokens=most, stop=stop, sampling=sampling,
                seed=first,
            )  # fmt: skip
            for place, text in enumerate(texts, first):
                keep(place, text)

    def _last(self, ids: Int[np.ndarray, " T"], room: int) -> tuple[Int[np.ndarray, " _"], bool]:
        """What is read of a prompt, and whether that is not all of it."""
        if self.max_length is None or len(ids) + room <= self.max_length:
            return ids, False
        if room >= self.max_length:
            raise InputError(
                f"an answer of {room} tokens leaves no room for a prompt; give a max_length above "
                f"{room}, or --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        return ids[room - self.max_length :], True

    # --- Texts ------------------------------------------------------------------------------------

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template of the model, as the harness's results have it."""
        if chat_template not in (True, False):
            raise InputError(
                f"--apply_chat_template {chat_template}: a model has one template here, without a "
                f"name; leave the name out"
            )
        return self.lm.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a prompt for an answer, up to the end of the last
        message, which is then gone on with.
        """
        text = self.lm.tokenizer.chat(chat_history, reply=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last if last in text else last.strip()
        return text[: text.rindex(last) + len(last)]

    def _encode(self, text: str, *, bos: bool = True) -> Int[np.ndarray, " T"]:
        tokenizer = self.lm.tokenizer
        ids = tokenizer.encode(text, special="parse")
        # A chat template has written the BOS.
        if not (bos and tokenizer.add_bos) or (len(ids) and ids[0] == tokenizer.bos_id):
            return ids
        return np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])

    @property
    def _prefix_token(self) -> int:
        """What stands before a text without a context."""
        tokenizer = self.lm.tokenizer
        for token in (tokenizer.bos_id, *tokenizer.eos_ids):
            if token is not None:
                return token
        raise InputError(
            f"{self.name} declares neither BOS nor end of text, which stands before a text without "
            f"a context; ask tasks of which each has one"
        )


def parsed(policy: str | None, fields: Mapping[str, Any]) -> AnyPolicy | None:
    """The policy as somebody wrote it, before the harness took its fields for arguments."""
    if policy is None and not fields:
        return None
    values = ",".join(
        f"{name}={str(value).lower() if value is None or isinstance(value, bool) else value}"
        for name, value in fields.items()
    )
    policy = policy or "full"
    joint = ("," if ":" in policy else ":") if values else ""
    try:
        return parse_policy(f"{policy}{joint}{values}")
    except InputError as error:
        if not fields:
            raise
        raise InputError(
            f"{error}; of model_args, {', '.join(ARGUMENTS)} are no fields of the policy"
        ) from error


def generation_options(options: Mapping[str, Any]) -> GenerationOptions:
    """The generation options of a task; unsupported ones are refused."""
    known = dict(normalize_gen_kwargs(dict(options), NEW_TOKENS))
    until, most = known.pop("until"), known.pop("max_gen_toks")
    drawn = known.pop("do_sample")
    temperature = known.pop("temperature", 1.0) if drawn else 0.0
    known.pop("temperature", None)
    sampling = Sampling(temperature, known.pop("top_k", None), known.pop("top_p", None))
    for name, value in known.items():
        if NO_EFFECT.get(name) != value:
            raise InputError(
                f"the generation option {name}={value} has no counterpart here; there are until, "
                f"max_gen_toks, do_sample, temperature, top_k and top_p"
            )
    return GenerationOptions(most, tuple(until), sampling if temperature else GREEDY)
