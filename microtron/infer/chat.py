"""``microtron chat``: a conversation with a checkpoint or a Hugging Face folder.

    microtron chat --checkpoint outputs/debug
    microtron chat --checkpoint exports/gpt-oss --temperature 0.7

What was said stays in the KV cache: a turn runs only its own tokens. A folder with a chat template
of its own is talked to through it (by transformers); any other model, which has only learned to
continue texts, gets a transcript: ``User: ...``, ``Assistant: ...``. Ctrl-C stops an answer,
``/reset`` forgets, ``/exit`` leaves. When the context is full the oldest turns go, and a line says
so.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from microtron.data.optional import import_package
from microtron.errors import UserError
from microtron.infer.engine import Engine
from microtron.infer.load import Loaded, choose, load
from microtron.infer.sampling import Sampling
from microtron.infer.text import TextStream


@dataclass
class Turn:
    """What was said and answered; ``opened``: the answer ran on into the next ``User:``."""

    said: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    opened: bool = False


class Transcript:
    """A conversation as plain text, for models that continue texts."""

    stop = ("\nUser:",)

    def __init__(self, loaded: Loaded) -> None:
        self.prefix, self.encode = loaded.prefix_ids, loaded.need_tokenizer().encode

    def tokens(self, turns: list[Turn]) -> list[int]:
        """The conversation up to the last turn's answer; answers as they were made."""
        found, opening = list(self.prefix), "User:"
        for turn in turns:
            found += [*self.encode(f"{opening} {turn.said}\nAssistant:"), *turn.tokens]
            opening = "" if turn.opened else "\nUser:"
        return found


class Template:
    """A conversation by the chat template of a Hugging Face folder."""

    stop = ()

    def __init__(self, folder: Path) -> None:
        self.tokenizer = import_package("transformers").AutoTokenizer.from_pretrained(folder)

    def tokens(self, turns: list[Turn]) -> list[int]:
        """The conversation up to the last turn's answer."""
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": turn.said})
            messages.append({"role": "assistant", "content": turn.text})
        text = self.tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def template_of(loaded: Loaded) -> Transcript | Template:
    """The folder's chat template, or the plain transcript."""
    folder = loaded.path
    if loaded.kind == "hf":
        told = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            config = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
            told = json.loads(config).get("chat_template")
        if told or (folder / "chat_template.jinja").is_file():
            return Template(folder)
    return Transcript(loaded)


class Conversation:
    """One conversation: its turns, and the cache of the tokens that the model has seen.

    Args:
        limit: tokens that fit into the context, answer included; None: any number.
    """

    def __init__(
        self,
        engine: Engine,
        loaded: Loaded,
        template: Transcript | Template,
        params: Sampling,
        limit: int | None,
    ) -> None:
        self.engine, self.tokenizer, self.template = engine, loaded.need_tokenizer(), template
        self.params, self.limit = params, limit
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.turns: list[Turn] = []
        self.cache, self.seen = None, []
        self.dropped = 0  # turns that made room for the last answer
        self.fed = 0  # tokens that the last answer's prompt ran through the model

    def say(self, said: str, on_text: Callable[[str], None]) -> Turn:
        """Answers; ``on_text`` gets the answer as it comes. An interrupt leaves what there is.

        Raises:
            UserError: what was said does not fit into the context by itself.
        """
        turn = Turn(said)
        self.turns.append(turn)
        try:
            logits = self._look_at(self._fitting())
        except UserError:
            self.turns.pop()
            raise
        stream = TextStream(self.tokenizer, self.template.stop)

        def tell(piece: str) -> None:
            turn.text += piece
            if piece:
                on_text(piece)

        def on_token(row: int, token: int) -> bool:
            turn.tokens.append(token)
            self.seen.append(token)
            tell(stream.push(token))
            return stream.done

        try:
            self.engine.continue_from(self.cache, logits, [self.params], on_token)
        finally:
            turn.opened = stream.done
            tell(stream.flush())
        return turn

    def _fitting(self) -> list[int]:
        """The conversation's tokens, oldest turns dropped until an answer fits behind them."""
        turns = list(self.turns)
        room = None if self.limit is None else self.limit - self.params.max_new_tokens
        while True:
            tokens = self.template.tokens(turns)
            if room is None or len(tokens) <= room:
                self.dropped, self.turns = len(self.turns) - len(turns), turns
                return tokens
            if len(turns) == 1:
                raise UserError(
                    f"this is {len(tokens):,} tokens long, and {room:,} fit beside an answer of "
                    f"{self.params.max_new_tokens:,}: say it shorter"
                )
            del turns[0]

    def _look_at(self, tokens: list[int]) -> "torch.Tensor":  # noqa: F821
        """Logits of what follows; only tokens that the cache does not know run."""
        cache, self.cache = self.cache, None  # an interrupt here leaves it unusable
        known = 0 if cache is None else cache.lengths[0]
        if known and known < len(tokens) and tokens[:known] == self.seen[:known]:
            logits = self.engine.append(cache, [tokens[known:]])
        else:
            known, capacity = 0, min(self.limit or 2048, 2048)
            cache, logits = self.engine.prefill([tokens], capacity)
        self.cache, self.seen, self.fed = cache, list(tokens), len(tokens) - known
        return logits


def chat(
    checkpoint: Path,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    seed: int = 0,
    max_context: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Talks with a model. /reset forgets, /exit leaves; Ctrl-C stops an answer, or leaves.

    Args:
        checkpoint: A step (any layout), a run's folder (its newest step), or a Hugging Face folder.
        max_new_tokens: Tokens of an answer at most.
        temperature: Divides the logits; 0 is greedy.
        top_k: Choose among the k likeliest tokens; 0: all.
        top_p: Choose among the likeliest tokens that hold this much probability.
        min_p: Leave out tokens below this share of the likeliest one's probability.
        seed: Of the random numbers.
        max_context: Tokens of the conversation; 0: as many as the model was trained on.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on CUDA, else float32), float32 or bfloat16.
        compile: Compile the step for one token.
        tokenizer: Instead of the checkpoint's own: byte, gpt2, ..., or a tokenizer.json.

    Raises:
        UserError: an option or the checkpoint cannot work.
    """
    params = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, seed)
    if max_context < 0:
        raise UserError(f"max_context = {max_context} cannot work: give 0 (as trained) or more")
    place, kind = choose(device, dtype)
    loaded = load(checkpoint, device=place, dtype=kind, tokenizer=tokenizer)
    limit = max_context or loaded.max_tokens
    if limit is not None:  # half of a short context stays for what is said
        max_new_tokens = max(1, min(max_new_tokens, limit // 2))
    vocab_size = loaded.need_tokenizer().vocab_size
    params = Sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, seed, loaded.stop_ids, vocab_size
    )
    engine = Engine(loaded.model, compile=compile)
    talk(Conversation(engine, loaded, template_of(loaded), params, limit))


def talk(conversation: Conversation, ask: Callable[[str], str] = input) -> None:
    """Reads a line, answers, until /exit or the end of the input."""
    print("/reset forgets, /exit leaves, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            said = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said == "/exit":
            return
        if said == "/reset":
            conversation.reset()
        elif said.startswith("/"):
            print(f"no command {said}; there are /reset and /exit", file=sys.stderr)
        elif said:
            _answer(conversation, said)


def _answer(conversation: Conversation, said: str) -> None:
    try:
        conversation.say(said, lambda piece: print(piece, end="", flush=True))
        print()
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    if conversation.dropped:
        print(
            f"(the context is full: {conversation.dropped} of the oldest turns left out)",
            file=sys.stderr,
        )
