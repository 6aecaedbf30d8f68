"""`microtron eval`: what lm-evaluation-harness says of the exported folder, we say of the step.

One small model is trained and exported; the harness's own transformers model and our
adapter then answer the same requests: tasks of our own writing, on local files.
"""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from questions import write_questions
from runs import SMALL, assert_one_line, run

from microtron import checkpoints
from microtron.cli import main
from microtron.data.tokenizers import ByteTokenizer
from microtron.errors import UserError
from microtron.evals import choice, harness
from microtron.evals.asked import Asked, lengths
from microtron.hf.config import from_config, to_config
from microtron.hf.to_hf import describe, export
from microtron.infer.load import Loaded, load
from microtron.model.args import ModelArgs

LLAMA = {
    "hidden_dim": 64,
    "num_experts": 0,
    "activation": "swiglu",
    "sinks": False,
    "window_pattern": "L",
    "attention_bias": False,
    "mlp_bias": False,
}
LENGTH = 96  # tokens the model sees at once: some contexts are longer
TASKS = {
    "mini_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "mini_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "mini_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "mini_said": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["e 1", "f\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {
        "question": f"line {n} of text {n % 5} says" + " and line of text" * n + f" {n}",
        "choices": ["a", "b", "line 3 of text", f"{n} says " * 3][: 2 + n % 3],
        "answer": n % 2,
        "word": ["bb", "line 7 of text 1"][n % 2],
    }
    for n in (0, 1, 2, 7, 3, 40, 5)
] + [{"question": "Größe: ", "choices": ["é", "ü 3"], "answer": 0, "word": "12 cm"}]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The harness without what takes it seconds: a report of the machine, and its 14,000 tasks."""
    from lm_eval import evaluator, tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda found: None)
        short = functools.partial(tasks.TaskManager, include_defaults=False)
        patch.setattr(
            tasks, "TaskManager", lambda include_path=None, **kw: short(None, include_path)
        )
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def step(tiny_corpus, folder):
    """A small model that has learned some of its corpus, bytes of short lines."""
    options = [
        *SMALL,
        "--model.args.dim=32",
        f"--data.dirs={tiny_corpus}",
        f"--training.seq_len={LENGTH}",
        "--training.local_batch_size=16",
        "--training.steps=60",
        "--validation.enable",
        f"--validation.val_tokens={10 * LENGTH}",
    ]
    return run(options, folder).step(60)


@pytest.fixture(scope="module")
def tasks(folder):
    """A folder of YAML tasks."""
    path = folder / "tasks"
    path.mkdir()
    data = path / "documents.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    for name, task in TASKS.items():
        where = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        shared = {"task": name, "dataset_path": "json", "test_split": "test"}
        (path / f"{name}.yaml").write_text(
            yaml.safe_dump({**shared, "dataset_kwargs": where, **task})
        )
    return path


@pytest.fixture(scope="module")
def answers(folder, step, tasks):
    """(ours, theirs): the harness's results with all samples, of one call each."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    export(step, folder / "exported", check=False)
    asked = Asked(load(step), None, batch_size=5)
    ours = harness.as_lm(asked.answers())
    theirs = HFLM(str(folder / "exported"), dtype="float32", device="cpu", batch_size=3)
    manager = harness.task_manager(list(TASKS), tasks)
    return [
        simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
        for lm in (ours, theirs)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_the_harness_finds_the_same_numbers(answers, task):
    ours, theirs = (found["results"][task] for found in answers)
    compared = 0
    for key, value in theirs.items():
        if isinstance(value, float) and "stderr" not in key:
            of = math.log if "perplexity" in key else float
            assert of(ours[key]) == pytest.approx(of(value), rel=1e-6, abs=1e-6), key
            compared += 1
    assert compared == len(TASKS[task]["metric_list"])


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_the_same(answers, task):
    ours, theirs = ([s["resps"] for s in found["samples"][task]] for found in answers)
    assert len(ours) == len(DOCUMENTS)
    assert len(set(map(str, theirs))) >= (3 if task == "mini_said" else len(DOCUMENTS)), theirs
    for document, expected in zip(ours, theirs, strict=True):
        for (mine,), (wanted,) in zip(document, expected, strict=True):
            if isinstance(wanted, str):
                assert mine == wanted
            elif isinstance(wanted, tuple):
                assert mine[0] == pytest.approx(wanted[0], abs=1e-4) and mine[1] == wanted[1]
            else:
                assert mine == pytest.approx(wanted, rel=1e-6, abs=1e-4)


def evaluated(capsys, *argv):
    """(exit code, stdout, stderr) of `microtron eval`."""
    code = main(["eval", *map(str, argv)])
    return code, *capsys.readouterr()


def test_step_and_export_score_alike(answers, folder, step, tasks, capsys):
    """All three kinds of figures at once, of the run's newest step and of the exported folder."""
    questions = write_questions(folder / "q.jsonl", 6)
    text = folder / "text.txt"
    text.write_text("line 3 of text 2 says ddd\n" * 9)
    asked = ["--tasks", "mini_choice,mini_text", "--include-path", tasks, "--limit", 5]
    asked += ["--hellaswag", questions, "--bpb", text, "--batch-size", 7]
    found = []
    for checkpoint in (step.parents[1], folder / "exported"):
        code, out, _ = evaluated(capsys, checkpoint, *asked, "--out", folder / "out.json")
        assert code == 0 and "GPT-2 1558M" in out and checkpoint.name in out
        found.append(json.loads((folder / "out.json").read_text()))
    mine, theirs = found
    assert mine["step"] == 60 and mine["trained_tokens"] == 60 * 16 * LENGTH
    assert mine["settings"]["max_length"] == theirs["settings"]["max_length"] == LENGTH
    assert {"microtron", "torch", "lm_eval", "python"} <= mine["versions"].keys()
    assert [(s["task"], s["metric"]) for s in mine["scores"]] == [
        ("mini_choice", "acc"),
        ("mini_choice", "acc_norm"),
        ("mini_text", "bits_per_byte"),
        ("mini_text", "word_perplexity"),
        ("hellaswag file", "acc"),
        ("hellaswag file", "acc_norm"),
        (str(text), "bits_per_byte"),
        (str(text), "loss"),
    ]
    assert [s["examples"] for s in mine["scores"][:6]] == [5] * 6
    for a, b in zip(mine["scores"], theirs["scores"], strict=True):
        assert a == b | {"value": pytest.approx(b["value"], rel=1e-5)}
    bits = {s["metric"]: s["value"] for s in mine["scores"][6:]}
    assert bits["bits_per_byte"] == pytest.approx(bits["loss"] / math.log(2)) and bits["loss"] < 3


def test_bits_per_byte_are_those_of_validation(step, tiny_corpus):
    """Windows that do not overlap, over the text of the validation split, one document."""
    (entry,) = map(json.loads, _lines_with(step.parents[1] / "metrics.jsonl", "val_bpb"))
    (shard,) = tiny_corpus.glob("*val*.bin")
    ids = np.fromfile(shard, np.uint16)[512:]  # behind the header, the separator first
    assert entry["val_tokens"] == 10 * LENGTH and ids[0] == 256
    text = bytes(ids[1 : 1 + 10 * LENGTH].astype(np.uint8)).decode()
    bits, loss = Asked(load(step), None, 4, stride=LENGTH).bpb("text", text)
    assert bits["value"] == pytest.approx(entry["val_bpb"], rel=1e-5)
    assert loss["value"] == pytest.approx(entry["val_loss"], rel=1e-5)


def _lines_with(path, key):
    return [line for line in path.read_text().splitlines() if key in line]


def test_our_hellaswag_is_the_harness_s(folder, step, tasks):
    """The harness's own task, its data replaced by a local file."""
    from lm_eval.evaluator import simple_evaluate

    questions = write_questions(folder / "both.jsonl", 12)
    choices = yaml.safe_load((tasks / "mini_choice.yaml").read_text())
    choices |= {"task": "local", "doc_to_text": "{{query}}", "doc_to_target": "{{label}}"}
    choices |= {"doc_to_choice": "choices"}
    choices["dataset_kwargs"]["data_files"] = {"test": str(questions)}
    own = folder / "own"
    own.mkdir()
    (own / "preparing.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    function = "process_docs: !function preparing.process_docs\n"
    (own / "local.yaml").write_text(yaml.safe_dump(choices) + function)
    asked = Asked(load(step), None, batch_size=16)
    found = simple_evaluate(
        harness.as_lm(asked.answers()),
        tasks=["local"],
        task_manager=harness.task_manager(["local"], own),
        bootstrap_iters=2,
    )
    theirs = found["results"]["local"]
    ours = {s["metric"]: s for s in asked.hellaswag(choice.read(questions))}
    for metric in ("acc", "acc_norm"):
        assert ours[metric]["value"] == pytest.approx(theirs[f"{metric},none"])
        assert ours[metric]["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"])
    assert 0 < ours["acc"]["value"] < 1


def test_sampled_answers_repeat(step):
    asked = Asked(load(step), None, batch_size=2)
    lm = harness.as_lm(asked.answers())
    hot = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    greedy = {"until": ["zzz"], "max_gen_toks": 8}
    found = lm.generate_until([Request((f"line {i}", o)) for o in (hot, greedy) for i in (1, 2, 1)])
    assert found == lm.generate_until(
        [Request((f"line {i}", o)) for o in (hot, greedy) for i in (1, 2, 1)]
    )
    assert found[3] == found[5] and found[0] != found[2]  # each row draws for itself
    with pytest.raises(UserError, match="wants 96 new tokens.*sees 96"):
        lm.generate_until([Request(("a", {"max_gen_toks": 96}))])


def test_generation_fits_and_ends_with_its_stop_string(step, monkeypatch):
    asked = Asked(load(step), None, batch_size=2)
    generate, seen = asked.scorer.engine.generate, []

    def spying(rows, params, on_token):
        new = generate(rows, params, on_token)
        seen.extend(zip(rows, params, new, strict=True))
        return new

    monkeypatch.setattr(asked.scorer.engine, "generate", spying)
    options = {"until": "e", "max_gen_toks": 30}
    texts = ["line 3 of text " * 30, "li", "line 2 of"]
    found = harness.as_lm(asked.answers()).generate_until([Request((t, options)) for t in texts])
    whole = {len(row): row for row, _, _ in seen}
    assert sorted(whole) == [3, 10, LENGTH - 30]
    assert bytes(whole[LENGTH - 30]).decode() == texts[0][30 - LENGTH :]
    ended = [new for _, params, new in seen if len(new) < params.max_new_tokens]
    assert ended and all(new[-1] == ord("e") and new.count(ord("e")) == 1 for new in ended)
    assert not any("e" in text for text in found)


def test_a_text_that_brings_its_own_separator():
    """It gets no second one; a prefix that shows as nothing is brought by no text."""
    scorer, byte = SimpleNamespace(max_length=8), ByteTokenizer()
    answers = harness.Answers(scorer, byte, [256])
    assert answers.tok_encode("a") == answers.tok_encode("a", True) == [256, 97]
    assert answers.tok_encode("a", False) == [97]
    assert answers.tok_encode("<|endoftext|>") == list(b"<|endoftext|>")
    silent = harness.Answers(scorer, byte, [260])  # <s> of Llama, which is not eot
    silent.prefix_text = ""
    assert silent.tok_encode("a") == [260, 97] and silent.prefix_token_id == 260
    assert harness.Answers(scorer, byte, []).prefix_token_id == 256


class Request:
    """What the harness asks."""

    def __init__(self, args):
        self.args = args


@pytest.mark.parametrize(
    "argv, told",
    [
        ([], "nothing to measure: give --tasks, --hellaswag or --bpb"),
        (["--tasks", "mini_choise", "--include-path", "TASKS"], "did you mean mini_choice?"),
        (["--tasks", "x", "--include-path", "/nowhere"], "/nowhere is no folder"),
        (["--tasks", "missing_data", "--include-path", "TASKS"], "cannot be had"),
        (["--bpb", "/nowhere"], "/nowhere"),
        (["--hellaswag", "/nowhere"], "/nowhere"),
        (["--bpb", "TEXT", "--limit", "0"], "--limit 0 cannot work"),
        (["--bpb", "TEXT", "--num-fewshot", "-1"], "--num-fewshot -1 cannot work"),
        (["--bpb", "TEXT", "--stride", "97"], "--stride 97 is longer than the 96 tokens"),
        (["--bpb", "TEXT", "--out", "/nowhere/x.json"], "--out /nowhere/x.json"),
    ],
)
def test_refused_in_one_line(argv, told, folder, step, tasks, capsys):
    missing = yaml.safe_load((tasks / "mini_text.yaml").read_text())
    missing |= {"task": "missing_data"}
    missing["dataset_kwargs"]["data_files"] = {"test": str(folder / "none.jsonl")}
    (tasks / "missing_data.yaml").write_text(yaml.safe_dump(missing))
    (folder / "t.txt").write_text("some words")
    places = {"TASKS": tasks, "TEXT": folder / "t.txt"}
    code, out, err = evaluated(capsys, step, *(places.get(a, a) for a in argv))
    assert code == 1 and out == ""
    assert_one_line(err.splitlines(keepends=True)[-1], told)


def test_without_the_harness(step, tasks, capsys, monkeypatch):
    monkeypatch.setattr(harness, "installed", lambda package: package != "lm_eval")
    code, _, err = evaluated(capsys, step, "--tasks", "mini_text", "--include-path", tasks)
    assert code == 1
    assert_one_line(err, "pip install lm-eval", "--bpb work without it")


@pytest.mark.parametrize(
    "options, trained, exported",
    [
        ({}, 96, 96),
        ({"rope_factor": 4.0, "rope_original_len": 32}, 96, 128),
        ({"rope_factor": 2.0, "rope_original_len": 32}, 96, 64),
        (LLAMA | {"rope_factor": 4.0, "rope_scaling": "llama3", "rope_original_len": 32}, 96, 128),
        (LLAMA | {"rope_factor": 2.0, "rope_scaling": "llama3", "rope_original_len": 32}, 96, 96),
    ],
)
def test_lengths_are_those_of_the_export(options, trained, exported, tmp_path, monkeypatch):
    args = ModelArgs(**options, rope_beta_fast=4.0)
    facts = {"step": 1, "tokens": 1, "seq_len": LENGTH}
    checkpoints.write_identity(tmp_path, args, None, facts)
    loaded = Loaded(None, args, ByteTokenizer(), [], (), LENGTH, tmp_path, "dcp")
    assert lengths(loaded) == (trained, exported)

    def blind(model, length, size):
        return SimpleNamespace(max_length=length)

    monkeypatch.setattr("microtron.evals.asked.Scorer", blind)
    for_tasks, for_texts = Asked(loaded, None, 4).scorer.max_length, Asked(loaded, None, 4).window
    assert (for_tasks, for_texts) == (exported, min(trained, exported))
    assert Asked(loaded, 50, 4).scorer.max_length == Asked(loaded, 50, 4).window == 50
    parts = [SimpleNamespace(dtype=torch.float32)]
    described = describe(args, None, checkpoints.identity(tmp_path), parts)
    config = to_config(args, max_positions=described["length"])
    longest = config["max_position_embeddings"]
    again = Loaded(None, from_config(config), None, [], (), longest, tmp_path, "hf")
    assert lengths(again)[1] == exported == longest


def test_a_table_of_positions_is_the_length(tmp_path):
    args = SimpleNamespace(positions="learned", max_positions=48, rope_factor=1.0)
    loaded = SimpleNamespace(args=args, path=tmp_path, need_tokenizer=ByteTokenizer)
    loaded.prefix_ids, loaded.stop_ids = [], ()
    assert lengths(loaded) == (48, 48)
    with pytest.raises(UserError, match="--max-length 49.*48 positions"):
        Asked(loaded, 49, 4)


def test_strides_are_checked_before_anything_is_computed(step):
    with pytest.raises(UserError, match="--stride 9 is longer than the 8 tokens"):
        Asked(load(step), 8, 4, stride=9)
