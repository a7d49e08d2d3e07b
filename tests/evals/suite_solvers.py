"""What solves the tasks of the suites by reading their prompts, and what answers by chance.

Each solver is written from the sentence that the task puts to a model, and not from its generator.
"""

import json
import re
from collections import Counter
from itertools import permutations

PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")


def lines_between(prompt, start, end):
    """The lines after the one that ends in `start`, up to the one that begins with `end`."""
    return prompt.split(start, 1)[1].rsplit(end, 1)[0].strip().split("\n")


# --- Needle Threading -----------------------------------------------------------------------------


def pairs_of(prompt):
    """The pairs of the object, in order; keys may repeat."""
    return json.loads(prompt.split("\n")[1], object_pairs_hook=list)


def keys_asked(prompt):
    return re.findall(r'"([^"]+)"', next(x for x in prompt.split("\n") if x.startswith("Key")))


def looked_up(prompt):
    table = dict(pairs_of(prompt))
    return ", ".join(table[key] for key in keys_asked(prompt))


def conditional(prompt):
    (character,) = re.search(r"contain the character (.)\.", prompt).groups()
    return ", ".join(value for key, value in pairs_of(prompt) if character in key)


def followed(prompt):
    table = dict(pairs_of(prompt))
    ends = []
    for key in keys_asked(prompt):
        while key in table:
            key = table[key]
        ends.append(key)
    return ", ".join(ends)


def longest_branch(prompt):
    table = {}
    for key, value in pairs_of(prompt):
        table.setdefault(key, []).append(value)

    def longest(key):
        return max(((1 + n, end) for n, end in map(longest, table.get(key, ()))), default=(0, key))

    return longest(keys_asked(prompt)[0])[1]


# --- RULER and BABILong ---------------------------------------------------------------------------


def magic_numbers(prompt):
    body, question = prompt.rsplit("\n", 1)
    keys = re.search(r"numbers for (.*) mentioned in the text\?", question)[1].split(" and ")
    return ", ".join(
        number for key in keys for number in re.findall(rf"numbers for {key} is: (\d+)\.", body)
    )


def traced(prompt):
    (number,) = re.findall(r"assigned the value (\d+) in the text above", prompt)
    reached = {number}
    for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d+)\.", prompt):
        if value in reached:
            reached.add(name)
    return " ".join(reached - {number})


def most_common(prompt):
    words = re.findall(r"\d+\. ([a-z]+)", prompt)
    count = int(re.search(r"What are the (\d+) most", prompt)[1])
    return ", ".join(word for word, _ in Counter(words).most_common(count))


def completed(prompt):
    body, tail = prompt.split("\nSentence: ")
    before, after = tail.split("\n")[0].split("_____")
    return re.search(re.escape(before) + r"(\w+)" + re.escape(after), body)[1]


def of_the_world(prompt):
    where, holder, past = {}, {}, {}
    body, question = prompt.rsplit("\n", 1)
    facts = re.finditer(
        r"(\w+) (?:went to the (\w+)|took the (apple|football|milk|lantern))\.", body
    )
    for who, place, thing in (fact.groups() for fact in facts):
        if place in PLACES:
            where[who] = place
            for own, by in holder.items():
                if by == who:
                    past[own].append(place)
        elif thing:
            holder[thing], past[thing] = who, [where[who]]
    if before := re.match(r"Where was the (\w+) before the (\w+)\?", question):
        trail = past[before[1]]
        return trail[trail.index(before[2]) - 1]
    (asked,) = re.match(r"Where is (?:the )?(\w+)\?", question).groups()
    return past[asked][-1] if asked in past else where[asked]


# --- The others -----------------------------------------------------------------------------------


def sorter(text):
    """Of segments, by the text that they come from, whose end is followed by its beginning."""
    ring = " ".join(2 * text.split())

    def solve(prompt):
        segments = dict(re.findall(r"\[Segment (\d)\]: (.*)", prompt))
        for order in permutations("1234"):
            if " ".join(segments[number] for number in order) in ring:
                return f"[{', '.join(order)}]"
        raise AssertionError("no order of the segments is that of the text")

    return solve


def next_passage(paragraphs):
    def solve(prompt):
        asked = re.match(r"Passage: (.*)", prompt)[1]
        following = paragraphs[paragraphs.index(asked) + 1]
        labels = {passage: label for label, passage in re.findall(r"^(A\d+): (.*)$", prompt, re.M)}
        return labels[following]

    return solve


ANSWERS = {
    "Add": lambda x: str(sum(int(n) for n in x.split(" + "))),
    "Subtract": lambda x: str(int(x.split(" - ")[0]) - int(x.split(" - ")[1])),
    "Give the letter": lambda x: chr(ord(x) + 1),
    "Give the larger": lambda x: str(max(int(n) for n in x.split(", "))),
    "Say whether": lambda x: ("even", "odd")[int(x) % 2],
}


def wrong_ones(prompt):
    common = re.search(r"instruction of all questions is: (.*)", prompt)
    wrong = []
    for number, text, answer in re.findall(r"^(\d+)\. (.*) Answer: (\w+)$", prompt, re.M):
        instruction = common[1] if common else text.split(". ")[0]
        question = text if common else text.split(". ", 1)[1]
        (right,) = (f(question) for start, f in ANSWERS.items() if instruction.startswith(start))
        wrong += [number] if right != answer else []
    return ", ".join(wrong)


def labelled(prompt):
    *shots, (question, _) = re.findall(r"Sentence: (.*)\nLabel:(?: (\w+))?", prompt)
    tool = re.search(r"heard of the (\w+)\.", question)[1]
    (label,) = {label for text, label in shots if re.search(rf"\b{tool}\b", text)}
    return label


def noted(prompt):
    notes = re.findall(r"Note (\d+): \d+ (\w+) were sent to (\w+)\.", prompt)
    question = prompt.split("Question: ")[1]
    if "most notes" in question:
        return Counter(city for _, _, city in notes).most_common(1)[0][0]
    if numbers := re.findall(r"\d+", question):
        return ", ".join(city for number, _, city in notes if number in numbers)
    goods = re.search(r"were (\w+) sent", question) or re.search(r"cit\w+ were (\w+)", question)
    return ", ".join(city for _, good, city in notes if good == goods[1])


SOLVERS = {
    "single_needle": looked_up, "multi_needle": looked_up, "conditional_needle": conditional,
    "single_thread": followed, "multi_thread": followed, "branched_thread": longest_branch,
    "niah_multikey": magic_numbers, "niah_multivalue": magic_numbers,
    "niah_multiquery": magic_numbers, "variable_tracking": traced, "common_words": most_common,
    "document_qa": completed, "babilong": of_the_world, "long_ins": wrong_ones,
    "many_shot": labelled, "m4le": noted,
}  # fmt: skip
