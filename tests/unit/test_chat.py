"""`microtron chat`: what the model sees, what stays cached, and how a person is in charge."""

import json
import shutil

import pytest
from test_infer_load import BYTES, write_step

from microtron.errors import UserError
from microtron.infer import chat as module
from microtron.infer import uncached
from microtron.infer.chat import Conversation, Template, Transcript, Turn, talk, template_of
from microtron.infer.engine import Engine
from microtron.infer.load import load
from microtron.infer.sampling import Sampling

PARAMS = Sampling(max_new_tokens=15, temperature=0.9, seed=2, stop_tokens=(256,), vocab_size=257)
CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "step-7"
    write_step(path)
    return load(path)


def conversation(loaded, limit=None, params=PARAMS, template=None):
    template = template or template_of(loaded)
    return Conversation(Engine(loaded.model), loaded, template, params, limit)


def answer_by_hand(loaded, prompt, params=PARAMS):
    return uncached.generate(loaded.model, [prompt], params)[0]


def test_a_turn_runs_only_its_own_tokens(loaded):
    """Answers are those to the whole transcript; the cache saves running it again."""
    talked, heard = conversation(loaded), []
    expected = [256]
    for said in ("hello", "how are you?", "x"):
        opening = "User:" if len(expected) == 1 else "\nUser:"
        new = BYTES.encode(f"{opening} {said}\nAssistant:")
        before = len(talked.seen) - talked.cache.lengths[0] if talked.cache else 1
        turn = talked.say(said, heard.append)
        expected += new
        answer = answer_by_hand(loaded, expected)
        assert turn.tokens == answer and turn.text == BYTES.decode(answer)
        assert talked.fed == len(new) + before  # and what was chosen last, not yet looked at
        expected += answer
    assert "".join(heard) == "".join(turn.text for turn in talked.turns)
    talked.reset()
    assert talked.say("hello", heard.append).tokens == answer_by_hand(
        loaded, [256, *BYTES.encode("User: hello\nAssistant:")]
    )


def test_an_answer_that_opens_the_next_turn(loaded):
    """A stop string is part of what the model has seen, and is not said twice."""
    transcript = Transcript(loaded)
    turns = [Turn("a", " b", BYTES.encode(" b\nUser:"), opened=True), Turn("c")]
    assert (
        BYTES.decode(transcript.tokens(turns)[1:]) == "User: a\nAssistant: b\nUser: c\nAssistant:"
    )
    turns[0] = Turn("a", " b", BYTES.encode(" b"))
    assert (
        BYTES.decode(transcript.tokens(turns)[1:]) == "User: a\nAssistant: b\nUser: c\nAssistant:"
    )
    talked = conversation(loaded)
    free = talked.say("hi", str)
    talked = conversation(loaded)
    stop = next(c for c in free.text[2:] if c.isascii())
    talked.template.stop = (stop,)
    turn = talked.say("hi", str)
    assert turn.opened and turn.text == free.text.split(stop)[0]
    assert turn.tokens == free.tokens[: free.tokens.index(ord(stop)) + 1]


def test_oldest_turns_make_room(loaded):
    talked = conversation(loaded, limit=90)
    for said in ("first", "second", "third", "fourth"):
        turn = talked.say(said, str)
        assert len(talked.seen) <= 90
        if talked.dropped:
            break
    assert talked.dropped == 1 and talked.turns[0].said == "second"
    expected = Transcript(loaded).tokens([*talked.turns[:-1], Turn(said)])
    assert turn.tokens == answer_by_hand(loaded, expected)
    with pytest.raises(UserError, match="and 75 fit beside an answer of 15: say it shorter"):
        talked.say("x" * 80, str)
    assert talked.turns[-1] is turn and talked.turns[0].said == "second"  # nothing was lost


