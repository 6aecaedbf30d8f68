"""What prepare refuses or survives, in one line, and its command."""

import json
import os
import subprocess
import sys

import pytest
from test_prepare import ENV, WORK, corpus, files_of, refusal, write_corpus

from microtron.data import prepare as module
from microtron.data import prepare_report, sources, workers
from microtron.data.prepare import prepare
from microtron.data.tokenizers import CharTokenizer, load_dataset_tokenizer
from microtron.errors import UserError

# -- what goes wrong ------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_nothing_half_valid(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", corpus(400))
    options = {"source": spec, "tokenizer": "byte", "shard_tokens": 20_000}
    code = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from microtron.data.prepare import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (35_000, 35_000))\n"
        "prepare(**json.loads(sys.argv[1]), out=Path('out'), workers=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENV,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "UserError: cannot write the dataset out: File too large; free space" in last
    assert [p.name for p in (tmp_path / "out").iterdir()] == [WORK]
    assert not list((tmp_path / "out" / WORK).glob("*.bin*"))
    prepare(**options, out=tmp_path / "out")
    prepare(**options, out=tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    good = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {"source": good, "tokenizer": "byte", "out": tmp_path / "out"}
    empty = write_corpus(tmp_path / "empty.jsonl", ["", ""])
    for change, told in (
        ({"source": "nonsense"}, "is not one of: stdlib"),
        ({"source": f"text:{tmp_path}/*.nothing"}, "matches no file"),
        ({"source": empty}, "holds no text"),
        ({"field": "body"}, "has no field 'body'"),
        ({"tokenizer": "gpt3"}, "not one of byte, char"),
        ({"val_fraction": 0.0}, "--val-fraction 0.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"shard_tokens": 2**31}, "--shard-tokens 2147483648"),
        ({"workers": 0}, "--workers 0"),
        ({"max_documents": 0}, "--max-documents 0"),
        ({"max_bytes": -1}, "--max-bytes -1"),
    ):
        assert told in refusal(**options | change)
        assert not (tmp_path / "out").exists(), told
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot write the dataset" in refusal(**options | {"out": out})


def test_an_error_in_a_worker_arrives_as_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    spec = write_corpus(tmp_path / "a.jsonl", [*corpus(), 3])
    assert "a.jsonl, line 61: field 'text' is int" in refusal(
        source=spec, tokenizer="byte", out=tmp_path / "out", workers=2
    )


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="one of 2 worker processes died"):
        list(workers.run_tasks(os._exit, [3, 3], 2))


def test_an_unknown_character_cannot_come_from_the_corpus_itself(tmp_path):
    """A char tokenizer of another corpus is not mistaken for this one's."""
    CharTokenizer("xyz").save(tmp_path / "out" / "tokenizer")
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    prepare(source=spec, tokenizer="char", out=tmp_path / "out")
    assert load_dataset_tokenizer(tmp_path / "out").alphabet != "xyz"


# -- the command ----------------------------------------------------------------------------------


def run_cli(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "microtron.cli", "prepare", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=ENV,
    )


def test_the_command_line(tmp_path):
    write_corpus(tmp_path / "a.jsonl", corpus())
    options = ["--source", "jsonl:*.jsonl", "--tokenizer", "byte", "--out", "out"]
    done = run_cli(*options, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "60 documents in" in done.stdout and "tokens" in done.stdout
    done = run_cli(*options, "--val-fraction", "0.5", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: out was prepared with other settings")
    assert done.stderr.count("\n") == 1
    done = run_cli("--help", cwd=tmp_path)
    assert "--shard-tokens" in done.stdout and "Tokens in a shard file" in done.stdout


def test_importing_is_light():
    code = (
        "import sys, microtron.data.prepare, microtron.data.train_bpe\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'tiktoken', 'tokenizers', 'transformers'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    tmp_path, monkeypatch, capsys, terminal
):
    monkeypatch.setattr(prepare_report, "LINE_S", 0)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    prepare(source=spec, tokenizer="byte", out=tmp_path / "out")
    printed = capsys.readouterr().err
    assert ("\r" in printed and "100%" in printed) == terminal
    assert ("MB/s" in printed.splitlines()[-1] and "\r" not in printed) == (not terminal)
