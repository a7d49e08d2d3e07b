"""For what device a call is being traced: this process's own, or one that is not here."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_assumed: contextvars.ContextVar[Any] = contextvars.ContextVar("assumed_device", default=None)


@contextlib.contextmanager
def assuming(device: Any) -> Iterator[None]:
    """Calls traced inside are for this device, as of a topology, and choose what is best there."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def current() -> str:
    """cpu, tpu, gpu."""
    device = _assumed.get()
    if device is None:
        return jax.default_backend()
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def device() -> Any:
    """The device, or one of several alike."""
    assumed = _assumed.get()
    return jax.devices()[0] if assumed is None else assumed
