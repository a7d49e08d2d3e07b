"""What every test runs under: eight CPU devices, strict dtypes and ranks, checked shapes."""

import atexit
import gc
import importlib.util
import os
import pathlib
import shutil
import tempfile

# Before jax is imported. Eight devices cost nothing where one is used (measured: start, compile
# and matmul times are the same within noise).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("LMINF_CACHE", "off")  # programs that tests compile are not the user's
DEVICES = "--xla_force_host_platform_device_count=8"
# The older emitter of fusions compiles in half the time.
EMITTER = "--xla_cpu_use_fusion_emitters=false"
# One module of LLVM for each program: two workers have no cores for more.
MODULES = "--xla_cpu_parallel_codegen_split_count=1"
for flag in (DEVICES, EMITTER, MODULES):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# A program that was compiled before is loaded, in a tenth of the time; processes that tests start
# compile as tests do. Each worker has a folder of its own, because jax reads what another process
# has only begun to write.
PROGRAMS = tempfile.mkdtemp(prefix="lminf-programs-")
atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": PROGRAMS,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotated shapes become assertions in the packages that handle arrays: 3 s of CPU per process.
CHECKED = [
    "lminf.attention",
    "lminf.models",
    "lminf.objectives",
    "lminf.lm.generate",
    "lminf.kernels",
]
if importlib.util.find_spec("beartype"):
    importlib.import_module("tests.checking")  # the hook looks the function up by its name
    jaxtyping.install_import_hook(CHECKED, "tests.checking.check")

# Compiling is slow and its time varies, so no deadline; the same examples on every machine.
hypothesis.settings.register_profile("lminf", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("lminf")


def pytest_collection_finish():
    """Keeps imported objects out of garbage collection, which took a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


# Of the 65,530 memory maps that Linux allows a process. A compiled program has about ten, and XLA
# crashes in compiling the one that is too many.
MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """Before there are too many of them."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def lm():
    """A random byte model of two layers, one that forgets and one that does not."""
    # Tests that need no model do not wait for its imports.
    from lminf.attention.policy import Full, LMInfinite, PerLayer
    from lminf.data.tokenizers import ByteTokenizer
    from lminf.lm.lm import LM
    from tests.models import specs

    spec = specs.change(specs.shallow(specs.LLAMA, 2), vocab_size=257)
    policy = PerLayer((LMInfinite(window=8, sinks=2), Full()))
    return LM(spec, specs.parameters(spec), ByteTokenizer(), policy)


@pytest.fixture
def small_steps(monkeypatch):
    """Texts of some twenty tokens are read in several chunks."""
    monkeypatch.setattr("lminf.lm.nll.CHUNK", 16)
    monkeypatch.setattr("lminf.lm.generate.STEP", 16)


# These compile as users do: what they compute takes longer than compiling it, or they compare two
# programs bit by bit, which are the same only after optimizations.
OPTIMIZED = (
    "tests/scaling/test_recovery.py", "tests/scaling/test_robust_fit.py",
    "tests/scaling/test_plan.py", "tests/scaling/test_determined.py",
    "tests/experiments/test_sweeps.py", "tests/experiments/test_tiny.py::test_context_budget",
    "tests/kernels/test_lambda_attention.py::test_positions_0_1_2_are_what_none_means",
    "tests/test_default_model.py",
)  # fmt: skip


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """Tests compile much and compute little: half of their time goes without optimizations."""
    jax.config.update(
        "jax_disable_most_optimizations", not request.node.nodeid.startswith(OPTIMIZED)
    )
    yield
    jax.config.update("jax_disable_most_optimizations", False)
