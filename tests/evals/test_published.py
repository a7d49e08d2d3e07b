"""Readers of published files, on tiny files of their shape: what is asked, scored and refused."""

import json
import sys

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.evals import runner
from lminf.evals.runner import Cell, Subject
from lminf.evals.suites import benchmark_files, catalog, longbench
from lminf.evals.suites.infinite_bench import InfiniteBench
from lminf.evals.suites.long_icl import LongICL
from lminf.evals.suites.longbench import LongBench, LongBenchV2
from lminf.evals.suites.loogle import LooGLE
from lminf.evals.suites.needle_threading import SingleThread
from lminf.evals.task import Budget
from lminf.lm.scripted import Scripted
from tests.evals.suite_solvers import keys_asked, pairs_of

BOOK = " ".join(f"Sentence {number} of a long book." for number in range(200))


@pytest.fixture
def file_of(tmp_path):
    """Writes records as a file of that name; its path."""

    def write(name, records):
        text = (
            json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
        )
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def longbench_record(**fields):
    return {
        "input": "Who wrote it?", "context": BOOK, "answers": ["Jane Roe", "Roe"], "length": 1200,
        "dataset": "qasper", "language": "en", "all_classes": None, "_id": "0",
    } | fields  # fmt: skip


def score_of(task, completion):
    (item,) = task.instances(Budget.characters(20_000), count=1, key=(0,))
    return task.score(task.parse(completion), item)


# --- What all files share -------------------------------------------------------------------------


def test_a_context_that_is_too_long_loses_its_middle_and_is_counted(file_of):
    task = LongBench(file_of("qasper.jsonl", [longbench_record()]))
    for size in (400, 401, 3000):
        (item,) = task.instances(Budget.characters(size), count=1, key=(0,))
        assert len(item.prompt) == item.tokens == size
        assert item.prompt.startswith("Sentence 0 of")
        assert "Sentence 199 of a long book.\n\nAnswer the question" in item.prompt
        assert item.cut == len(BOOK) - sum(map(len, shared_ends(item.prompt, BOOK)))
    (whole,) = task.instances(Budget.characters(20_000), count=1, key=(0,))
    assert whole.cut == 0
    assert BOOK in whole.prompt


