"""LM: a spec, parameters, a tokenizer and a policy, with the verbs that people use.

lm = lminf.LM.from_pretrained("smollm2-135m-instruct", policy=LMInfinite(window=4096, sinks=10))
lm = lminf.LM.from_pretrained("smollm2-135m-instruct", policy="lm_infinite:window=4096,sinks=10")
lm.nll(text).mean                  nats per token
lm.generate("Once upon a time")    text
lm.with_policy(Full())             the same weights, attended otherwise
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Float32, Int

from lminf.attention import cache, rope
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import FULL, AnyPolicy, LayerPolicy
from lminf.config import closest
from lminf.data.tokenizers import Special
from lminf.errors import InputError
from lminf.lm import continuations, generate, layerwise, speculative
from lminf.lm.generate import CONTEXT, GREEDY, Forward, Sampling, TextStream
from lminf.lm.nll import NLL, stream_nll
from lminf.lm.protocol import OnAnswer, Score, check_apart
from lminf.lm.speculative import Draft, Speculation
from lminf.models import cost, decoder, layer_policies, quantization
from lminf.models.spec import ModelSpec
from lminf.parallel import hardware
from lminf.surgery.quantize import quantize
from lminf.types import Params

Progress: TypeAlias = Callable[[int, int], None]  # (done, of), in tokens
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("float", "int8")  # what a model's matrices may be kept in; float is the LM's dtype


@dataclass(frozen=True, repr=False)
class LM:
    """A language model and how it attends. Values never change; `with_…` makes another."""

    spec: ModelSpec
    params: Params
    tokenizer: Any  # lminf.data.tokenizers.Tokenizer or ByteTokenizer
    policy: AnyPolicy = FULL
    dtype: Any = jnp.float32
    speculation: Speculation | None = None  # how a draft helps it to write; None: it has none
    # Its axis "context" shares out the tokens of each chunk that are read. None: one device.
    mesh: Mesh | None = None
    # What, mesh -> params and what was made of them, for every model made from this one.
    _placed: dict[tuple[str, Mesh | None], tuple[Params, Any]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self):
        layer_policies.check_trained(self.policy, self.context_length)
        layer_policies.check_rotary(self.policy, self.spec.encoding)
        layer_policies.check_sinks(self.policy, self.spec.sinks)
        self._by_layer()  # refuses a mix that does not fit the layers or heads

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        policy: AnyPolicy | str | None = None,
        dtype: Any = jnp.float32,
        weights: str = "float",
        progress: Progress | None = None,
    ) -> "LM":
        """A model that `lminf fetch` lists, a local folder, a .gguf file or a hub repository.

        Without a policy it attends as it was trained: as its lminf.json says, or else in full.
        `dtype` is that of weights, activations and caches; weights="int8" keeps matrices in int8.
        """
        from lminf import checkpoints

        if weights not in WEIGHTS:
            raise InputError(f"weights={weights}: {closest(weights, WEIGHTS)}")
        if policy is not None:
            policy = parse_policy(policy)  # before anything is fetched
        loaded = checkpoints.load(name, dtype=dtype, progress=progress)
        if loaded.tokenizer is None:
            raise InputError(
                f"{loaded.source} has no tokenizer; add its tokenizer.json, or read token ids "
                f"with lminf.checkpoints.load"
            )
        params = quantize(loaded.params) if weights == "int8" else loaded.params
        return cls(loaded.spec, params, loaded.tokenizer, policy or loaded.policy or FULL, dtype)

    def __repr__(self) -> str:
        """Three lines: the model, what it was trained on, how it attends."""
        spec, dtype = self.spec, jnp.dtype(self.dtype).name
        count = quantization.parameters(self.params)
        kept = f"int8 and {dtype}" if quantization.is_quantized(self.params) else dtype
        devices = 1 if self.mesh is None else self.mesh.size
        return (
            f"LM of {count:,} parameters in {kept}: {spec.num_layers} layers "
            f"of width {spec.width}, {spec.vocab_size:,} tokens\n"
            f"  trained at {spec.trained_length:,} tokens, positions {spec.encoding}\n"
            f"  policy {self.policy.name}, on {devices} device{'s' if devices > 1 else ''}"
        )

    @property
    def context_length(self) -> int:
        """Tokens apart that the model can place, as trained and scaled."""
        return self.spec.context_length

    @cached_property
    def decoder(self) -> decoder.Decoder:
        return decoder.Decoder(self.spec, self._by_layer(), dtype=self.dtype)

    def _by_layer(self) -> tuple[LayerPolicy, ...]:
        return layer_policies.by_layer(
            self.policy, windows=self.spec.windows, num_kv_heads=self.spec.num_kv_heads
        )

    def with_policy(self, policy: AnyPolicy | str) -> "LM":
        """The same weights, attended otherwise: a policy, or its text as on the command line."""
        return dataclasses.replace(self, policy=parse_policy(policy))

    def with_draft(self, draft: Draft, **settings: Any) -> "LM":
        """The same model, which writes what it would without the draft; `settings` are those of
        speculative.Speculation.
        """
        return dataclasses.replace(self, speculation=Speculation(draft, **settings))

    def with_devices(self, devices: Sequence[Any]) -> "LM":
        """The same model, reading on all of these: each holds every weight, and computes its share
        of a chunk's tokens. Writing stays on the first.
        """
        if len(devices) == 1:
            return dataclasses.replace(self, mesh=None)
        mesh = Mesh(np.array(devices), (CONTEXT,), axis_types=(AxisType.Auto,))
        return dataclasses.replace(self, mesh=mesh)

    def with_scaling(self, scaling: rope.Scaling) -> "LM":
        """The same weights with another rotary schedule."""
        if not isinstance(self.spec.encoding, rope.Rotary):
            raise InputError(
                f"this model's positions are {type(self.spec.encoding).__name__}, not rotary; "
                f"a rotary scaling does not apply"
            )
        encoding = dataclasses.replace(self.spec.encoding, scaling=scaling)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, encoding=encoding))

    @property
    def replicated_params(self) -> Params:
        """The parameters where texts are read."""
        return self._kept("replicated", lambda: layerwise.replicated(self.params, self.mesh))

    @cached_property
    def forward(self) -> Forward:
        """(tokens [B, T], positions [B, T], caches) -> final hidden states [B, T, D], and the
        caches with these tokens in them; those given are used up.
        """
        params = self.replicated_params
        if not self._layerwise:
            return partial(generate.forward, self.decoder, self.mesh, params)
        by_layer = self._kept("layers", lambda: layerwise.layer_params(self.spec, params))
        return layerwise.LayerwiseDecoder(self.decoder, params, by_layer)

    @cached_property
    def on_one_device(self) -> "LM":
        """The same model without the other devices, which only reading makes use of."""
        return self if self.mesh is None else dataclasses.replace(self, mesh=None)

    @cached_property
    def _layerwise(self) -> bool:
        """Whether the layers run one by one. Not on a mesh: there the devices of a CPU wait for one
        another in every layer, and so many programs at once leave them no thread to do it with.
        """
        if self.mesh is not None or jax.default_backend() not in layerwise.PLATFORMS:
            return False
        leaves = jax.tree.leaves(self.params)
        return all(isinstance(x, np.ndarray) or len(x.sharding.device_set) == 1 for x in leaves)

    def _kept(self, what: str, made: Callable[[], Any]) -> Any:
        """What was made of these parameters for this mesh, for every model that has both."""
        kept = self._placed.get((what, self.mesh))
        if kept is None or kept[0] is not self.params:
            kept = self._placed[what, self.mesh] = self.params, made()
        return kept[1]

    def init_caches(self, *, batch: int, capacity: int) -> tuple[cache.Cache, ...]:
        """Empty caches; `capacity` (tokens) is what policies that keep everything can hold.

        Refuses what the device has no memory for.
        """
        by_layer = self.decoder.policies
        needed = batch * cost.cache_bytes(self.spec, by_layer, tokens=capacity, dtype=self.dtype)
        available = hardware.memory_bytes(jax.local_devices()[0])
        if available is not None and needed > available:
            rows = "" if batch == 1 else f"{batch} texts of "
            raise InputError(
                f"under {self.policy.name} the caches of {rows}{capacity} tokens take "
                f"{needed / 1e9:.1f} GB, but this device has {available / 1e9:.1f} GB; read fewer "
                f"tokens or use a policy with a window, such as lm_infinite"
            )
        if self.mesh is not None:
            return generate.empty_on(self.mesh, self.spec, by_layer, batch, capacity, self.dtype)()
        period = self.spec.num_layers if self._layerwise else None
        return decoder.init_caches(
            self.spec, by_layer, batch=batch, capacity=capacity, dtype=self.dtype, period=period
        )

    def token_nll(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        prompt: int | None = None,
        progress: Progress | None = None,
    ) -> Float32[np.ndarray, " T-1"]:
        """-log p of tokens 1.. given all before them, nats. Reads in chunks through the cache.

        The first `prompt` tokens are a prompt to the policies that act at its end.
        """
        ids = np.asarray(tokens, np.int32)
        total = len(ids) - 1
        if total < 1:
            raise InputError(f"{len(ids)} tokens: nothing to predict; give at least 2")
        losses, done = [], 0
        for loss in self.stream_nll([ids], longest=len(ids), prompt=prompt):
            losses.append(loss)
            done += len(loss)
            if progress:
                progress(done, total)
        return np.concatenate(losses)

    def stream_nll(
        self,
        pieces: Iterable[Int[np.ndarray, " _"]],
        *,
        longest: int | None = None,
        prompt: int | None = None,
    ) -> Iterator[Float32[np.ndarray, " _"]]:
        """NLL of the tokens 1.. of a stream, nats, in order, some at a time; what was read is
        forgotten as the policy says. `longest` is the most tokens that may come: policies that
        keep everything need it, and a short one saves work. `prompt` is as for `token_nll`.
        """
        return stream_nll(self, pieces, longest=longest, prompt=prompt)

    def nll(
        self,
        text: str,
        *,
        length: int | None = None,
        prompt: int | None = None,
        special: Special = "plain",
        progress: Progress | None = None,
    ) -> NLL:
        """How well the first `length` tokens of a text (None: all) are predicted.

        Special tokens written out in the text are ordinary characters, unless special="parse".
        """
        ids, ends = self.encode(text, length=length, special=special)
        token_nll = self.token_nll(ids, prompt=prompt, progress=progress)
        return NLL(token_nll, np.diff(ends)[-len(token_nll) :])

    def logits(
        self, prompts: Sequence[str | np.ndarray], *, last: int = 1
    ) -> Float32[np.ndarray, "B last V"]:
        """Logits of what follows each of the `last` tokens of every prompt (text or token ids)."""
        return generate.next_logits(self, self.encode_prompts(prompts), last=last)

    def count_tokens(self, text: str) -> int:
        """The tokens that the text is read as, BOS included."""
        return len(self.encode(text)[0])

    def next(self, prompts: Sequence[str | np.ndarray]) -> Float32[np.ndarray, "B V"]:
        """Log-probabilities of the next token after each prompt, nats."""
        return np.asarray(jax.nn.log_softmax(self.logits(prompts)[:, 0], axis=-1))

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """The probability of each continuation after its prompt, divided as encode_continuation
        says.
        """
        pairs = zip(prompts, continuations, strict=True)
        return [self.score_tokens(*self.encode_continuation(*pair)) for pair in pairs]

    def score_tokens(self, tokens: Int[np.ndarray, " T"], start: int) -> Score:
        """The probability of the tokens from `start` on, after those before it."""
        (log_probs,) = continuations.log_probs(self, tokens[:start], [tokens[start:]])
        return Score.of(log_probs, tokens[start:])

    def encode_continuation(
        self, prompt: str, continuation: str
    ) -> tuple[Int[np.ndarray, " T"], int]:
        """Token ids of both, tokenised together, and where the continuation begins: where the
        prompt's own tokens end. Spaces at the end of a prompt belong to the continuation.
        """
        if not continuation:
            raise InputError("a continuation is empty; give at least one character")
        context = prompt.rstrip()
        tokens = self.encode(prompt + continuation)[0]
        prompt_tokens = (
            self.encode(context)[0] if context else tokens[: int(self.tokenizer.add_bos)]
        )
        if not len(prompt_tokens):
            raise InputError("a prompt has no tokens, so nothing follows it; give at least one")
        check_apart(prompt_tokens, tokens, prompt, continuation)
        return tokens, len(prompt_tokens)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        """One vector a text: the mean of the final hidden states of its tokens."""
        return generate.mean_hidden(self, self.encode_prompts(texts))

    def generate(
        self,
        prompt: str | np.ndarray | Sequence[str | np.ndarray],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
        special: Special = "plain",
        on_answer: OnAnswer | None = None,
    ) -> str | list[str]:
        """What the model writes after a prompt, or after each of several, without the prompt.

        A prompt is a text, or an array of the tokens to read as they are, BOS included. Special
        tokens written out in a text are ordinary characters, unless special="parse".
        """
        alone = isinstance(prompt, str | np.ndarray)
        prompts = [prompt] if isinstance(prompt, str | np.ndarray) else list(prompt)
        texts = [""] * len(prompts)
        for row, piece in self.stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, seed=seed,
            special=special,
        ):  # fmt: skip
            texts[row] += piece
        if on_answer:
            for index, text in enumerate(texts):
                on_answer(index, text)
        return texts[0] if alone else texts

    def stream(
        self,
        prompts: Sequence[str | np.ndarray],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
        special: Special = "plain",
    ) -> Iterator[tuple[int, str]]:
        """(row, text) as it is written. A row ends at an end token, a stop string or the limit."""
        encoded = self.encode_prompts(prompts, special=special)
        yield from self._write(encoded, max_new_tokens, sampling, stop, seed)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The assistant's answer, piece by piece. Messages have a `role` and a `content`, in which
        special tokens are ordinary characters.
        """
        # The template writes every special token, a BOS included.
        ids = self.tokenizer.encode_chat(messages)
        for _, piece in self._write([ids], max_new_tokens, sampling, stop, seed):
            yield piece

    def _write(self, prompts, max_new_tokens, sampling, stop, seed) -> Iterator[tuple[int, str]]:
        self.check_length(max((len(ids) for ids in prompts), default=0) + max_new_tokens)
        of, draft = generate.generate_tokens, self.speculation
        write = of if draft is None else partial(speculative.generate_tokens, speculation=draft)
        written = write(
            self, prompts, sampling=sampling, max_new_tokens=max_new_tokens,
            key=jax.random.key(seed),
        )  # fmt: skip
        yield from self.detokenize(written, rows=len(prompts), stop=stop)

    def detokenize(
        self, written: Iterable[Int[np.ndarray, " B"]], *, rows: int, stop: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        """(row, text) of tokens that come for all rows at once, until every row has ended."""
        texts = [TextStream(self.tokenizer, stop) for _ in range(rows)]
        for tokens in written:
            for row, token in enumerate(tokens):
                # Below 0: a row that waits for others.
                if token >= 0 and (piece := texts[row].feed(int(token))):
                    yield row, piece
            if all(text.done for text in texts):
                return
        for row, text in enumerate(texts):
            if piece := text.finish():
                yield row, piece

    def check_length(self, tokens: int) -> None:
        """Refuses more tokens than the policy can place within what the model was trained on."""
        self.check_positions(tokens - 1)  # the last one is written and not read
        most = layer_policies.max_length(self.policy, self.context_length)
        if most is not None and tokens > most:
            raise InputError(
                f"{self.policy.name} places at most {most} tokens within the "
                f"{self.context_length} this model was trained on, but prompt and answer take "
                f"{tokens}; shorten the prompt or raise its group or stretch"
            )

    def check_positions(self, tokens: int) -> None:
        """Refuses to read more tokens than have a learnt position."""
        encoding = self.spec.encoding
        if isinstance(encoding, rope.Learnt) and tokens > encoding.length:
            raise InputError(
                f"{tokens} tokens, but this model has learnt {encoding.length} positions and no "
                f"rule for others; read at most {encoding.length}, whatever the policy"
            )

    def encode_prompts(
        self, prompts: Sequence[str | np.ndarray], *, special: Special = "plain"
    ) -> list[Int[np.ndarray, " _"]]:
        """Token ids of each, as the model reads it; arrays are taken as they are."""
        return [
            self.encode(each, special=special)[0]
            if isinstance(each, str)
            else np.asarray(each, np.int32)
            for each in prompts
        ]

    def encode(
        self, text: str, *, length: int | None = None, special: Special = "plain"
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Token ids, with BOS where the model wants one, and the byte where each token ends."""
        if not text:
            raise InputError("the text is empty; give a text with at least two tokens")
        ids, ends = self.tokenizer.encode_with_bytes(text, special=special)
        if self.tokenizer.add_bos:
            ids = np.concatenate([[self.tokenizer.bos_id], ids]).astype(np.int32)
            ends = np.concatenate([[0], ends])
        if length is not None:
            if length < 1:
                raise InputError(f"length={length}: give at least 2 tokens")
            if len(ids) < length:
                raise InputError(
                    f"the text has {len(ids)} tokens but length={length} was asked for; "
                    f"give a longer text or a smaller length"
                )
            ids, ends = ids[:length], ends[:length]
        return ids, ends
