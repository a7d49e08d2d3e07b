import pytest
from matplotlib.figure import Figure

from lminf.errors import InputError
from lminf.experiments import long_context_retrieval as experiment

WINDOW, TOPK = "lm_infinite:window=64,sinks=4", "topk:window=64,sinks=4,topk=5,from_layer=1"
OPTIONS = {"lengths": (512,), "documents": 2, "depths": (0.1, 0.8), "policies": (WINDOW, TOPK)}


def row(document, gain, *, policy=WINDOW, place=experiment.FAR):
    return {"policy": policy, "length": 512, "document": document, "place": place, "depths": 2,
            "copy_gain": gain, "needle_margin": 0.5, "key_value_margin": 0.25,
            "rank": 1.5, "attended": 68, "cache_bytes": 10_000, "trained_length": 64}  # fmt: skip


def test_a_line_is_a_policy_with_n_and_intervals():
    rows = [row(document, gain) for document, gain in enumerate((0.0, 1.0, 2.0, 1.0))]
    rows += [row(0, 9.0, place=experiment.NEAR)]
    (line,) = experiment.table(rows)
    assert line["documents × depths"] == "4 × 2"
    assert line["copy gain (nats/token)"].startswith("1.00 (0.")
    assert line["needle margin (nats)"] == "0.50 (0.50 to 0.50)"
    assert isinstance(experiment.plot(rows)["copy_gain"], Figure)


def test_policies_are_told_apart_by_what_they_cost():
    rows = [
        row(document, 1.0, policy=policy)
        | {"attended": attended or length, "cache_bytes": 100 * (kept or length), "length": length}
        for policy, attended, kept in ((WINDOW, 68, 68), (TOPK, 73, None), ("full", None, None))
        for length in (512, 1024)
        for document in range(4)
    ]
    lines = experiment.summary(rows)
    kinds = {line["policy"]: experiment.kind_of(line, lines) for line in lines}
    assert kinds == dict(zip((WINDOW, TOPK, "full"), experiment.KINDS, strict=True))
    assert list(experiment.plot(rows)) == ["long_context_retrieval"]


def test_policies_are_compared_document_by_document():
    rows = [
        row(document, gain + more, policy=policy)
        for policy, more in ((WINDOW, 0.0), ("full", 1.0))
        for document, gain in enumerate((0.0, 5.0, 10.0))
    ]
    first, second = experiment.table(rows)
    assert first["copy gain above the first policy"] is None
    assert second["copy gain above the first policy"] == "1.00 (1.00 to 1.00)"


def test_an_odd_document_has_no_control(rows_of):
    with pytest.raises(InputError, match="documents=3: two documents are each other's control"):
        rows_of("long_context_retrieval", documents=3)


def test_a_window_that_reaches_what_should_be_outside_is_refused(rows_of):
    with pytest.raises(InputError, match="has a window of more than beyond=32 tokens"):
        rows_of("long_context_retrieval", beyond=32)


@pytest.mark.slow
def test_documents_are_measured_in_pairs_and_resume(rows_of):
    rows = rows_of("long_context_retrieval", **OPTIONS)
    cells = [(each["policy"], each["document"], each["place"]) for each in rows]
    assert len(set(cells)) == len(rows) == 2 * 2  # both depths are outside of 64 tokens
    for each in rows:
        selects = each["policy"].startswith("topk")
        assert (each["copy_gain"] is None) == selects
        assert each["attended"] == (73 if selects else 68)
    window, topk = (each["needle_margin"] for each in rows if each["document"] == 0)
    assert window != topk  # a vacuous row would be that of its base
    again = rows_of("long_context_retrieval", rows[:2], **OPTIONS)
    assert [each["rank"] for each in again] == [each["rank"] for each in rows[2:]]
