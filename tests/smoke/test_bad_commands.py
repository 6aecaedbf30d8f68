"""Bad commands end in one line with a remedy, and leave nothing behind."""

from pathlib import Path

import pytest
from runs import assert_one_line

import microtron
from microtron import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        ("prepar", 2, ["'prepar'", "there are: prepare"]),
        ("convert to_hf", 2, ["'convert to_hf'", "there are: convert to-hf, convert from-hf"]),
        ("convert --sideways", 2, ["'convert --sideways'", "there are: convert to-hf"]),
        (
            "prepare --source xml:a --tokenizer byte --out {out}",
            1,
            ["'xml:a'", "stdlib, text:GLOB"],
        ),
        (
            "prepare --source text:{out}/*.txt --tokenizer byte --out {out}",
            1,
            ["matches no file", "correct the path"],
        ),
        (
            "prepare --source stdlib --tokenizer bytes --out {out}",
            1,
            ["'bytes'", "name a tokenizer.json"],
        ),
        (
            "prepare --source stdlib --tokenizer byte --out {out} --val-fraction 2",
            1,
            ["2.0", "try 0.02"],
        ),
        (
            "prepare --source stdlib --tokenizer byte --out {out} --workers many",
            1,
            ["many", "--help"],
        ),
        ("prepare --source stdlib", 1, ["--tokenizer", "--out", "--help"]),
        ("prepare --source stdlib --tokenizer byte --out {out} stray", 1, ["stray", "--help"]),
        (
            "prepare --sorce stdlib --tokenizer byte --out {out}",
            1,
            ["--sorce", "--source", "--help"],
        ),
    ],
    ids=lambda value: value.split("{")[0][:40] if isinstance(value, str) else "",
)
def test_commands(tmp_path, capsys, arguments, code, told):
    out = tmp_path / "out"
    assert cli.main(arguments.format(out=out).split()) == code
    assert_one_line(capsys.readouterr().err, *told)
    assert not out.exists()


def test_half_a_command_shows_both(capsys):
    for argv, code in ((["convert"], 2), (["convert", "--help"], 0)):
        assert cli.main(argv) == code
        out, err = capsys.readouterr()
        assert "convert to-hf  a checkpoint" in out and "convert from-hf" in out and not err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"microtron {microtron.__version__}\n"
