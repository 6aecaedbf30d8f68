"""Multiple choice: HellaSwag's files are read and judged as lm-evaluation-harness does it."""

import json
import math
import statistics

import pytest
from questions import write_questions

from microtron.data.tokenizers import ByteTokenizer
from microtron.errors import UserError
from microtron.evals.choice import Example, accuracy, pair, question, read, shortened

TOKENIZER = ByteTokenizer()


class Documents(list):
    """What the harness's function wants of a dataset."""

    def map(self, function):
        return Documents(document | function(document) for document in self)


def test_texts_are_those_of_the_harness(tmp_path):
    from lm_eval.tasks.hellaswag import utils

    path = write_questions(tmp_path / "q.jsonl", 12)
    theirs = utils.process_docs(Documents(map(json.loads, path.read_text().splitlines())))
    ours = read(path)
    assert [e.context for e in ours] == [d["query"] for d in theirs]
    assert [list(e.endings) for e in ours] == [d["choices"] for d in theirs]
    assert [e.answer for e in ours] == [d["gold"] for d in theirs]
    assert all("[" not in e.context for e in ours) and len({e.answer for e in ours}) == 4
    assert read(path, 5) == ours[:5]


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "is no JSON object"),
        ("[1]", "is no JSON object"),
        ('{"ctx_a": "x"}', "lacks ctx_b, activity_label, endings"),
        (
            '{"ctx_a": "x", "ctx_b": "", "activity_label": "", "endings": ["a"], "label": ""}',
            "label '' names none of its 1 endings",
        ),
        (
            '{"ctx_a": "x", "ctx_b": "", "activity_label": "", "endings": ["a"], "label": "1"}',
            "label '1' names none of its 1 endings",
        ),
        (
            '{"ctx_a": "x", "ctx_b": "", "activity_label": "", "endings": [1], "label": "0"}',
            "one of its endings is no text",
        ),
    ],
)
def test_a_bad_line_is_named(line, told, tmp_path):
    path = write_questions(tmp_path / "q.jsonl", 2)
    path.write_text(path.read_text() + line + "\n")
    assert len(read(path, 2)) == 2  # not looked at
    with pytest.raises(UserError, match="line 3") as caught:
        read(path)
    assert told in str(caught.value) and "validation jsonl" in str(caught.value)


def test_a_bad_file_is_named(tmp_path):
    for name, content in {"none": None, "empty": b"\n", "binary": b"\xff\xfe\x00"}.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            read(path)
        assert "validation jsonl" in str(caught.value)


def test_the_blank_belongs_to_the_continuation():
    assert pair("ab ", "c", TOKENIZER.encode, [256]) == ([256, 97, 98], [32, 99])
    assert pair("ab", " c", TOKENIZER.encode, []) == ([97, 98], [32, 99])
    example = Example("ab", ("c", "de"), 1)
    assert question(example, TOKENIZER.encode, [256]) == [
        ([256, 97, 98], [32, 99]),
        ([256, 97, 98], [32, 100, 101]),
    ]


def test_a_merge_over_the_cut_is_cut_as_the_context_is():
    """Ids of the whole, less as many as the context has: whatever the merges do at the cut."""

    def encode(text):  # "t" and " t" are other ids than their characters
        return [len(word) for word in text.replace("ab", "X").split()]

    context, continuation = pair("q a", "b c", encode, [])
    assert (context, continuation) == ([1, 1], [1])


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 6, 9])
def test_what_is_too_long_is_cut_on_the_left(longest):
    context, continuation = shortened(([1, 2, 3, 4], [5, 6]), longest)
    # lm-evaluation-harness: (context + continuation)[-(longest + 1):][:-1] is looked at
    seen = [1, 2, 3, 4, 5, 6][-(longest + 1) :]
    assert context + continuation == seen
    assert len(context) >= 1 and continuation == ([5, 6] if longest > 1 else [6])


def test_both_kinds_of_accuracy():
    examples = [Example("", ("aa", "b" * 20), 0), Example("", ("aa", "b" * 20, "c"), 1)]
    found = accuracy(examples, [-3.0, -4.0, -3.0, -4.0, -9.0])
    assert (found.acc, found.acc_norm, found.examples) == (0.5, 0.5, 2)
    found = accuracy(examples, [-3.0, -40.0, -3.0, -4.0, -9.0])
    assert (found.acc, found.acc_norm) == (0.5, 1.0)
    many = accuracy([examples[0]] * 8, [-3.0, -4.0] * 5 + [-4.0, -3.0] * 3)
    right = [1.0] * 5 + [0.0] * 3
    assert many.acc == 0.625
    assert many.stderr(many.acc) == pytest.approx(statistics.stdev(right) / math.sqrt(8))
