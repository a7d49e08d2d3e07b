"""Hugging Face folders: config.json, safetensors in one file or in shards, tokenizer files.

Safetensors are data; nothing in a checkpoint is executed, so PyTorch's pickles are refused.
"""

import contextlib
import dataclasses
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from lminf.atomic import atomic_write, check_space
from lminf.attention.policy import FULL, POLICIES, AnyPolicy, Window
from lminf.checkpoints import hf_config, hf_tokenizer, mxfp4, tensors, weight_maps
from lminf.checkpoints.families import FAMILIES
from lminf.checkpoints.files import read_json, write_json
from lminf.config import parse_choice
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError
from lminf.models.spec import ModelSpec
from lminf.ranges import shown
from lminf.types import Params

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
POLICY_FILE = "lminf.json"  # how a model attends, where config.json cannot say it
OF_IMAGES = ("vision_tower.", "multi_modal_projector.")  # tensors
FLOATS = {"F64", "F32", "F16", "BF16"}
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def refuse_pickle(path: Path) -> None:
    raise InputError(
        f"{path} is a PyTorch pickle, which can run code when it is opened; only safetensors and "
        f"GGUF are read, no code is ever executed from a checkpoint: convert it to safetensors "
        f"first"
    )


def load(
    folder: Path, *, dtype: Any = np.float32, progress: tensors.Progress | None = None
) -> tuple[ModelSpec, dict[str, Any], Tokenizer | None]:
    """Spec, parameters (numpy, of `dtype`) and, where the folder has one, tokenizer."""
    spec = read_spec(folder)
    with _tensors(folder) as (shapes, tensor):
        shapes, tensor = _text_model(folder, shapes, tensor)
        params = tensors.read(
            spec,
            FAMILIES[spec.family].rows_of(spec),
            shapes=shapes,
            tensor=tensor,
            dtype=dtype,
            source=str(folder),
            progress=progress,
        )
    return spec, params, hf_tokenizer.read(folder)


