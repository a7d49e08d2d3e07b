"""What a measurement depends on besides its configuration: versions, hardware, source, command."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf.run import header

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "gguf", "safetensors", "lminf")
VARIABLES = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "XLA_FLAGS", "OMP_NUM_THREADS")
DIFF_CHARACTERS = 200_000  # a diff longer than this is a different program, not a small change
SOURCE = Path(__file__).resolve().parents[2]


def describe(command: Sequence[str]) -> dict[str, Any]:
    """Everything environment.json holds. Asks JAX for its devices, which starts its backend."""
    return {
        "command": shlex.join(command),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_model(),
        "cpu_count": usable_cpus(),
        "memory_bytes": memory_bytes(),
        "devices": devices(),
        "source": source(),
    }


def hardware(described: dict[str, Any]) -> str:
    """One line for a report: `2 × Xeon …, 24 GB; cpu × 1`."""
    memory = described["memory_bytes"]
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    kinds = described["devices"]
    accelerators = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    return f"{described['cpu_count']} × {described['cpu']}{size}; JAX on {accelerators}"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cpus() -> int:
    """CPUs this process may run on, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def devices() -> dict[str, int]:
    """Device kind -> how many, as JAX sees them."""
    import jax

    kinds = [f"{device.platform} {device.device_kind}".strip() for device in jax.devices()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def source() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout this code runs from; None if it is not one."""
    if not (SOURCE / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    diff = _git("diff", "HEAD") or ""
    return {
        "commit": commit.strip() if commit else None,
        "status": (_git("status", "--short") or "").splitlines()[:200],
        "diff": diff[:DIFF_CHARACTERS],
        "diff_complete": len(diff) <= DIFF_CHARACTERS,
    }


def commit() -> str | None:
    """The commit of the checkout this code runs from, with a `+` if files were changed since."""
    state = source()
    return None if state is None else f"{state['commit']}{'+' if state['diff'] else ''}"


def _git(*arguments: str) -> str | None:
    try:
        # Refreshing the index would take its lock from under a commit being made elsewhere.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(
            command, cwd=SOURCE, capture_output=True, timeout=20, check=True, text=True,
            errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line() -> list[str]:
    """This process's command as a user would type it here."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and "experiments." in module.name:
        return [*header.command(module.name.rpartition(".")[2]).split(), *sys.argv[1:]]
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
