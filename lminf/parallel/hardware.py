"""What devices can do, for plans and for the share of it that a run reaches."""

import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lminf.config import closest
from lminf.errors import InputError


@dataclass(frozen=True)
class Kind:
    """One device; rates are per second, from the makers' data sheets."""

    peak_flops: float  # dense bfloat16
    memory_bytes: int
    memory_bandwidth: float  # bytes read or written
    # Devices that a fast network connects: a host of GPUs, a slice of TPUs. A device sends so many
    # bytes over it (of a torus: along one of its dimensions), and so many to devices beyond.
    domain: int
    link_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True)
class Devices:
    """So many of one kind."""

    name: str
    count: int

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def parse(text: str) -> Devices:
    """`v5e-256`, `h100x8`, `h200`; `v5p-128`, a slice's name, counts the cores of 64 chips."""
    match = re.fullmatch(r"(\w+?)(?:([-x*])(\d{1,9}))?", text.lower())
    if match is None or match[1] not in KINDS or not 0 < int(match[3] or 1) <= MOST_DEVICES:
        name = match[1] if match else text
        raise InputError(
            f"--devices={text}: {closest(name, KINDS)}, and how many (at most {MOST_DEVICES:,}), "
            f"as in v5e-256 or h100x8"
        )
    count, per_chip = int(match[3] or 1), CORES_IN_NAMES.get(match[1], 1)
    if match[2] != "-":
        return Devices(match[1], count)
    if count % per_chip:
        raise InputError(
            f"--devices={text}: slices of {match[1]} are named after their cores, {per_chip} in a "
            f"chip; give an even number, or chips, as in {match[1]}x{count}"
        )
    return Devices(match[1], count // per_chip)


# Cores of a chip, where slices are named after cores (cloud.google.com/tpu/docs/v5p, /v4).
CORES_IN_NAMES = {"v4": 2, "v5p": 2}
GB, GiB = 10**9, 2**30
MOST_DEVICES = 2**20
# By the names of command lines. Devices call themselves otherwise: NAMES.
# Beyond a domain a GPU has a network card of 200 or 400 Gbit/s, on Frontier half of one; a TPU has
# its share of its host's connection to the data centre, of which only the size is known.
KINDS = {
    "v4": Kind(275e12, 32 * GiB, 1.2e12, 4096, 100e9, 6e9),
    "v5e": Kind(197e12, 16 * GB, 0.82e12, 256, 100e9, 3e9),
    "v5p": Kind(459e12, 95 * GB, 2.77e12, 8960, 200e9, 6e9),
    "v6e": Kind(918e12, 32 * GB, 1.64e12, 256, 224e9, 12e9),
    "a100": Kind(312e12, 80 * GB, 2.04e12, 8, 300e9, 25e9),
    "h100": Kind(989e12, 80 * GB, 3.35e12, 8, 450e9, 50e9),
    "h200": Kind(989e12, 141 * GB, 4.8e12, 8, 450e9, 50e9),
    "mi250x": Kind(191.5e12, 64 * GB, 1.6e12, 8, 50e9, 12.5e9),  # one of its two dies
}
NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def memory_bytes(device: Any) -> int | None:
    """Of one device, as its runtime says; of a CPU device the machine's. None: nobody knows."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not a Unix machine
        return None


def peak_flops(device: Any) -> float:
    """FLOPs per second of one device: of its data sheet, or as measured where it has none here."""
    name = NAMES.get(device.device_kind)
    return KINDS[name].peak_flops if name else measured_flops(device)


def measured_flops(device: Any) -> float:
    """The best of a few float32 products of 1024 x 1024 matrices: a tenth of a second on a CPU."""
    size = 1024
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - started)
    devices = len(jax.local_devices()) if device.platform == "cpu" else 1
    return 2 * size**3 / min(times) / devices  # CPU devices share the cores