def test_an_interrupt_keeps_what_was_said(loaded):
    talked = conversation(loaded)
    pieces = []

    def until(piece):
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talked.say("hello", until)
    turn = talked.turns[0]
    assert turn.text.startswith("".join(pieces)) and 4 <= len(turn.tokens) < 15
    prompt = [256, *BYTES.encode("User: hello\nAssistant:"), *turn.tokens]
    prompt += BYTES.encode("\nUser: go on\nAssistant:")
    assert talked.say("go on", str).tokens == answer_by_hand(loaded, prompt)
    assert talked.fed < len(prompt)  # the cache was still good


def test_an_interrupted_prefill_starts_anew(loaded):
    """Windows of the first layers have forgotten by then what the next answer needs."""
    talked = conversation(loaded)
    talked.say("hello", str)

    def interrupt(*args):
        raise KeyboardInterrupt

    last = talked.engine.body.layers["1"]
    hook = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talked.say("lost", str)
    hook.remove()
    turn = talked.say("again", str)
    prompt = Transcript(loaded).tokens([*talked.turns[:-1], Turn("again")])
    assert [t.said for t in talked.turns] == ["hello", "lost", "again"]
    assert turn.tokens == answer_by_hand(loaded, prompt) and talked.fed == len(prompt)


def test_a_folder_with_a_chat_template(loaded, tmp_path):
    from microtron.hf.to_hf import export

    folder = export(loaded.path, tmp_path / "hf", check=False)
    assert isinstance(template_of(load(folder)), Transcript)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    assert isinstance(template_of(load(folder)), Transcript)
    (folder / "chat_template.jinja").write_text(CHATML)
    exported = load(folder)
    talked = conversation(exported, template=template_of(exported))
    assert isinstance(talked.template, Template)
    first = talked.say("hé", str)
    assert first.tokens == answer_by_hand(exported, BYTES.encode("[user]hé;[assistant]"))
    second = talked.say("b", str)
    whole = f"[user]hé;[assistant]{first.text};[user]b;[assistant]"
    assert second.tokens == answer_by_hand(exported, BYTES.encode(whole))
    shutil.rmtree(folder)


def test_talk(loaded, capsys):
    lines = iter(["hello", "", "/what", "/reset", "hello", "x" * 300, "/exit", "never"])
    talk(conversation(loaded, limit=120), lambda prompt: next(lines))
    out, err = capsys.readouterr()
    (answer,) = {answer_by_hand(loaded, [256, *BYTES.encode("User: hello\nAssistant:")]) and out}
    halves = answer.rstrip("\n")
    assert halves[: len(halves) // 2] == halves[len(halves) // 2 + 1 :]  # the same after /reset
    assert "no command /what" in err and "error: this is" in err and next(lines) == "never"

    def end(prompt):
        raise EOFError

    talk(conversation(loaded), end)


def test_ctrl_c_stops_an_answer_and_not_the_chat(loaded, capsys, monkeypatch):
    lines = iter(["a", "b", "/exit"])
    talked = conversation(loaded)
    say = talked.say

    def first_interrupted(said, on_text):
        if said == "a":
            raise KeyboardInterrupt
        return say(said, on_text)

    monkeypatch.setattr(talked, "say", first_interrupted)
    talk(talked, lambda prompt: next(lines))
    out, err = capsys.readouterr()
    assert "(stopped)" in err and out.strip()


def test_the_command(loaded, capsys, monkeypatch):
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(module.talk, "__defaults__", (input,))
    module.chat(loaded.path, max_new_tokens=400, temperature=0, device="cpu")
    out, _ = capsys.readouterr()
    params = Sampling(32, 0, stop_tokens=(256,), vocab_size=257)  # half of the 64 it was trained on
    ids = answer_by_hand(loaded, [256, *BYTES.encode("User: hello\nAssistant:")], params)
    assert out == BYTES.decode(ids) + "\n"


def test_a_context_below_nothing_is_refused(loaded):
    with pytest.raises(UserError, match="max_context = -5"):
        module.chat(loaded.path, device="cpu", max_context=-5)
