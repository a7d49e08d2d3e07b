"""How many devices JAX makes of this machine's cores."""

import os

import jax

MOST = 4  # each device of a reading model holds all weights


def share_cores() -> None:
    """Makes JAX see the CPU as one device per core, up to four, if nobody chose a number.

    Must be called before anything is computed. XLA spreads single operations over cores, and waits
    for all cores after each; devices that read a text together (`LM.with_devices`) seldom wait for
    each other. `JAX_NUM_CPU_DEVICES=1 python benchmarks/ours.py read` is the time without.
    """
    chosen = jax.config.jax_num_cpu_devices != -1  # pyright: ignore[reportAttributeAccessIssue]
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and not forced:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(cores or 1, MOST))
