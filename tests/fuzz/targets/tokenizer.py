"""Tokenizer files of a folder, of several kinds of model; the folder holds nothing else."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lminf import checkpoints
from lminf.checkpoints import files, hf_tokenizer
from lminf.data.tokenizers import SPACE, ByteTokenizer
from tests.checkpoints import making
from tests.fuzz import mutate as damage

TEXT = ["the cat sat on the mat, the rat sat on the cat " * 20]


def seeds(folder: Path) -> None:
    for name, tokenizer in (("bpe", making.tiny_tokenizer()), ("bytes", ByteTokenizer())):
        (folder / name).mkdir()
        hf_tokenizer.write(folder / name, tokenizer)
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"acehmnorst", f"{SPACE}t", "at"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", *pieces])}
    spaces = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    sentence_piece = tokenizers.Tokenizer(
        models.BPE(
            vocab, [(SPACE, "t"), ("a", "t")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    sentence_piece.normalizer = spaces
    sentence_piece.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    sentence_piece.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    scores = [(piece, -float(i)) for i, piece in enumerate(vocab)]
    unigram = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    words = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(r"\p{N}{1,3}|\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    words.normalizer = normalizers.NFC()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    )
    for name, backend in (
        ("sentence_piece", sentence_piece),
        ("unigram", unigram),
        ("words", words),
    ):
        (folder / name).mkdir()
        backend.save(str(folder / name / "tokenizer.json"))
        config = {
            "bos_token": {"content": "<s>"},
            "eos_token": "t",
            "add_bos_token": name != "words",
        }
        template = [{"name": "default", "template": making.CHAT}]
        files.write_json(folder / name / "tokenizer_config.json", config)
        files.write_json(folder / name / "generation_config.json", {"eos_token_id": [0, 2]})
        files.write_json(folder / name / "special_tokens_map.json", {"chat_template": template})


def read(path: Path) -> None:
    tokenizer = checkpoints.read_tokenizer(path)
    tokenizer.encode_with_bytes("The cat sat on the mat, 12 times.\n")
    assert tokenizer.eos_ids is not None
    assert tokenizer.digest
    tokenizer.decode(range(min(tokenizer.vocab_size, 300)))


def mutate(rng: random.Random, path: Path) -> None:
    """Parts that decide how a text is cut are damaged as often as the long vocabulary."""
    file = path / "tokenizer.json"
    if rng.random() < 0.4 or not file.exists():
        damage.mutate(rng, path)
        return
    parts = json.loads(file.read_bytes())
    key = rng.choice(list(parts))
    inner = parts[key]
    if key == "model" and rng.random() < 0.7:
        name = rng.choice(list(inner))
        inner[name] = damage.change_value(rng, inner[name])
    else:
        parts[key] = damage.change_value(rng, inner)
    file.write_bytes(damage.dumps(parts))
