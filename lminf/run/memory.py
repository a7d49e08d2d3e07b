"""The most memory this process has held."""

import resource
import sys

import jax


def peak_bytes() -> int:
    """Of the accelerator where its runtime says, else of the process (resident)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
