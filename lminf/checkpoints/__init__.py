"""Checkpoints in and out: named models, Hugging Face folders, GGUF files."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lminf.attention.policy import FULL, AnyPolicy
from lminf.checkpoints import fetch, gguf, gguf_tokenizer, hf, hf_tokenizer
from lminf.checkpoints.tensors import Progress
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError, refusing
from lminf.models.quantization import check_float
from lminf.models.spec import ModelSpec
from lminf.types import Params


@dataclass(frozen=True, eq=False)
class Checkpoint:
    spec: ModelSpec
    params: Params
    tokenizer: Tokenizer | None  # None: the folder has none, the model reads token ids only
    source: str  # the file or folder it was read from
    policy: AnyPolicy | None = None  # that it was trained with, where config.json cannot say it


def load(
    name: str | os.PathLike[str], *, dtype: Any = jnp.float32, progress: Progress | None = None
) -> Checkpoint:
    """A model by its name in the table, or a folder, a .gguf file, or `owner/name` on the hub.

    Parameters are arrays of `dtype` on the default device. `progress` counts the bytes of a
    download, then the tensors that are read.
    """
    path = _locate(str(name), progress)
    read = gguf.load if path.is_file() else hf.load
    with refusing(str(path), kind="checkpoint"):
        policy = None if path.is_file() else hf.read_policy(path)
        spec, params, tokenizer = read(path, dtype=jnp.dtype(dtype), progress=progress)
        if tokenizer is not None:
            tokenizer = _fitted(tokenizer, spec, path)
    # On a CPU the arrays that were read are used as they are: no second copy of the model.
    params = jax.tree.map(lambda array: jax.device_put(array, may_alias=True), params)
    return Checkpoint(spec, params, tokenizer, str(path), policy)


def _fitted(tokenizer: Tokenizer, spec: ModelSpec, path: Path) -> Tokenizer:
    """The tokenizer, without a padding token that the embedding has no row for.

    Such a token was added to fill batches while the model was trained; it is never predicted.
    """
    ids = tokenizer.backend.get_vocab(with_added_tokens=True).values()
    beyond = {i for i in ids if i >= spec.vocab_size}
    padding = tokenizer.special.get("pad_token")
    if padding is not None and beyond == {tokenizer.backend.token_to_id(padding)}:
        return hf_tokenizer.without(tokenizer, padding)
    if beyond:
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens but the embedding only "
            f"{spec.vocab_size} rows; the two belong to different models"
        )
    return tokenizer


def read_spec(name: str | os.PathLike[str]) -> ModelSpec:
    """The shapes and rules of a model, without reading its parameters."""
    path = _locate(str(name), None)
    with refusing(str(path), kind="checkpoint"):
        return gguf.read_spec(gguf.open_gguf(path)) if path.is_file() else hf.read_spec(path)


def read_policy(name: str | os.PathLike[str]) -> AnyPolicy | None:
    """The policy that a model was trained with; None where nothing beside its weights says one."""
    path = _locate(str(name), None)
    with refusing(str(path), kind="checkpoint"):
        return None if path.is_file() else hf.read_policy(path)


def read_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model, or of a folder that holds nothing else."""
    path = _locate(str(name), None)
    with refusing(str(path), kind="tokenizer"):
        if path.is_file():
            return gguf_tokenizer.from_metadata(gguf.open_gguf(path).metadata, str(path))
        tokenizer = hf_tokenizer.read(path)
        if tokenizer is None:
            raise InputError(f"{path} has no tokenizer; add its tokenizer.json")
        return tokenizer


def check_save(
    folder: str | os.PathLike[str], checkpoint: Checkpoint | None = None, *, needed: int = 0
) -> None:
    """Refuses what `save` would refuse, before the work is done: a place that is taken, cannot be
    written or lacks `needed` bytes, and a model (whose parameters are not read) without a format.
    """
    path = _local(folder)
    if checkpoint is None:
        hf.must_be_new(path)
        hf.check_space(path, needed)
        return
    check_float(checkpoint.params, purpose="export")
    policy = checkpoint.policy or FULL
    hf.check_save(path, checkpoint.spec, checkpoint.tokenizer, policy, needed)


def save(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes safetensors, config.json and tokenizer files, as transformers and `load` read them.

    The folder must be new or empty; it appears whole or not at all. A policy that config.json
    cannot express is written to lminf.json, where `load` finds it.
    """
    check_float(checkpoint.params, purpose="export")
    policy = checkpoint.policy or FULL
    path = _local(folder)
    hf.save(path, checkpoint.spec, checkpoint.params, checkpoint.tokenizer, policy)


def _local(folder: str | os.PathLike[str]) -> Path:
    """The folder's path; as one, `gs://bucket` would be a local folder called `gs:`."""
    if "://" in os.fspath(folder):
        raise InputError(f"{folder} is no folder; a model is written into one: name it, and copy "
                         f"it from there")  # fmt: skip
    return Path(folder)


def _locate(name: str, progress: Progress | None) -> Path:
    """Where the checkpoint lies on this machine, fetching it if it is a name."""
    if not name:
        raise InputError("the name of the model is empty; give a folder, a file or a name")
    path = Path(name).expanduser()
    if name not in fetch.MODELS and path.exists():
        if path.suffix in hf.PICKLES:
            hf.refuse_pickle(path)
        return path
    looks_local = path.suffix in (".gguf", ".safetensors", *hf.PICKLES) or re.match(r"[./~]", name)
    if looks_local:
        raise InputError(f"there is no file or folder {name}; check the path")
    return fetch.fetch(name, progress=progress)
