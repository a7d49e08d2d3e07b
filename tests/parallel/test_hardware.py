"""Names of devices: so many of a kind."""

import pytest

from lminf.errors import InputError
from lminf.parallel import hardware


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("h200", "h200", 1), ("H100x8", "h100", 8), ("v5e-256", "v5e", 256), ("v6e-8", "v6e", 8),
     ("v5p-128", "v5p", 64), ("v4-8", "v4", 4), ("v5px64", "v5p", 64)],
)  # fmt: skip
def test_a_slice_of_v4_or_v5p_is_named_after_its_cores(text, name, count):
    assert hardware.parse(text) == hardware.Devices(name, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [("v5p-7", "named after their cores, 2 in a chip; give an even number, or chips, as in v5px7"),
     ("v5q-8", "did you mean"), ("h100x0", "and how many"), ("", "and how many")],
)  # fmt: skip
def test_what_is_no_device_is_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        hardware.parse(text)
