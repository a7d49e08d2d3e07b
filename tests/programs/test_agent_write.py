"""AgentWrite on a scripted model: the plan's form, its paragraphs in order, and going on."""

import re

import pytest

from lminf.errors import InputError
from lminf.lm.scripted import Scripted
from lminf.programs.agent_write import AgentWrite, Paragraph, parse_plan, plan_text
from lminf.programs.recorded import Recorded

REQUEST = "Write a guide of 900 words about bees."
PLANNED = [Paragraph("what bees eat", 300), Paragraph("where bees live - and why", 400),
           Paragraph("who keeps them", 200)]  # fmt: skip
TEXTS = ["Bees eat honey.", "Bees live in hives.", "Beekeepers keep them."]


class Killed(Exception):
    pass


def script(prompt, asked=None):
    """Plans, and writes the paragraph that the prompt ends with."""
    if asked is not None:
        asked.append(prompt)
    if prompt.startswith("Plan"):
        return f"Here it is:\n\n{plan_text(PLANNED)}\n"
    last = prompt[prompt.index("Go on with") :]
    return f" {TEXTS[int(re.search(r'Paragraph ([0-9]+) -', last)[1]) - 1]}\n"


def test_a_plan_is_read_as_it_is_written():
    assert parse_plan(plan_text(PLANNED)) == PLANNED
    assert parse_plan("A plan.\n\nParagraph 1 - Main Point: x - Word Count: 250 words\n") == [
        Paragraph("x", 250)
    ]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("I cannot plan.", "the plan has no paragraphs, and 1 to 50 can be written"),
        (
            "Paragraph 1 - Word Count: 300",
            r"has the line 'Paragraph 1 - Word .* where 'Paragraph 1",
        ),
        ("Paragraph 1 - Main Point: x - Word Count: many", "where 'Paragraph 1 - Main Point"),
        ("Paragraph 1 - Main Point: x - Word Count: 0", "where 'Paragraph 1 - Main Point"),
        (plan_text(PLANNED).replace("Paragraph 2", "Paragraph 3", 1), "where 'Paragraph 2 - "),
        (plan_text([Paragraph("x", 300)] * 51), "the plan has 51 paragraphs, and 1 to 50"),
    ],
)
def test_a_plan_in_another_form_is_refused(plan, message):
    with pytest.raises(InputError, match=message):
        parse_plan(plan)


def test_the_planned_paragraphs_are_written_in_order_and_each_sees_those_before_it():
    asked = []
    text = AgentWrite(Scripted(lambda prompt: script(prompt, asked))).write(REQUEST)
    assert text == "\n\n".join(TEXTS)
    plan, *steps = asked
    assert REQUEST in plan
    for index, prompt in enumerate(steps):
        assert REQUEST in prompt
        assert plan_text(PLANNED) in prompt
        assert "\n\n".join(TEXTS[:index]) in prompt
        assert all(later not in prompt for later in TEXTS[index:])


def test_it_answers_as_evaluations_ask():
    answers = {}
    writer = AgentWrite(Scripted(script))
    texts = writer.generate([REQUEST, REQUEST], max_new_tokens=17, on_answer=answers.__setitem__)
    cut = "\n\n".join(f" {text}"[:17].strip() for text in TEXTS)
    assert texts == [cut, cut] == list(answers.values())
    assert writer.generate([REQUEST], max_new_tokens=99, stop=("hives",)) == [
        "Bees eat honey.\n\nBees live in "
    ]


def test_a_paragraph_without_text_is_refused():
    writer = AgentWrite(
        Scripted(lambda prompt: script(prompt) if prompt.startswith("Plan") else "")
    )
    with pytest.raises(
        InputError, match="the model wrote nothing for 'Paragraph 1 - Main Point: wh"
    ):
        writer.write(REQUEST)


@pytest.mark.parametrize("killed_at", range(4))
def test_a_run_that_was_killed_goes_on_from_its_paragraphs(killed_at):
    """Every answer is asked for once, whenever the first run ends; the text is the same."""
    rows, asked = [], []

    def dies(prompt):
        if len(asked) == killed_at:
            raise Killed
        return script(prompt, asked)

    first = AgentWrite(Recorded(Scripted(dies), "scripted", rows, rows.append))
    with pytest.raises(Killed):
        first.write(REQUEST)
    assert len(rows) == killed_at
    again = Recorded(Scripted(lambda prompt: script(prompt, asked)), "scripted", rows, rows.append)
    assert AgentWrite(again).write(REQUEST) == "\n\n".join(TEXTS)
    assert len(asked) == len(set(asked)) == len(rows) == 4


def test_recorded_answers_are_those_of_one_model_and_limit():
    rows = []
    one = Recorded(Scripted(lambda prompt: "one"), "one", rows, rows.append)
    assert one.generate(["a", "b", "a"], max_new_tokens=9) == ["one"] * 3
    assert len(rows) == 2
    other = Recorded(Scripted(lambda prompt: "two"), "two", rows)
    assert other.generate(["a"], max_new_tokens=9) == ["two"]
    again = Recorded(Scripted(lambda prompt: "new"), "one", rows)
    assert again.generate(["a", "c"], max_new_tokens=9) == ["one", "new"]
    assert again.generate(["a"], max_new_tokens=2) == ["ne"]
