"""Tokenizer from GGUF metadata, splitting text as the model's Hugging Face tokenizer does.

A GGUF file stores the vocabulary, the merges and the *name* of the way in which text is cut into
words before merging. Names that are not in `WORDS` are refused: a wrong cut gives plausible tokens
that the model was not trained on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lminf.data.tokenizers import SPACE, Tokenizer
from lminf.errors import InputError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

# Every key that is understood, or that cannot change how text is split or what the ids mean.
KEYS = frozenset(
    f"tokenizer.{key}"
    for key in (
        "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.scores",
        "ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id",
        "ggml.unknown_token_id", "ggml.padding_token_id", "ggml.separator_token_id",
        "ggml.seperator_token_id", "ggml.cls_token_id", "ggml.mask_token_id",
        "ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id",
        "ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id",
        "ggml.fim_pad_token_id", "ggml.fim_rep_token_id", "ggml.fim_sep_token_id",
        "ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_sep_token",
        "ggml.add_space_prefix", "ggml.remove_extra_whitespaces", "ggml.token_type_count",
        "chat_template", "chat_templates", "huggingface.json",
    )
)  # fmt: skip

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> Any:
    # The library's own regex is GPT-2's.
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return make


# name in the file -> (how text is cut into words, whether a word that is a token is not cut up)
WORDS: dict[str, tuple[Callable[[], Any], bool]] = {
    "gpt-2": (_gpt2, False),
    "phi-2": (_gpt2, False),
    "olmo": (_gpt2, False),
    "mpt": (_gpt2, False),
    # As transformers reads such files, and as this project's reference numbers were measured
    # (113,108 tokens in the default text). The repository's own tokenizer.json and llama.cpp cut
    # digits off first, which joins white space before a digit (112,955 tokens): that is _digits.
    "smollm": (_gpt2, False),
    "starcoder": (_digits, False),
    "refact": (_digits, False),
    "command-r": (_digits, False),
    "codeshell": (_digits, False),
    "llama-bpe": (_split(_LLAMA3), True),
    "llama3": (_split(_LLAMA3), True),
    "llama-v3": (_split(_LLAMA3), True),
    "qwen2": (_split(_QWEN2), False),
    "deepseek-r1-qwen": (_split(_QWEN2), False),
    "tekken": (_split(_TEKKEN), True),
}
NFC = frozenset({"qwen2", "deepseek-r1-qwen"})  # whose models were trained on composed characters
BOS_UNLESS_DENIED = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})  # by the format


def from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer of a GGUF file; `source` names the file in errors."""
    if unknown := sorted(k for k in metadata if k.startswith("tokenizer.") and k not in KEYS):
        raise InputError(
            f"{source} has {unknown[0]} = {str(metadata[unknown[0]])[:60]!r}, which is not "
            f"understood; use a file whose tokenizer has no such setting"
        )
    facts = _Facts(metadata, source)
    tokens, kinds = facts["tokens"], facts["token_type"]
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise InputError(
            f"{source} has {len(tokens)} tokens, {len(set(tokens))} of them distinct, and "
            f"{len(kinds)} token types; the vocabulary is damaged, fetch the file again"
        )
    model = facts["model"]
    if model == "gpt2":
        backend, bos = _byte_level(facts)
    elif model == "llama":
        backend, bos = _sentence_piece(facts), True
    else:
        raise InputError(
            f"{source} has a tokenizer of the kind {model!r}; the kinds gpt2 and llama are read"
        )
    marked = zip(tokens, kinds, strict=True)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in marked if kind == CONTROL]
    )
    vocab = backend.get_vocab()
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == USER_DEFINED and token in vocab  # Gemma's runs of spaces were respelled
        ]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: facts.get(f"{key}_token_id") for name, key in names.items()}
    ends = (facts.get(f"{key}_token_id") for key in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        special={f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        add_bos=ids["bos"] is not None and facts.get("add_bos_token", bos),
        end_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


class _Facts:
    """`tokenizer.ggml.*` by their last name; what must be there and is not is an InputError."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata, self.source = metadata, source

    def get(self, name: str, absent: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", absent)

    def __getitem__(self, name: str) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in self.metadata:
            raise InputError(f"{self.source} has no {key}; convert the model again")
        return self.metadata[key]


def _byte_level(facts: _Facts) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether the format puts BOS before texts where the file does not say."""
    name = facts["pre"]
    if name not in WORDS:
        raise InputError(
            f"{facts.source} cuts text into words in the way called {name!r}, which is not known; "
            f"known are {', '.join(WORDS)}"
        )
    make, whole_words = WORDS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["merges"]]
    vocab = {token: i for i, token in enumerate(facts["tokens"])}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise InputError(
                f"{facts.source} merges {' and '.join(map(repr, merge))}, which its vocabulary "
                f"does not have; the file is damaged, fetch it again"
            )
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    if name in NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = make()
    backend.decoder = decoders.ByteLevel()
    return backend, name in BOS_UNLESS_DENIED


def _sentence_piece(facts: _Facts) -> tokenizers.Tokenizer:
    """BPE as SentencePiece does it: spaces are a character, what is not a token is bytes.

    The file has scores instead of merges; a merge is any cut of a token into two others, the best
    token first.
    """
    tokens = facts["tokens"]
    rank = dict(zip(tokens, facts["scores"], strict=True))
    if facts.metadata.get("general.architecture") == "gemma2":
        # Gemma's tokens stand in the order of their merges and its scores do not; its runs of
        # spaces are stored as spaces.
        tokens = [SPACE * len(t) if t.strip(" ") == "" else t for t in tokens]
        rank = {token: -i for i, token in enumerate(tokens)}
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(vocab, rank)
    unknown = next(
        (t for t, k in zip(tokens, facts["token_type"], strict=True) if k == UNKNOWN), None
    )
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    unspaced = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if facts.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        unspaced.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(unspaced)
    return backend


def _merges(vocab: Mapping[str, int], rank: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best-ranked token first."""
    found = []
    for token in vocab:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(a, b) for a, b in cuts if a in vocab and b in vocab]
        found += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    found.sort(key=lambda cut: (rank[cut[0] + cut[1]], len(cut[0]), len(cut[1])), reverse=True)
    return found