def shared_ends(prompt, context):
    """The beginning and the end of the context that the prompt has, of nearly one length."""
    kept = len(prompt) - len(prompt[prompt.index("\n\nAnswer") :])
    return context[: kept - kept // 2], context[len(context) - kept // 2 :]


def test_a_prompt_is_refused_where_it_may_not_be_cut(file_of):
    task = LongBench(file_of("qasper.jsonl", [longbench_record()]), too_long="refuse")
    with pytest.raises(InputError, match=r"takes \d+ characters, more than the length 400; ask"):
        task.instances(Budget.characters(400), count=1, key=(0,))


def test_the_same_questions_are_asked_at_every_length(file_of):
    path = file_of("qasper.jsonl", [longbench_record(input=f"Question {n}?") for n in range(40)])
    asked = []

    def answer(prompt):
        asked.append(prompt.split("Question: ")[1])
        return "Roe"

    cells = [Cell(LongBench(path), length, 5) for length in (500, 900)]
    subject = Subject(Scripted(answer), {})
    rows = list(runner.measure([subject], cells, budget=Budget.characters, seed=0))
    assert asked[:5] == asked[5:]
    assert len(set(asked)) == 5
    assert [row["score"] for row in rows] == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qasper.csv", "a,b", r"qasper\.csv is no \.json or \.jsonl file; give a file of Lon"),
        ("qasper.jsonl", "{", r"qasper\.jsonl is not JSON in UTF-8"),
        ("qasper.jsonl", "", r"holds no list of records, as the files of LongBench do"),
        ("qasper.jsonl", "[1]", r"record 1 of .* is list and not an object"),
        ("qasper.jsonl", '{"question": "x", "answer": "y"}',
         r"record 1 of .* has no field 'input' \(it has 'question', 'answer'\): it is not of "
         r"LongBench, or of another version of it$"),
        ("quality.jsonl", json.dumps(longbench_record()),
         r"is of the data set 'quality', which LongBench does not have; it has narrativeqa, "),
        ("qasper.jsonl", json.dumps(longbench_record(answers=[{}])),
         r"holds \[\{\}\] as 'answers', not a text or a list of texts"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_or_version_is_refused_in_a_sentence(
    name, content, message, tmp_path
):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        LongBench(str(tmp_path / name)).instances(Budget.characters(900), count=1, key=(0,))


OTHER_FILES = [
    ("infinite_bench", "passkey.jsonl", r"has no field 'context' .* not of ∞Bench, or of another"),
    ("longbench_v2", "data.json", r"has no field 'question' .* not of LongBench v2, or of another"),
    ("loogle", "longdep_qa.jsonl", r"has no field 'input' .* not of LooGLE, or of another"),
    ("needle_threading_file", "x.json", r"no field 'haystack' .* not of Needle Threading, or"),
    ("best_answer_file", "x.json", r"no field 'question' .* not of Ada-LEval, or of another"),
    ("tsort_file", "x.json", r"no field 'prompt' .* not of Ada-LEval, or of another"),
    ("long_ins_file", "x.json", r"no field 'Data' .* not of LongIns, or of another"),
    ("m4le_file", "wow.jsonl", r"no field 'instruction' .* not of M4LE, or of another"),
    ("super_gpqa", "x.jsonl", r"no field 'question' .* not of SuperGPQA, or of another"),
]


@pytest.mark.parametrize(("name", "file", "message"), OTHER_FILES)
def test_every_reader_refuses_what_is_of_another_version_in_a_sentence(
    name, file, message, file_of
):
    (task,) = catalog.parse(f"{name}:path={file_of(file, [{'x': 1}])}")
    with pytest.raises(InputError, match=message):
        task.instances(Budget.characters(900), count=1, key=(0,))


def test_a_budget_below_what_stands_around_a_context_is_refused_with_the_least(file_of):
    task = LongBench(file_of("qasper.jsonl", [longbench_record()]))
    with pytest.raises(
        InputError, match=r"no character.* ask for a length of at least (\d+)$"
    ) as no:
        task.instances(Budget.characters(10), count=1, key=(0,))
    least = int(str(no.value).split()[-1])
    assert task.instances(Budget.characters(least), count=1, key=(0,))[0].tokens == least


def test_a_file_that_is_not_there_or_has_too_few_questions_is_refused(file_of, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        LongBench(str(tmp_path / "qasper.jsonl")).questions()
    task = LongBench(file_of("qasper.jsonl", [longbench_record()]))
    with pytest.raises(InputError, match="holds 1 questions, fewer than the 2 instances asked for"):
        task.instances(Budget.characters(900), count=2, key=(0,))


def test_every_reader_takes_its_path_on_the_command_line():
    for kind in catalog.FILES:
        (task,) = catalog.parse(f"{kind.name}:path=some/file.jsonl")
        assert kind.scope in ("low", "high")
        assert task == kind("some/file.jsonl")
    with pytest.raises(InputError, match="lacks path"):
        catalog.parse("longbench")


# --- LongBench ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "right", "completion", "score"),
    [
        ("hotpotqa", ["the Eiffel Tower"], " Eiffel tower.", 1),
        ("multifieldqa_zh", ["北京"], "北京。", 1),
        ("gov_report", ["one two three four"], "one two five four", 0.75),
        ("dureader", ["北京"], "京北", 0.5),
        ("trec", ["City"], "City\nQuestion: more", 1),
        ("trec", ["City"], "\nCity or Country", 0.5),
        ("samsum", ["one two"], "one two\nthree four", 1),
        ("passage_count", ["7"], "7", 1),
        ("passage_retrieval_en", ["Paragraph 12"], " 12", 1),
        ("passage_retrieval_zh", ["段落12"], "段落12 or 13", 0.5),
        ("lcc", ["return x + 1"], "# next\nreturn y + 1\nmore", 0.92),
        ("repobench-p", ["x = 1"], "x = 1", 1),
        ("qasper", ["no such words", "Roe"], "Roe", 1),
    ],
)
def test_a_data_set_of_longbench_has_the_metric_of_the_release(
    dataset, right, completion, score, file_of
):
    classes = ["City", "Country"] if dataset == "trec" else None
    record = longbench_record(answers=right, all_classes=classes)
    for ending in ("", "_e"):
        task = LongBench(file_of(f"{dataset}{ending}.jsonl", [record]))
        assert score_of(task, completion) == score


def test_longbench_has_its_21_data_sets():
    assert len(longbench.DATASETS) == 21
    assert {kind.metric for kind in longbench.DATASETS.values()} == set(longbench.METRICS)


def test_the_prompts_of_the_release_can_be_given(file_of):
    path = file_of("qasper.jsonl", [longbench_record()])
    prompts = file_of("dataset2prompt.json", {"qasper": "Article: {context}\nQ: {input}\nA:"})
    (item,) = LongBench(path, prompts=prompts).instances(Budget.characters(9000), count=1, key=(0,))
    assert item.prompt == f"Article: {BOOK}\nQ: Who wrote it?\nA:"
    for content in ({"trec": ""}, {"qasper": "no place for it"}):
        bad = file_of("bad.json", content)
        with pytest.raises(InputError, match=r"has no prompt for qasper|in .*bad\.json has no"):
            LongBench(path, prompts=bad).questions()


def test_version_2_is_scored_by_letter(file_of):
    record = {"_id": "0", "domain": "d", "sub_domain": "s", "difficulty": "hard", "length": "long",
              "question": "Which?", **{f"choice_{x}": f"option {x}" for x in "ABCD"},
              "answer": "C", "context": BOOK}  # fmt: skip
    task = LongBenchV2(file_of("data.json", [record]))
    (item,) = task.instances(Budget.characters(20_000), count=1, key=(0,))
    assert "\n(C) option C\n" in item.prompt
    assert score_of(task, "C) option C") == 1
    assert score_of(task, "The correct answer is (A)") == 0
    likeliest = LongBenchV2(task.path, answers="likeliest")
    assert "".join(likeliest.choices(item)) == "ABCD"
    assert task.choices(item) == ()
    with pytest.raises(InputError, match="another version"):
        LongBench(file_of("qasper.json", [record])).questions()


# --- The others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "options", "completion", "score"),
    [
        ("passkey", ["71432"], [], " 71432.", 1),
        ("kv_retrieval", ["a1-b2"], [], '"a1-b2"', 1),
        ("longbook_choice_eng", ["a house"], ["a tree", "a house", "x", "y"], "B", 1),
        ("longbook_choice_eng", ["a house", "B"], ["a tree", "a house", "x", "y"], "A", 0),
        ("code_debug", ["f2"], ["f1", "f2", "f3", "f4"], "B", 1),
        ("longbook_qa_eng", ["Jane Roe", "Roe"], [], "Roe", 1),
        ("longbook_qa_chn", ["北京"], [], "北京", 1),
        ("longdialogue_qa_eng", ["MARY"], [], "It is Mary.", 1),
        ("longbook_sum_eng", ["one two"], [], "one three", 0.5),
        ("math_find", [7], [], "7.0", 1),
        ("math_calc", [3, 5, 9, 1], [], "[3, 5, 8, 1]", 0.5),
        ("code_run", ["-12"], [], "The result is: -12", 1),
        ("number_string", "123", [], "124", 0),
    ],
)
def test_a_task_of_infinite_bench_has_its_score(name, answer, options, completion, score, file_of):
    record = {"id": 0, "context": BOOK, "input": "Which?", "answer": answer, "options": options}
    assert score_of(InfiniteBench(file_of(f"{name}.jsonl", [record])), completion) == score


def test_a_task_that_infinite_bench_does_not_have_is_refused_in_a_sentence(file_of):
    record = {"context": BOOK, "input": "Which?", "answer": "x", "options": []}
    with pytest.raises(InputError, match="data set 'nothing', which ∞Bench does not have; it has"):
        InfiniteBench(file_of("nothing.jsonl", [record])).questions()


def test_loogle_has_questions_as_text_or_list_and_summaries(file_of):
    pairs = [{"Q": "Who?", "A": "Jane Roe", "S": ["x"]}, {"Q": "When?", "A": 1999, "S": []}]
    record = {"input": BOOK, "title": "T", "qa_pairs": str(pairs), "output": "none"}
    for written in (str(pairs), pairs):
        task = LooGLE(file_of("longdep_qa.jsonl", [{**record, "qa_pairs": written}]))
        assert [q.answer for q in task.questions()] == ["Jane Roe", "1999"]
    summary = LooGLE(file_of("sum.jsonl", [{**record, "qa_pairs": "none", "output": "one two"}]))
    assert score_of(summary, "one two") == 1
    bad = LooGLE(file_of("bad.jsonl", [{**record, "qa_pairs": "[{'question': 1}]"}]))
    with pytest.raises(InputError, match="qa_pairs that are no list of Q and A"):
        bad.questions()


HIDDEN = {"<mask-0>": "Jane Roe", "<mask-1>": "Lima"}


@pytest.mark.parametrize(
    ("completion", "exact", "partial"),
    [
        (json.dumps(HIDDEN), 1, 1),
        ("The masks: {'<mask-1>': 'Lima', '<mask-0>': 'Jane'}. {}", 0.5, 1),
        ('{"<mask-0>": "Lima", "<mask-2>": "Jane Roe"}', 0, 0),
        ("Jane Roe, Lima", 0, 0),
        ("{'<mask-0>': __import__('os')} {\"<mask-0>\": \"Jane Roe\"}", 0.5, 0.5),
    ],
)
def test_a_cloze_of_loogle_is_scored_by_its_masks(completion, exact, partial, file_of):
    pairs = [{"Q": "<mask-0> went to <mask-1>.", "A": HIDDEN, "S": []}]
    record = {"input": BOOK, "title": "T", "qa_pairs": str(pairs), "output": "none"}
    path = file_of("shortdep_cloze.jsonl", [record])
    assert score_of(LooGLE(path), completion) == exact
    assert score_of(LooGLE(path, match="partial"), completion) == partial


@pytest.mark.parametrize("answer", [[2, 4, 1, 3], "[2, 4, 1, 3]"])
def test_tsort_is_read_with_its_prompts_and_never_cut(answer, file_of):
    record = {"book_id": 1, "para_offset": [3, 9], "prompt": BOOK, "answer": answer}
    task = benchmark_files.TSortFile(file_of("textsort_2k.json", [record]))
    (item,) = task.instances(Budget.characters(20_000), count=1, key=(0,))
    assert item.prompt == BOOK
    assert score_of(task, "Answer: [2, 4, 1, 3]") == 1
    assert score_of(task, "[1, 2, 3, 4]") == 0
    assert task.rates(["[1, 2, 3, 4]", "?"], [item, item]) == {"instruction_following_rate": 0.5}
    with pytest.raises(InputError, match=r"takes \d+ characters, more than the length 500"):
        task.instances(Budget.characters(500), count=1, key=(0,))
    with pytest.raises(InputError, match="which is no order of four"):
        benchmark_files.TSortFile(file_of("bad.json", [{**record, "answer": [1, 2]}])).questions()


def test_needle_threading_is_read_with_the_end_of_a_thread_as_the_answer(file_of):
    (item,) = SingleThread(4).instances(Budget.characters(3000), count=1, key=(0,))
    table = dict(pairs_of(item.prompt))
    keys = [keys_asked(item.prompt)[0]]
    while table[keys[-1]] in table:
        keys.append(table[keys[-1]])
    record = {"id": 1, "haystack": json.dumps(table), "keys": str(keys),
              "values": str([table[key] for key in keys]), "question": "Which? ",
              "thread_length": 4}  # fmt: skip
    task = benchmark_files.NeedleThreadingFile(file_of("Single_Thread.json", [record]))
    assert [q.answer for q in task.questions()] == [item.answer]
    assert score_of(task, item.answer[0]) == 1
    assert score_of(task, keys[1]) == 0


def test_best_answer_is_read_with_its_label(file_of):
    answers = [f"answer {n}" for n in range(12)]
    record = {"question_id": 1, "question": "How?", "answer": "A12", "all_answers": answers,
              "tags": ["x"]}  # fmt: skip
    task = benchmark_files.BestAnswerFile(file_of("stackselect_1k.json", [record]))
    assert score_of(task, "A12") == 1
    assert score_of(task, "A1") == 0
    (item,) = task.instances(Budget.characters(20_000), count=1, key=(0,))
    assert task.rates(["A3", "A13"], [item, item]) == {"instruction_following_rate": 0.5}


def test_long_ins_is_read_with_numbers_in_brackets(file_of):
    records = {"task1": {"Lenth": 9, "task_prompt": "Add.", "Data": "[0:1 + 1 Answer: 3]",
                         "error": [0, 2], "true_list": [1]}}  # fmt: skip
    task = benchmark_files.LongInsFile(file_of("256.json", records))
    assert score_of(task, "There are 5: [0, 2]") == 1
    assert score_of(task, "[0]") == pytest.approx(2 / 3)
    assert score_of(task, "0, 2") == 0


@pytest.mark.parametrize(
    ("name", "right", "completion", "score"),
    [
        ("nq-open", ["Roe"], "It was Jane Roe", 1),
        ("nq-open", ["Roe"], "It was Jane. Or Roe", 0),
        ("dureader", ["北京"], "在北京。不是上海", 1),
        ("wow", ["Article 3"], "article 3, article 4", 1),
        ("wow", ["Article 4"], "article 3, article 4", 0),
        ("bigpatent_global_cls", ["Physics"], "Label: Physics", 0),
        ("wikitext-103", ["Paragraph 3."], "paragraph 3", 1),
        ("marc", ["review 1, review 3."], "review 3, review 4.", 0.5),
        ("arxiv", ["one two three four"], "one two", 0.5),
    ],
)
def test_m4le_is_read_with_its_own_prompts(name, right, completion, score, file_of):
    record = {"instruction": "Do it.", "input": BOOK, "answers": right, "input_length": 9,
              "total_length": 10, "length_bucket": 1000}  # fmt: skip
    task = benchmark_files.M4LEFile(file_of(f"{name}.jsonl", [record]), bucket=1000)
    assert score_of(task, completion) == score
    with pytest.raises(InputError, match="no instance of the bucket 2000"):
        benchmark_files.M4LEFile(task.path, bucket=2000).questions()
    with pytest.raises(InputError, match="which M4LE as it is scored here does not have"):
        benchmark_files.M4LEFile(file_of("lcsts.jsonl", [record])).questions()


@pytest.mark.parametrize(
    ("kind", "name", "record", "message"),
    [
        (benchmark_files.M4LEFile, "wow.jsonl",
         {"instruction": "", "input": 5, "answers": "x", "length_bucket": 1},
         "question 1 of .* has int for a text; a field is of another type"),
        (benchmark_files.LongInsFile, "256.json", {"Data": "x", "error": 7},
         "could not be read as a file of long_ins_file .*not iterable.*; a field is of another"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_refused_in_a_sentence(kind, name, record, message, file_of):
    task = kind(file_of(name, [record]))
    with pytest.raises(InputError, match=message):
        task.instances(Budget.characters(20_000), count=1, key=(0,))


TRANSLATION = {"instruction": "Translate.", "input": BOOK, "answers": ["the cat sat on the mat"],
               "input_length": 9, "total_length": 10, "length_bucket": 1000}  # fmt: skip


def test_translations_are_refused_before_anything_is_asked_where_bleu_is_missing(
    file_of, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    task = benchmark_files.M4LEFile(file_of("tedtalks-zh2en.jsonl", [TRANSLATION]))
    with pytest.raises(InputError, match=r"sacrebleu, which is not installed; .*'lminf\[transl"):
        task.instances(Budget.characters(20_000), count=1, key=(0,))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "right", "completion", "precisions", "brevity"),
    [  # of 1 to 4 in a row; none in common is half of one, Chen and Cherry 2014 (method 3)
        ("tedtalks-zh2en", "the cat sat on the mat", "the cat is on the mat",
         (5 / 6, 3 / 5, 1 / 4, 1 / (2 * 3)), 1),
        ("open-subtitles-en2zh", "我爱北京天安门", "我爱北京", (1, 1, 1, 1), np.exp(1 - 7 / 4)),
        ("news-commentary-zh2en", "a\nb c d", "a\nb c d", (1, 1, 1, 1), 1),
        ("tedtalks-en2zh", "我爱北京", "", (0, 0, 0, 0), 0),
    ],
)  # fmt: skip
def test_translations_are_scored_by_bleu(name, right, completion, precisions, brevity, file_of):
    """Papineni et al. 2002: the geometric mean of the precisions, times the brevity penalty."""
    task = benchmark_files.M4LEFile(file_of(f"{name}.jsonl", [{**TRANSLATION, "answers": right}]))
    assert task.stop == ()  # they may have several lines
    expected = float(np.prod(precisions)) ** (1 / 4) * brevity
    assert score_of(task, completion) == pytest.approx(expected)


def test_super_gpqa_has_up_to_ten_options_and_disciplines(file_of):
    record = {"uuid": "0", "question": "Which?", "options": [f"o{n}" for n in range(10)],
              "answer": "o9", "answer_letter": "J", "discipline": "Law", "field": "f",
              "subfield": "s", "difficulty": "easy", "is_calculation": False}  # fmt: skip
    task = benchmark_files.SuperGPQA(file_of("all.jsonl", [record]), discipline="Law")
    assert score_of(task, "The answer is J.") == 1
    assert score_of(task, "A") == 0
    with pytest.raises(InputError, match='has no discipline "Art"; it has Law'):
        benchmark_files.SuperGPQA(task.path, discipline="Art").questions()


def test_an_answer_that_is_none_of_the_options_is_refused(file_of):
    options = {f"choice_{letter}": letter.lower() for letter in "ABCD"}
    record = {"question": "Which?", "context": "Text.", "answer": "E", **options}
    message = "holds 'E' as 'answer', which is none of the options A, B, C, D; it is damaged"
    with pytest.raises(InputError, match=message):
        longbench.LongBenchV2(file_of("v2.json", [record])).questions()
    record = {"question": "Which?", "options": ["a", "b"], "answer_letter": "C", "discipline": "x"}
    with pytest.raises(InputError, match="holds 'C' as 'answer_letter', which is none of the"):
        benchmark_files.SuperGPQA(file_of("all.jsonl", [record])).questions()


def test_long_icl_shows_rounds_of_all_labels_or_groups_of_them(file_of):
    shots = [{"text": f"text {n}", "label": n % 3} for n in range(9)]
    path, examples = file_of("test.json", [{"text": "new", "label": 1}]), file_of("s.json", shots)

    def labels(task):
        (item,) = task.instances(Budget.characters(900), count=1, key=(0,))
        return "".join(line[-1] for line in item.prompt.split("\n") if line.startswith("Label: "))

    assert labels(LongICL(path, shots=examples, rounds=2)) == "012012"
    assert labels(LongICL(path, shots=examples, rounds=2, order="grouped")) == "001122"
    assert score_of(LongICL(path, shots=examples), " 1.") == 1
    assert score_of(LongICL(path, shots=examples), " 2") == 0
    relation = {"sentence": "He left.", "subject_entity": "He", "object_entity": "it",
                "relation": "per:title"}  # fmt: skip
    task = LongICL(file_of("tacred.json", [relation]), shots=file_of("t.json", [relation]))
    assert (
        "Text: He left.\nSubject: He; object: it\nLabel: per:title" in task.questions()[0].context
    )
    with pytest.raises(InputError, match="give it with shots=FILE"):
        LongICL(path).questions()
    with pytest.raises(InputError, match=r"neither 'text' nor 'sentence' \(it has 'x'\)"):
        LongICL(path, shots=file_of("x.json", [{"x": 1}])).questions()
    with pytest.raises(InputError, match=r"takes \d+ characters, more than the length 99"):
        LongICL(path, shots=examples).instances(Budget.characters(99), count=1, key=(0,))
