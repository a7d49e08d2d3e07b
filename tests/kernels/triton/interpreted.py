"""Runs named checks in the Triton interpreter: one name a line in, one JSON line out.

A process of its own, because Triton decides at import whether it interprets. A line holds the
relative error of every result against the float64 reference, or what went wrong.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable

Errors = dict[str, float]


def answer(checks: dict[str, Callable[[], Errors]]) -> None:
    """Serves until the input ends."""
    from lminf.kernels.common import interpret, launch

    for line in sys.stdin:
        try:
            with launch.using(interpret.run):
                reply = {"errors": checks[line.strip()]()}
        except BaseException:
            reply = {"failure": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    # The package itself when run with -m is __main__; the checks import it by its name.
    from tests.kernels.triton import checks

    answer(checks.CHECKS)
