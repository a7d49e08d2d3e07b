"""LongPO's rounds on scripted models: prompts, pairs that teach, and going on."""

import pytest

from lminf.errors import InputError
from lminf.lm.scripted import Scripted
from lminf.programs import longpo
from lminf.programs.longpo import AnswerPair, Prompts

DOCUMENT = "".join(f"Fact {number}. " for number in range(60))
LENGTHS = (20, 40)


def asks(prompt):
    return (
        "1. Who?\n2) When?\n3: Where?\n4. Why?" if "four different questions" in prompt else "yes"
    )


def test_a_question_follows_a_chunk_and_the_whole_document():
    questions = set()
    for seed in range(20):
        prompts = longpo.instruct(Scripted(asks), DOCUMENT, chunk_len=(30, 50), key=(seed,))
        chunk, instruction = prompts.short.split("\n\n")
        assert 30 <= len(chunk) <= 50
        assert chunk in DOCUMENT
        assert prompts.long == f"{DOCUMENT}\n\n{instruction}"
        questions.add(instruction)
    assert questions == {f"{word}?\nAnswer:" for word in ("Who", "When", "Where", "Why")}
    same = [longpo.instruct(Scripted(asks), DOCUMENT, chunk_len=(30, 50), key=(3,)) for _ in "ab"]
    assert same[0] == same[1]
    silent = Scripted(lambda prompt: "No.")
    assert longpo.instruct(silent, DOCUMENT, chunk_len=(30, 50), key=(0,)) is None


@pytest.mark.parametrize("chunk_len", [(0, 9), (9, 3), (9, 10_000)])
def test_chunks_that_a_document_does_not_have_are_refused(chunk_len):
    with pytest.raises(InputError, match=r"chunks of \d+ to \d+ characters of a document of 530;"):
        longpo.instruct(Scripted(asks), DOCUMENT, chunk_len=chunk_len, key=(0,))


def test_pairs_without_a_difference_or_an_answer_are_left_out():
    answers = {"s1": "a", "l1": "b", "s2": "a", "l2": "a", "s3": "", "l3": "b", "s4": "a", "l4": ""}
    prompts = [Prompts(f"s{n}", f"l{n}") for n in range(1, 5)]
    pairs = longpo.answer_pairs(Scripted(answers.__getitem__), prompts, max_new_tokens=5, batch=3)
    assert pairs == [AnswerPair(Prompts("s1", "l1"), "a", "b")]


class Killed(Exception):
    pass


def steps(asked, trained, rows, *, die=None):
    """Rounds of scripted models: model n answers short prompts by `n`, and long ones by `x`."""

    def model(number):
        def answer(prompt):
            if len(asked) == die:
                raise Killed
            asked.append(prompt)
            return str(number) if prompt.startswith("s") else "x"

        return Scripted(answer)

    def train(_, pairs, index):
        trained.append((index, [pair.chosen for pair in pairs]))
        return model(index + 1)

    def prompts_of(_, length):
        return [Prompts(f"s{length}-{n}", f"l{length}-{n}") for n in range(2)]

    return longpo.rounds(
        model(0), LENGTHS, prompts_of=prompts_of, train=train, max_new_tokens=3, batch=2, name="m",
        rows=list(rows), record=rows.append,
    )  # fmt: skip


def test_every_round_answers_with_the_model_of_the_round_before_it():
    asked, trained = [], []
    models = list(steps(asked, trained, []))
    assert trained == [(0, ["0", "0"]), (1, ["1", "1"])]
    assert [model.answer("s") for model in models] == ["1", "2"]


@pytest.mark.parametrize("die", range(8))
def test_rounds_that_were_killed_go_on_with_the_answers_that_are_missing(die):
    asked, trained, rows = [], [], []
    with pytest.raises(Killed):
        list(steps(asked, trained, rows, die=die))
    kept = list(asked)
    trained.clear()
    models = list(steps(asked, trained, rows))
    assert len(models) == 2
    assert trained == [(0, ["0", "0"]), (1, ["1", "1"])]
    assert len(asked) == len(set(asked)) == len(rows) == 8
    assert asked[: len(kept)] == kept


def test_lengths_that_do_not_rise_are_refused_and_a_round_without_pairs_changes_nothing():
    model = Scripted(lambda prompt: "same")
    refused = longpo.rounds(
        model,
        (8, 8),
        prompts_of=lambda *_: [],
        train=lambda *_: model,
        max_new_tokens=1,
        batch=1,
        name="",
    )
    with pytest.raises(InputError, match=r"the rounds' lengths are \(8, 8\); give lengths that ri"):
        next(refused)
    kept = longpo.rounds(
        model, (8,), prompts_of=lambda *_: [Prompts("s", "l")], train=lambda *_: None,
        max_new_tokens=1, batch=1, name="",
    )  # fmt: skip
    assert list(kept) == [model]
