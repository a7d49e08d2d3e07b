"""Programs compiled for accelerators that this machine does not have; run by `make aot`."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from lminf.kernels.common import aot

HERE = Path(__file__).parent
# Of the TPU's compiler for each kernel: instruction bundles, the words that a core issues.
DUMP = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
)
DUMPED = tempfile.TemporaryDirectory(prefix="lminf-llo-")
# libtpu reads these when it is first used, whichever test does it. Two workers compile; no chip is
# there that they could both want.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(DUMPED.name)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.aot)


class Report(NamedTuple):
    """What the compiler said about a program."""

    temp_bytes: int
    bundles: dict[str, int]  # of each of our kernels


@pytest.fixture(scope="session")
def compile_tpu():
    """`aot.compile_tpu`, but what comes back is a Report."""
    folder = Path(DUMPED.name)

    def compiled(fn, *shapes, topology: str) -> Report:
        for old in folder.iterdir():
            old.unlink()
        memory = aot.compile_tpu(fn, *shapes, topology=topology).memory_analysis()
        assert memory is not None
        return Report(memory.temp_size_in_bytes, _bundles(folder))

    return compiled


def _bundles(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.glob("*-schedule-analysis_final_bundles.txt"):
        kernel = re.search(r"(lambda|cross_entropy|block_sparse)_[a-z]+(_[a-z]+)*", path.name)
        if kernel:
            count = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            assert count, path.name
            found[kernel.group()] = int(count.group(1))
    return found


@pytest.fixture
def recorded():
    """`recorded(topology, found)`: each number at most 5 % above what recorded.json says."""

    def check(topology: str, found: dict[str, int]) -> None:
        known = json.loads((HERE / "recorded.json").read_text())[topology]
        worse = {name: n for name, n in found.items() if n > 1.05 * known.get(name, 0)}
        before = {name: known.get(name) for name in worse}
        assert not worse, f"{topology}: recorded {before}, now {found}"

    return check
