"""Tokenizer from GGUF metadata, splitting text as the model's Hugging Face tokenizer does.

A GGUF file stores the vocabulary, the merges and the *name* of the way in which text is cut into
words before merging. Names that are not in `WORDS` are refused: a wrong cut gives plausible tokens
that the model was not trained on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lminf.checkpoints.config_fields import Fields, Meaningless, TokenId
from lminf.data.tokenizers import SPACE, Tokenizer
from lminf.errors import InputError
from lminf.ranges import shown

_PREFIX = "tokenizer."

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")  # used
SHAPE: dict[str, Any] = {  # of what stands after `tokenizer.`
    "ggml.model": str,
    "ggml.pre": str,
    "ggml.tokens": list[str],
    "ggml.token_type": list[int],
    "ggml.merges": list[str],
    "ggml.scores": list[float],
    "ggml.add_bos_token": bool,
    "ggml.add_space_prefix": bool,
    "chat_template": str,
    **{f"ggml.{name}_token_id": TokenId for name in _IDS},
}
# What cannot change how text is split or what the ids mean.
MEANINGLESS: Meaningless = dict.fromkeys(
    (
        "ggml.separator_token_id", "ggml.seperator_token_id", "ggml.cls_token_id",
        "ggml.mask_token_id", "ggml.prefix_token_id", "ggml.suffix_token_id",
        "ggml.middle_token_id", "ggml.fim_pre_token_id", "ggml.fim_suf_token_id",
        "ggml.fim_mid_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id",
        "ggml.fim_sep_token_id", "ggml.add_eos_token", "ggml.add_sep_token",
        "ggml.remove_extra_whitespaces", "ggml.token_type_count", "chat_templates",
        "huggingface.json",
    )
)  # fmt: skip
# Templates for other uses beside the default one, `chat_template.tool_use` for example.
NAMED_TEMPLATE = "chat_template."

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (  # of GPT-4o: as tekken's, with contractions after a word and digits in threes
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    "gpt-4o": (_split(_O200K), False),  # GPT-OSS and Phi-4-mini
    "dbrx": (_split(_LLAMA3), False),  # OLMo 2
    "smaug-bpe": (_split(_LLAMA3), False),  # SmolLM3
    "chatglm-bpe": (_split(_LLAMA3), False),
    "glm4": (_split(_LLAMA3), False),
    "stablelm2": (_split(_QWEN2), False),
    "bloom": (_split(_BLOOM), False),
}
NFC = frozenset({"qwen2", "deepseek-r1-qwen"})  # whose models were trained on composed characters
BOS_UNLESS_DENIED = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})  # by the format


def from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer of a GGUF file; `source` names the file in errors."""
    settings = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
    facts = Fields(
        {k: v for k, v in settings.items() if not k.startswith(NAMED_TEMPLATE)},
        source,
        SHAPE,
        MEANINGLESS,
        _PREFIX,
    )
    tokens, kinds = facts["ggml.tokens"], list(facts["ggml.token_type"])
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise InputError(
            f"{source} has {len(tokens)} tokens, {len(set(tokens))} of them distinct, and "
            f"{len(kinds)} token types; the vocabulary is damaged, fetch the file again"
        )
    model = facts["ggml.model"]
    if model == "gpt2":
        backend, bos = _byte_level(facts)
    elif model == "llama":
        gemma = metadata.get("general.architecture") in ("gemma", "gemma2", "gemma3")
        backend, bos = _sentence_piece(facts, kinds, gemma=gemma), True
    else:
        raise InputError(
            f"{source} has a tokenizer of the kind {shown(model)}; the kinds gpt2 and llama are "
            f"read"
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
    # As llama.cpp does, an id that no token has (-1, say) is as good as none.
    ids = {name: facts.get(f"ggml.{name}_token_id", -1) for name in _IDS}
    ids = {name: i for name, i in ids.items() if 0 <= i < len(tokens)}
    add_bos = facts.get("ggml.add_bos_token", bos)
    if add_bos and "bos" not in ids and (stated := facts.get("ggml.bos_token_id")) is not None:
        raise InputError(
            f"{source} puts the token {stated} before texts, which its {len(tokens)} tokens do not "
            f"have; fetch the file again"
        )
    template = facts.get("chat_template")
    for name in ("ggml.merges", "ggml.scores", "ggml.pre", "ggml.add_space_prefix"):
        facts.ignored(name)  # of the other of the two models
    facts.refuse_others()
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return Tokenizer(
        backend,
        special={f"{k}_token": tokens[ids[name]] for k, name in special.items() if name in ids},
        add_bos=add_bos and "bos" in ids,
        end_ids=tuple(dict.fromkeys(ids[k] for k in ("eos", "eot", "eom") if k in ids)),
        chat_template=template,
    )


def _byte_level(facts: Fields) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether the format puts BOS before texts where the file does not say."""
    name = facts["ggml.pre"]
    if name not in WORDS:
        raise InputError(
            f"{facts.source} cuts text into words in the way called {shown(name)}, which is not "
            f"known; known are {', '.join(WORDS)}"
        )
    make, whole_words = WORDS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["ggml.merges"]]
    vocab = {token: i for i, token in enumerate(facts["ggml.tokens"])}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise InputError(
                f"{facts.source} merges {' and '.join(map(shown, merge))}, which its vocabulary "
                f"does not have; the file is damaged, fetch it again"
            )
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    if name in NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = make()
    backend.decoder = decoders.ByteLevel()
    return backend, name in BOS_UNLESS_DENIED


def _sentence_piece(facts: Fields, kinds: list[int], *, gemma: bool) -> tokenizers.Tokenizer:
    """BPE as SentencePiece does it: spaces are a character, what is not a token is bytes.

    The file has scores instead of merges; a merge is any cut of a token into two others, the best
    token first.
    """
    tokens = facts["ggml.tokens"]
    scores = list(facts["ggml.scores"])
    if len(scores) != len(tokens):
        raise InputError(
            f"{facts.source} has {len(tokens)} tokens but {len(scores)} scores; the vocabulary is "
            f"damaged, fetch the file again"
        )
    rank = dict(zip(tokens, scores, strict=True))
    if gemma:
        # Gemma's tokens stand in the order of their merges and its scores do not; its runs of
        # spaces are stored as spaces.
        tokens = [SPACE * len(t) if t.strip(" ") == "" else t for t in tokens]
        rank = {token: -i for i, token in enumerate(tokens)}
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(vocab, rank)
    unknown = next((t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    unspaced = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if facts.get("ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        unspaced.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(unspaced)
    return backend


def _merges(vocab: Mapping[str, int], rank: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best-ranked token first."""
    merges = []
    lengths = {len(token) for token in vocab}
    for token in vocab:
        # A token may be as long as the file: only cuts into lengths that there are.
        places = (i for i in sorted(lengths) if len(token) - i in lengths)
        cuts = ((token[:i], token[i:]) for i in places)
        cuts = [(a, b) for a, b in cuts if a in vocab and b in vocab]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    merges.sort(key=lambda cut: (rank[cut[0] + cut[1]], len(cut[0]), len(cut[1])), reverse=True)
    return merges
