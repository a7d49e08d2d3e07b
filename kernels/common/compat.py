"""Everything that depends on the version of a library underneath, and nothing else.

jax-triton 0.3.1 names the outputs `out_shape` and takes `enable_fp_fusion` itself; since 0.4 they
are `out_type` and one of `backend_options`. 0.3.1 cannot even be imported without a CUDA plugin,
so that happens when a kernel is first launched.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array

from lminf.kernels.common import platforms

if TYPE_CHECKING:
    from lminf.kernels.common.launch import Launch

_capability: contextvars.ContextVar[int | None] = contextvars.ContextVar(
    "compute_capability", default=None
)


@contextlib.contextmanager
def lowering_for(compute_capability: int) -> Iterator[None]:
    """Calls traced inside are for a GPU of this compute capability (90: Hopper), present or not."""
    token = _capability.set(compute_capability)
    try:
        yield
    finally:
        _capability.reset(token)


def compute_capability() -> int | None:
    """Of the GPU that calls are traced for (90: Hopper); None without a GPU of Nvidia's."""
    if _capability.get() is not None or platforms.current() not in ("gpu", "cuda"):
        return _capability.get()
    version = getattr(platforms.device(), "compute_capability", "")  # "9.0"
    return int(version.replace(".", "")) if version.replace(".", "").isdigit() else None


def cuda_version() -> int | None:
    """The release of CUDA that jax runs on (13000: 13.0); None without its CUDA plugin."""
    from jax._src.lib import cuda_versions  # jax says it nowhere else

    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def require_triton() -> None:
    """NotImplementedError, with the reason, where jax-triton cannot launch a kernel."""
    backend = platforms.current()
    if _capability.get() is None and backend not in ("gpu", "cuda", "rocm"):
        raise NotImplementedError(f"Triton needs a GPU; this process runs on {backend}")
    _jax_triton()


def _jax_triton() -> Any:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotImplementedError(f"triton cannot be imported: {error}") from error
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotImplementedError(f"jax-triton cannot be imported: {error}") from error
    return jax_triton


def triton_call(launch: "Launch") -> tuple[Array, ...]:
    """The outputs of a kernel launched through jax-triton."""
    call = _jax_triton().triton_call
    # Contraction of a * b + c is what the kernels count on; its default flips in Triton 3.10.
    if "out_type" in inspect.signature(call).parameters:
        options = {
            "out_type": tuple(launch.outputs),
            "backend_options": {"enable_fp_fusion": True},
        }
    else:
        options = {"out_shape": tuple(launch.outputs), "enable_fp_fusion": True}
    if launch.zeroed:
        options["zeroed_outputs"] = launch.zeroed
    return tuple(
        call(
            *launch.inputs,
            kernel=launch.kernel,
            grid=launch.grid,
            name=launch.name,
            num_warps=launch.warps,
            num_stages=launch.stages,
            compute_capability=_capability.get(),
            **options,
            **launch.constants,
        )
    )


def output_like(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """The shape of a Pallas output that differs between the devices of a shard_map as `like` does.

    What jax calls that property has changed its name; where neither is known, nothing is said, and
    a shard_map needs check_vma=False.
    """
    kind = jax.typeof(like)
    for name in ("manual_axis_type", "vma"):
        if hasattr(kind, name):
            return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(kind, name)})
    return jax.ShapeDtypeStruct(shape, dtype)