def read_spec(folder: Path) -> ModelSpec:
    """What config.json says of the model; every setting in it is understood or refused."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{folder} has no config.json; give a Hugging Face folder, a .gguf file, or the name "
            f"of a model"
        )
    return hf_config.to_spec(read_json(path), str(path))


@contextlib.contextmanager
def _tensors(
    folder: Path,
) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]]:
    """Shape of every tensor of the model by name, and a function that reads one."""
    with contextlib.ExitStack() as stack:
        shapes: dict[str, tuple[int, ...]] = {}
        shards: dict[str, Any] = {}
        for path in _files(folder):
            try:
                shard = stack.enter_context(safetensors.safe_open(path, "numpy"))
            except safetensors.SafetensorError as error:
                raise InputError(
                    f"{path} is not a whole safetensors file ({error}); fetch it again"
                ) from None
            for name in shard.keys():  # noqa: SIM118 (no mapping: a handle with keys)
                if name.endswith(weight_maps.DERIVED):
                    continue
                if name in shards:
                    raise InputError(f"{folder} holds {name} twice; remove one of the files")
                view = shard.get_slice(name)
                packed = name.endswith((mxfp4.BLOCKS, mxfp4.SCALES)) and view.get_dtype() == "U8"
                if view.get_dtype() not in FLOATS and not packed:
                    raise InputError(
                        f"{name} in {path} has the type {view.get_dtype()}; tensors of "
                        f"{', '.join(sorted(FLOATS))} are read"
                    )
                shapes[name], shards[name] = tuple(view.get_shape()), shard
        yield mxfp4.named(shapes, lambda name: shards[name].get_tensor(name), str(folder))


def _text_model(
    folder: Path, shapes: dict[str, tuple[int, ...]], tensor: Callable[[str], np.ndarray]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The tensors of the text model of one that reads images too, by the names it has alone."""
    if read_json(folder / "config.json").get("model_type") not in hf_config.WITH_IMAGES:
        return shapes, tensor
    stored = {
        name.removeprefix("language_model.").replace("model.language_model.", "model.", 1): name
        for name in shapes
        if not name.removeprefix("model.").startswith(OF_IMAGES)
    }
    return {name: shapes[old] for name, old in stored.items()}, lambda name: tensor(stored[name])


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a model, each of them there, chosen as transformers does."""
    if (folder / WEIGHTS).exists():
        return [_plain(folder / WEIGHTS)]
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        return _shards(folder, read_json(index).get("weight_map"), index)
    shards = sorted(path for path in folder.glob("*.safetensors") if not _other(path.name))
    if len(shards) > 1:
        raise InputError(
            f"{folder} holds {len(shards)} safetensors files but no {index.name} that says how "
            f"they belong together; fetch the index too"
        )
    if not shards:
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            refuse_pickle(pickles[0])
        raise InputError(f"{folder} holds no safetensors file; fetch the checkpoint again, whole")
    return [_plain(path) for path in shards]


def _other(name: str) -> bool:
    """Whether a file is not of this model's format: Mistral's own layout, or an adapter."""
    return name.startswith(("consolidated", "adapter_"))


def _shards(folder: Path, weight_map: Any, index: Path) -> list[Path]:
    """The files that an index names, all of them inside its folder."""
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index} does not say which file holds which tensor; fetch it again")
    names = sorted(set(names))
    for name in names:
        # Names, not paths: an index must not open anything outside the checkpoint. The file itself
        # may be a link, as in the cache of the hub.
        if not name.endswith(".safetensors") or re.search(r"[/\\:\0]", name):
            raise InputError(
                f"{index} names the shard {shown(name)}; only safetensors files of the same folder "
                f"are opened"
            )
    if lost := [name for name in names if not (folder / name).exists()]:
        raise InputError(
            f"{folder} lacks {lost[0]} ({len(lost)} of {len(names)} shards are missing); fetch "
            f"the checkpoint again, whole"
        )
    return [_plain(folder / name) for name in names]


def _plain(path: Path) -> Path:
    """The path, if it is a file: opening a pipe would wait for ever."""
    if not path.is_file():
        raise InputError(f"{path} is no plain file; fetch the checkpoint again, whole")
    return path


def read_policy(folder: Path) -> AnyPolicy | None:
    """How the model attends as it was trained, where lminf.json says so beside its weights."""
    path = folder / POLICY_FILE
    if not path.exists():
        return None
    content = read_json(path)
    if content.keys() != {"policy"} or not isinstance(content["policy"], str):
        raise InputError(
            f"{path} does not say the policy that the model was trained with; it should hold "
            f'{{"policy": "NAME:FIELD=VALUE"}}: export the model again, or remove the file'
        )
    try:
        return parse_choice(content["policy"], POLICIES, what="policy")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def must_be_new(folder: Path) -> None:
    """Refuses a folder that holds anything: nothing is ever overwritten."""
    exists = folder.exists() or folder.is_symlink()  # to nothing
    if exists and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose a new one")


def check_save(
    folder: Path, spec: ModelSpec, tokenizer: Tokenizer | None, policy: AnyPolicy, needed: int
) -> None:
    """Refuses whatever `save` would refuse, before the parameters (`needed` bytes) are there."""
    must_be_new(folder)
    check_space(folder, needed)
    _described(spec, policy)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as tried:
            hf_tokenizer.write(Path(tried), tokenizer)


def _described(spec: ModelSpec, policy: AnyPolicy) -> tuple[dict[str, Any], dict[str, str] | None]:
    """config.json and lminf.json of a model that attends by this policy; no second where the first
    says it all, which it does for windows in families that have them."""
    if policy == FULL:
        return hf_config.from_spec(spec), None
    if isinstance(policy, Window) and type(policy) is Window and set(spec.windows) == {None}:
        windows = (policy.window,) * spec.num_layers
        for family in (spec.family, "mistral") if spec.family == "llama" else (spec.family,):
            with contextlib.suppress(InputError):
                windowed = dataclasses.replace(spec, family=family, windows=windows)
                return hf_config.from_spec(windowed), None
    if parse_choice(policy.name, POLICIES, what="policy") != policy:
        raise InputError(f"{policy.name} cannot be written down beside a model")
    return hf_config.from_spec(spec), {"policy": policy.name}


def save(
    folder: Path,
    spec: ModelSpec,
    params: Params,
    tokenizer: Tokenizer | None,
    policy: AnyPolicy = FULL,
) -> None:
    """Writes a folder that transformers loads, all of it or nothing.

    `policy` is how the model attends as it was trained: where config.json cannot say it,
    lminf.json does, which other programs do not read.
    """
    must_be_new(folder)
    config, attends = _described(spec, policy)
    stored = list(tensors.write(spec, FAMILIES[spec.family].rows_of(spec), params))
    dtype = str(np.dtype(next(iter(tensors.flattened(params).values())).dtype))
    if dtype not in DTYPE_NAMES:
        raise InputError(f"parameters of type {dtype} have no place in a checkpoint; cast them")
    config |= {"torch_dtype": dtype, "use_cache": True}
    # Absent, they would be those of one released model, which our vocabulary need not have.
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    generation: dict[str, Any] = {"do_sample": False}
    if tokenizer is not None:
        config["vocab_size"] = spec.vocab_size
        ends = list(tokenizer.eos_ids)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if ends else None}
        config |= ids
        generation |= ids | {"eos_token_id": ends}
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        if tokenizer is not None:
            hf_tokenizer.write(temporary, tokenizer)
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", generation)
        if attends is not None:
            write_json(temporary / POLICY_FILE, attends)
        with (temporary / WEIGHTS).open("wb") as file:
            _write_safetensors(file, stored, dtype)


def _write_safetensors(
    file: BinaryIO, stored: list[tuple[tensors.Stored, Callable[[], np.ndarray]]], dtype: str
) -> None:
    """The format by hand, so that one tensor at a time is in memory instead of a second model.

    Layout: length of the header (8 bytes), header as JSON, data in the header's order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, width = 0, np.dtype(dtype).itemsize
    for item, _ in stored:
        start, end = end, end + width * int(np.prod(item.shape))
        header[item.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(item.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    file.write(struct.pack("<Q", len(text)) + text)
    for _, make in stored:
        file.write(make().astype(dtype, copy=False).reshape(-1).view(np.uint8).data)
