"""Quality against bytes: what a stopped run still has to do."""

import pytest

POLICIES = ("full", "streaming:window={w},sinks=4", "think:ratio=0.4,recent=8")
ASKED = {
    "policies": POLICIES, "prompt": 40, "continuation": 8, "passkeys": 1, "positions": (20,),
    "steps": 1,
}  # fmt: skip


def facts(rows):
    timed = ("seconds", "ms_per_token", "low", "high")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_what_it_lacks(rows_of):
    whole = rows_of("kv_cache", **ASKED)
    assert [row["measured"] for row in whole] == ["loss"] * 3 + ["passkey"] * 3 + ["cost"] * 3
    assert facts(rows_of("kv_cache", whole[:2], **ASKED)) == facts(whole[2:])
    assert facts(rows_of("kv_cache", whole[:4], **ASKED)) == facts(whole[4:])
    # Of costs either all are kept or none: they were timed in turns.
    assert facts(rows_of("kv_cache", whole[:8], **ASKED)) == facts(whole[6:])
    assert rows_of("kv_cache", whole, **ASKED) == []
