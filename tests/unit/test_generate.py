"""`microtron generate`: whole characters, stop strings, and what is printed where."""

import itertools

import pytest
from test_infer_load import BYTES, write_step

from microtron.cli import main
from microtron.infer import uncached
from microtron.infer.engine import Engine
from microtron.infer.load import load
from microtron.infer.sampling import Sampling
from microtron.infer.text import TextStream, generate_text

TEXT = "Zürich, 東京 🙂 <|endoftext|> e\u0301 end"


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A step folder and its model."""
    path = tmp_path_factory.mktemp("run") / "step-7"
    return path, write_step(path)


def pushed(ids, stop=()):
    stream = TextStream(BYTES, stop)
    return [*(stream.push(i) for i in ids), stream.flush()], stream.done


def test_characters_come_whole():
    pieces, _ = pushed(BYTES.encode(TEXT))
    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces)
    assert max(map(len, pieces)) == 1 and pieces.count("") == len(TEXT.encode()) - len(TEXT) + 1
    broken = [0x41, 0xC3, 0x41, 0xF0, 0x9F, BYTES.eot_id, 300, 0xE2]
    pieces, _ = pushed(broken)
    assert "".join(pieces) == BYTES.decode(broken)


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\nUser: two", ["\nUser:"], "one"),
        ("one\nUsed: two", ["\nUser:"], None),
        ("one\nUser", ["\nUser:"], None),
        ("aabaabaac", ["aabaac"], "aab"),
        ("x stop y", ["nothing", "op", "stop"], "x "),
        ("x", ["x"], ""),
        ("plain", ["", "z"], None),
    ],
)
def test_stop_strings(text, stop, expected):
    pieces, done = pushed(BYTES.encode(text), stop)
    assert "".join(pieces) == (text if expected is None else expected)
    assert done == (expected is not None)


def test_text_before_a_stop_waits_no_longer_than_it_must():
    stream = TextStream(BYTES, ["\nUser:"])
    assert [stream.push(i) for i in b"a\nUx\n\n"] == ["a", "", "", "\nUx", "", "\n"]


def test_a_stop_string_ends_its_row(step):
    model = step[1]
    rows = [[256, 70, 71], [256, 72]]
    params = Sampling(max_new_tokens=40, seed=1, vocab_size=257)
    free, count = generate_text(Engine(model), BYTES, rows, params)
    assert count == 80
    plain = [BYTES.decode(ids) for ids in uncached.generate(model, rows, params)]
    assert free == plain
    almost = [text[-1] + "\0\0" for text in free]  # what waits for them comes in the end
    assert generate_text(Engine(model), BYTES, rows, params, almost)[0] == free
    stop = next(c for c in free[1][5:] if c.isascii())
    heard = ["", ""]

    def on_text(row, piece):
        heard[row] += piece

    cut, fewer = generate_text(Engine(model), BYTES, rows, params, [stop], on_text)
    assert cut == heard == [text.split(stop)[0] for text in free] and fewer < 80


def test_command(step, capsys, tmp_path):
    path, model = step
    (tmp_path / "prompts.txt").write_text("second é\n\nthird\n")
    options = ["--max-new-tokens", "12", "--temperature", "0.8", "--top-k", "50", "--seed", "3"]
    command = ["generate", "--checkpoint", str(path), "--prompt", "first", "--num-samples", "2"]
    command += ["--prompt-file", str(tmp_path / "prompts.txt"), "--device", "cpu", *options]
    assert main(command) == 0
    out, err = capsys.readouterr()
    expected = []
    for prompt, seed in itertools.product(("first", "second é", "third"), (3, 4)):
        params = Sampling(12, 0.8, 50, seed=seed, stop_tokens=(256,), vocab_size=257)
        (ids,) = uncached.generate(model, [[256, *BYTES.encode(prompt)]], params)
        expected.append(prompt + BYTES.decode(ids))
    assert out == "\n---\n".join(expected) + "\n"
    assert "44 prompt tokens" in err and "tokens/s" in err
    assert main([*command, "--batch-size", "4"]) == 0
    assert capsys.readouterr().out == out


def test_more_than_the_model_was_trained_on_is_told(step, capsys, monkeypatch):
    command = ["generate", "--checkpoint", str(step[0]), "--device", "cpu", "--prompt", "abc"]
    assert main([*command, "-n", "20"]) == 0
    assert "note" not in capsys.readouterr().err
    known = load(step[0])
    known.max_tokens = 8
    monkeypatch.setattr("microtron.infer.generate.load", lambda *a, **b: known)
    assert main([*command, "-n", "4"]) == 0
    assert "note" not in capsys.readouterr().err
    assert main([*command, "-n", "5"]) == 0
    assert "note: up to 9 tokens, and this model was trained on 8" in capsys.readouterr().err


def test_without_a_prompt_a_document_begins(step, capsys):
    command = ["generate", "--checkpoint", str(step[0]), "--max-new-tokens", "5"]
    assert main([*command, "--temperature", "0", "--device", "cpu", "--dtype", "float32"]) == 0
    params = Sampling(5, 0, vocab_size=257, stop_tokens=(256,))
    assert capsys.readouterr().out == (
        BYTES.decode(uncached.generate(step[1], [[256]], params)[0]) + "\n"
    )


@pytest.mark.parametrize(
    "options, told",
    [
        (["--temperature", "-1"], "temperature = -1.0 cannot work"),
        (["--num-samples", "0"], "--num-samples 0 cannot work"),
        (["--batch-size", "0"], "--batch-size 0 cannot work"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--dtype", "int8"], "--dtype int8 is not known"),
        (["--prompt-file", "/nowhere.txt"], "cannot read --prompt-file /nowhere.txt"),
        (["--tokenizer", "/nowhere.json"], "'/nowhere.json'"),
    ],
)
def test_refusals(step, capsys, options, told):
    assert main(["generate", "--checkpoint", str(step[0]), "--device", "cpu", *options]) == 1
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1].startswith("error: ") and told in err


def test_streams_what_it_has(step, monkeypatch):
    """Each piece of the first row reaches stdout, flushed, before the next token is made."""
    said, extend = [], Engine.extend

    def telling(*args, **kwargs):
        said.append("step")
        return extend(*args, **kwargs)

    monkeypatch.setattr(Engine, "extend", telling)
    monkeypatch.setattr("builtins.print", lambda *a, **k: said.append((*a, k.get("flush"))))
    main(["generate", "--checkpoint", str(step[0]), "--prompt", "abc", "--max-new-tokens", "30"])
    steps = [i for i, what in enumerate(said) if what == "step"]
    between = [said[i:j] for i, j in itertools.pairwise(steps)]
    assert ("abc", True) in said[: steps[0]]
    assert any(len(part) > 1 and part[1][-1] for part in between)
