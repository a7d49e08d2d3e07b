"""Safetensors in one file and in shards: the header's JSON, the index, and the bytes of both."""

import json
import random
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lminf import checkpoints
from lminf.checkpoints import hf
from tests.checkpoints import making
from tests.fuzz import mutate as damage


def seeds(folder: Path) -> None:
    for name in ("llama", "llama_biased", "gpt_neox", "mpt"):
        spec = making.SPECS[name]
        hf.save(folder / name, spec, making.random_params(spec), None)
    whole = folder / "llama"
    sharded = folder / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = load_file(whole / hf.WEIGHTS)
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n, s in weight_map.items() if s == shard}, sharded / shard)
    (sharded / f"{hf.WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tied = folder / "tied"  # with the head once more, as Qwen3 0.6B has it
    spec = making.SPECS["llama_biased"]
    hf.save(tied, spec, making.random_params(spec), None)
    tensors = load_file(tied / hf.WEIGHTS)
    tensors["lm_head.weight"] = np.array(tensors["model.embed_tokens.weight"])
    save_file(tensors, tied / hf.WEIGHTS)


def read(path: Path) -> None:
    checkpoints.load(path)


def mutate(rng: random.Random, path: Path) -> None:
    """Damages the header of a safetensors file as JSON or as bytes, or the index."""
    file = rng.choice(sorted(p for p in path.iterdir() if p.name != "config.json"))
    data = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(damage.change_json(rng, data))
        return
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.3:
        file.write_bytes(damage.change_bytes(rng, data))
        return
    header = damage.change_json(rng, data[8 : 8 + size])
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
