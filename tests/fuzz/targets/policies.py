"""Policies and rotary scalings as text, drawn and damaged; a share of those taken reads a text."""

import dataclasses
import functools
import random
import zlib
from pathlib import Path

import jax
import numpy as np

from lminf.attention import rope
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import POLICIES
from lminf.config import parse_choice
from lminf.data.tokenizers import ByteTokenizer
from lminf.lm.lm import LM
from tests.fuzz import mutate as damage
from tests.models import specs

TEXTS = (
    "full", "window:window=5", "lambda:window=5,sinks=3", "lm_infinite:window=5,sinks=3,distance=7",
    "streaming:window=5,sinks=3", "rerope:window=5,log_from=9", "leaky_rerope:window=5,stretch=3",
    "self_extend:window=5,group=3", "topk:window=5,sinks=2,topk=3,from_layer=0",
    "infllm:window=4,sinks=2,topk=1,block=2,repr_topk=1,exec_block=4",
    "longheads:attended=12,chunk=4", "hip:topk=4,window=3,sinks=1,query_block=4,dense_layers=0",
    "infinite_hip:chunk=(4,2),topk=(8,4),refresh=(2,1),window=3,sinks=1,query_block=4",
    "h2o:capacity=9,turn=2", "tova:capacity=9,turn=2", "sirllm:capacity=9,turn=2,decay=0.5",
    "snapkv:capacity=6,window=2,pooling=3", "think:ratio=0.5,recent=2,capacity=6,pooling=1",
    "per_layer:policies=(full,(lm_infinite:window=5,sinks=3))",
    "per_layer:policies=((per_head:policies=((window:window=4),(streaming:window=3,sinks=1))))",
)  # fmt: skip
SCALINGS = (
    "unscaled", "linear:factor=2", "ntk:alpha=3", "dynamic_ntk:alpha=2,trained_length=16",
    "yarn:factor=4,trained_length=16,attention_factor=1.5,truncate=false",
    "llama3:factor=8,low_freq_factor=1,high_freq_factor=4,trained_length=16",
    "longrope:short_factor=(1,1,1,1),long_factor=(1,2,3,4),trained_length=16,factor=4",
)  # fmt: skip
KINDS = {"policy": POLICIES, "scaling": rope.SCALINGS}
NUMBERS = ("0", "1", "2", "3", "8", "16", "64", "-1", "0.5", "1e-9", "1000000", "2147483648",
           "1073741824", "1e400", "nan", "inf", "none", "true", "", "()", "(1,2)")  # fmt: skip
WORDS = (":", ",", "=", "(", ")", "policies=(", "none", "full", "per_head:", "json:", "window=4",
         "((((", "()", " ", "é", "\x00", "0x10")  # fmt: skip
TOKENS, PROMPT = 24, 12
SHARE = 16  # of the texts that are taken, one in so many reads: most of the time is compiling


def seeds(folder: Path) -> None:
    for kind, texts in (("policy", TEXTS), ("scaling", SCALINGS)):
        for number, text in enumerate(texts):
            (folder / f"{kind}-{number:02}.txt").write_text(text)


def mutate(rng: random.Random, path: Path) -> None:
    """Another text of the same kind: drawn field by field, spliced, or with damaged bytes."""
    chance, text = rng.random(), path.read_text()
    if chance < 0.5:
        kinds = KINDS[path.name.partition("-")[0]]
        name = rng.choice(sorted(set(kinds) - {"per_head", "per_layer"}))
        names = [field.name for field in dataclasses.fields(kinds[name])]
        given = ((field, rng.choice(NUMBERS)) for field in names if rng.random() < 0.8)
        text = f"{name}:" + ",".join(f"{field}={value}" for field, value in given)
    elif chance < 0.9:
        for _ in range(rng.choice((1, 1, 2))):
            start = rng.randrange(len(text) + 1)
            end = start + rng.choice((0, 0, 1, 4))
            text = text[:start] + rng.choice((*WORDS, *NUMBERS)) + text[end:]
    else:
        path.write_bytes(damage.change_bytes(rng, text.encode()))
        return
    path.write_text(text)


def read(path: Path) -> None:
    text = path.read_bytes().decode(errors="replace")
    if path.name.startswith("policy"):
        changed = model().with_policy(parse_policy(text))
    else:
        changed = model().with_scaling(parse_choice(text, rope.SCALINGS, what="scaling"))
    assert len(repr(changed).splitlines()) == 3
    if (zlib.crc32(text.encode()) + 11) % SHARE == 0:
        jax.config.update("jax_disable_most_optimizations", True)  # much to compile, little to do
        try:
            losses = changed.token_nll(np.arange(TOKENS), prompt=PROMPT)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
        assert np.isfinite(losses).all(), losses


@functools.cache
def model() -> LM:
    spec = specs.change(specs.shallow(specs.LLAMA, 2), vocab_size=257)
    return LM(spec, specs.parameters(spec), ByteTokenizer())
