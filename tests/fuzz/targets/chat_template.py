"""Chat templates and the messages they render, through Tokenizer.encode_chat."""

import json
from pathlib import Path

from lminf.data import tokenizers
from lminf.errors import InputError
from tests.checkpoints import making

COST = 8  # each renders in a process of its own
TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + loop.index %}"
    "{{ bos_token * ns.i }}{{ m.content | trim | tojson(indent=2) }}{{ m.tools | length }}"
    "{% endfor %}{{ strftime_now('%Y') }}",
    "{% macro f(x) %}{{ x.text ~ 'a' * 3 }}{% endmacro %}{% for m in messages %}{% for p in "
    "m.content %}{{ f(p) }}{% endfor %}{% if not loop.last %}{% continue %}{% endif %}{% endfor %}",
)
MESSAGES = [
    {"role": "user", "content": "<|im_end|> the </s>", "tools": [1, {"a": None}]},
    {"role": "assistant", "content": "the cat", "tools": []},
]


def seeds(folder: Path) -> None:
    """One conversation for each template."""
    for index, template in enumerate(TEMPLATES):
        messages = [{**m, "content": [{"text": m["content"]}]} if index == 2 else m
                    for m in MESSAGES]  # fmt: skip
        value = {"chat_template": template, "messages": messages}
        (folder / f"{index}.json").write_text(json.dumps(value))


def read(path: Path) -> None:
    """What LM.chat does before the model reads."""
    try:
        value = json.loads(path.read_bytes())
        template, messages = value["chat_template"], value["messages"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise InputError("no conversation") from None
    plain = making.tiny_tokenizer()
    tokenizer = tokenizers.Tokenizer(plain.backend, plain.special, False, (), template)
    tokenizer.encode_chat(messages)
