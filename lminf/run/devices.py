"""What JAX is told before it computes: devices for this machine's cores, a folder for programs."""

import os
import warnings
from pathlib import Path

import jax

from lminf.run import memory

MOST = 4  # devices; more have not been measured
COMPILED_BYTES = 2**31  # of programs kept; the least recently used go first
WORTH_KEEPING = 0.2  # seconds of compilation


def configure(compiled: Path | None) -> None:
    """Makes JAX see the CPU as one device per core, up to four, if nobody chose a number, and keep
    what takes long to compile in the folder `compiled`, if nobody chose another.

    Must be called before anything is computed. XLA spreads single operations over cores, and waits
    for all cores after each; devices that read a text together (`LM.with_devices`) seldom wait for
    each other. `JAX_NUM_CPU_DEVICES=1 python benchmarks/ours.py read` is the time without.
    """
    memory.share_heap()
    chosen = jax.config.jax_num_cpu_devices != -1  # pyright: ignore[reportAttributeAccessIssue]
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and not forced:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(cores or 1, MOST))
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if compiled is not None and chosen is None:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
        # A damaged program is compiled again, and a full disk keeps none.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
