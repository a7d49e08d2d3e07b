import pytest
from matplotlib.figure import Figure

from lminf.errors import InputError
from lminf.experiments import long_context_loss as experiment

WINDOW = "lm_infinite:window=16,sinks=2"


def row(policy, document, nll, *, start=0, text="code", copied=0.0, new=None):
    return {"policy": policy, "document": document, "nll": nll, "text": text, "copied": copied,
            "nll_not_copied": nll if new is None else new, "start": start, "stop": start + 100,
            "trained_length": 64}  # fmt: skip


ROWS = [
    row(policy, document, nll, start=start)
    for start in (0, 100)
    for policy, losses in (("re-read", (2.0, 5.0, 8.0)), (WINDOW, (2.1, 5.2, 8.3)))
    for document, nll in enumerate(losses)
]


def test_a_claim_is_a_difference_document_by_document():
    first, second = experiment.differences(ROWS)
    assert (first["start"], second["start"], first["documents"]) == (0, 100, 3)
    assert first["difference"] == f"{WINDOW} − re-read"
    mean, low, high = first["interval"]
    assert mean == pytest.approx(0.2)  # not the difference of documents, which is 3
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.3))  # three differ by 0.1 to 0.3
    share, claim = experiment.table(ROWS)
    assert share["0–100"] == "0.0 %"
    assert (claim["documents"], claim["0–100"]) == (3, "0.200 (0.100 to 0.300)")
    assert isinstance(experiment.plot(ROWS)["long_context_loss"], Figure)


def test_texts_are_shown_apart_and_together():
    rows = ROWS[:6] + [{**row, "text": "prose", "nll": 2 * row["nll"]} for row in ROWS[:6]]
    code, prose, both = experiment.differences(rows)
    assert (code["text"], prose["text"], both["text"]) == ("code", "prose", "all texts")
    assert [each["documents"] for each in (code, prose, both)] == [3, 3, 6]
    assert both["interval"].mean == pytest.approx((0.2 + 0.4) / 2)


def test_what_a_text_copies_is_shown_apart():
    rows = [row("re-read", 0, 1.0, copied=0.5, new=2.0), row(WINDOW, 0, 1.5, copied=0.5, new=2.1)]
    share, everything, new = experiment.table(rows)
    assert share["0–100"] == "50.0 %"
    assert (everything["tokens"], everything["0–100"]) == ("all", "0.500")
    assert (new["tokens"], new["0–100"]) == ("not copied", "0.100")
    assert experiment.plot(rows[:1]) == {}  # nothing to compare it with


def test_a_policy_whose_loss_is_that_of_another_has_none(rows_of):
    with pytest.raises(InputError, match=r"topk.* selects for the last query of a call alone"):
        rows_of("long_context_loss", policies=("topk:window=16,sinks=2,topk=3,from_layer=0",))


@pytest.mark.slow
def test_readings_of_several_texts_resume(rows_of):
    options = {"length": 96, "block": 48, "beyond": 32, "documents": 2,
               "policies": ("re-read", WINDOW, "window:window=16")}  # fmt: skip
    rows = rows_of("long_context_loss", **options)
    cells = [(each["text"], each["document"], each["policy"], each["start"]) for each in rows]
    assert len(set(cells)) == len(rows) == (1 + 2) * 3 * 2  # the reference is one document
    again = rows_of("long_context_loss", rows[:-4], **options)
    assert [each["nll"] for each in again] == [each["nll"] for each in rows[-4:]]
    # Vacuous rows: every policy's loss differs from its base's once the window is full.
    for text, number in {(each["text"], each["document"]) for each in rows}:
        place = (text, number, 48)
        last = [each["nll"] for each in rows
                if (each["text"], each["document"], each["start"]) == place]  # fmt: skip
        assert len(set(last)) == 3
