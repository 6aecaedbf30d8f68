"""HellaSwag while a model trains: every mesh gives the figures of one process.

The figures are shares of right answers, which could agree by luck; so the scores behind them are
printed by each run and compared one by one.
"""

import json

import pytest
from questions import write_questions
from runs import SMALL, Run, assert_one_line, run

from microtron.evals.during import batches

LAYOUTS = {  # name -> ranks, options
    "one": (1, {}),
    "dp2": (2, {"data_parallel_shard_degree": 2}),
    "tp2": (2, {"tensor_parallel_degree": 2}),
    "cp2": (2, {"context_parallel_degree": 2}),
    "pp2": (2, {"pipeline_parallel_degree": 2}),
    "ep2": (2, {"expert_parallel_degree": 2}),
}
# A few hundred logits a batch, so that there are many, the last ones with empty rows.
FEW_LOGITS = 264 * 64 * 5


def options(corpus, questions):
    return [
        *SMALL,
        "--model.args.n_kv_heads=2",
        f"--data.dirs={corpus}",
        "--training.steps=2",
        "--training.seq_len=64",
        "--training.global_batch_size=4",
        "--optimizer.eps=1e-5",
        f"--eval.hellaswag={questions}",
        "--eval.hellaswag_freq=1",
        "--eval.hellaswag_examples=7",
    ]


def keep_scores():
    """In the rank, before it trains: scores are printed as well."""
    import torch.distributed as dist

    from microtron.evals import during

    during._LOGITS = FEW_LOGITS
    accuracy = during.accuracy

    def keeping(examples, scores):
        if dist.get_rank() == 0:
            print(f"SCORES {json.dumps(scores)}", flush=True)
        return accuracy(examples, scores)

    during.accuracy = keeping


def scores_of(done):
    return [json.loads(x[7:]) for x in done.out.splitlines() if x.startswith("SCORES ")]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "q.jsonl", 9)


@pytest.fixture(scope="module")
def runs_by_name(tiny_corpus, questions, tmp_path_factory):
    found = {}
    for name, (ranks, degrees) in LAYOUTS.items():
        argv = [
            *options(tiny_corpus, questions),
            f"--training.local_batch_size={2 if name in ('dp2', 'ep2') else 4}",
            *(f"--parallelism.{k}={v}" for k, v in degrees.items()),
        ]
        folder = tmp_path_factory.mktemp(name)
        found[name] = run(argv, folder, world_size=ranks, prepare=keep_scores)
    return found


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "one"])
def test_a_mesh_scores_as_one_process(runs_by_name, name):
    truth, ours = runs_by_name["one"], runs_by_name[name]
    assert len(scores_of(truth)) == 2 and len(scores_of(truth)[0]) == 7 * 4
    for expected, actual in zip(scores_of(truth), scores_of(ours), strict=True):
        assert actual == pytest.approx(expected, rel=2e-5)
        assert max(expected) < 0 and len(set(expected)) > 20
    keys = ("hellaswag_acc", "hellaswag_acc_norm")
    for key in keys:
        assert [e[key] for e in ours.lines(key)] == [e[key] for e in truth.lines(key)]
        assert [e["step"] for e in ours.lines(key)] == [1, 2]
    assert "step 2 | HellaSwag " in ours.out and "| 7 examples in" in ours.out


def test_the_saved_step_scores_as_it_did_in_training(runs_by_name, questions, monkeypatch):
    """Cached contexts, one process, read from the disk; endings that are too long, too."""
    from microtron.evals import choice
    from microtron.evals.asked import Asked
    from microtron.infer.load import load

    trained, seen = runs_by_name["one"], []
    asked = Asked(load(trained.dump), None, batch_size=8)
    score = asked.scorer.score
    monkeypatch.setattr(asked.scorer, "score", lambda *a: seen.extend(score(*a)) or seen)
    figures = {
        found["metric"]: found["value"] for found in asked.hellaswag(choice.read(questions, 7))
    }
    assert [s.logprob for s in seen] == pytest.approx(scores_of(trained)[1], rel=2e-5)
    line = trained.lines("hellaswag_acc")[-1]
    assert figures == {"acc": line["hellaswag_acc"], "acc_norm": line["hellaswag_acc_norm"]}


def test_training_is_left_alone(runs_by_name, tiny_corpus, questions, tmp_path):
    argv = [o for o in options(tiny_corpus, questions) if "eval." not in o]
    without = run([*argv, "--training.local_batch_size=4"], tmp_path)
    assert without.losses() == runs_by_name["one"].losses()
    assert "HellaSwag" not in without.out


def test_told_before_anything_is_trained(tiny_corpus, tmp_path):
    argv = options(tiny_corpus, tmp_path / "none.jsonl")
    done = Run(argv, tmp_path / "none").wait()
    assert done.code == 1 and "step 1/" not in done.out
    assert_one_line(done.err, "none.jsonl", "No such file", "validation jsonl")
    argv = [o for o in options("x", write_questions(tmp_path / "q.jsonl")) if "data.dirs" not in o]
    done = Run([*argv, "--data.mock"], tmp_path / "mock").wait()
    assert done.code == 1 and "step 1/" not in done.out
    assert_one_line(done.err, "eval.hellaswag", "no tokenizer", "microtron prepare")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_hold_every_row_once(ranks):
    lengths = [3, 17, 64, 64, 33, 16, 5, 40, 9]
    found = batches(lengths, 8, 64, lambda length: ranks * (128 // length))
    rows = [i for batch in found for i in batch.indices]
    assert sorted(i for i in rows if i >= 0) == list(range(9))
    for batch in found:
        assert len(batch.indices) == ranks * (128 // batch.length)
        assert all(lengths[i] <= batch.length for i in batch.indices if i >= 0)
    assert {batch.length for batch in found} == {8, 16, 32, 64}
