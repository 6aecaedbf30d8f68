"""The gate of an export: transformers must compute what the checkpoint does.

The folder is loaded by `AutoModelForCausalLM` and `AutoTokenizer`, as a user would. The ids of a
text and the logits at each of its positions are compared with our own slow, obvious path
(`attn_backend = eager`, `experts_backend = loop`) on the same step. Both compute in fp32, ours from
weights rounded to the export's dtype. One model is in memory at a time.
"""

import gc
import re
from pathlib import Path
from typing import Any

import torch

from microtron import dcp
from microtron.data.optional import import_package
from microtron.data.tokenizers import EOT, CharTokenizer, Tokenizer
from microtron.errors import UserError
from microtron.hf.tokenizer_files import splits_special
from microtron.model.accounting import count_parameters
from microtron.model.args import ModelArgs
from microtron.model.model import empty_model

TOLERANCE = 1e-3  # of the norm of a position's logits
MOST_TOKENS = 1024
TEXT = '''A ship that is to carry grain across the sea is loaded slowly. First the hold is swept, \
then boards are laid over the ribs, and only when the mate has gone through with a lamp and found \
it dry does the first sack come down. "Dry today," he says, "is not dry in a fortnight." He writes \
the number of every sack in a book, and at the other end somebody counts again; if the two agree, \
nobody thanks him. If they don't, the whole quay knows by noon. 1,024 sacks; 37.5 tonnes; 3 days.

    def count(sacks: list[str], *, start: int = 0) -> dict[str, int]:
        """How often each mark occurs, from `start` on."""
        found: dict[str, int] = {}
        for mark in sacks[start:]:
            found[mark] = found.get(mark, 0) + 1   # <|endoftext|> is a mark like any other
        return found if found else {"": 0}

Die Säcke kommen aus Łódź, le grain de Besançon, el trigo de Logroño; пшеница, σιτάρι, 小麦, 밀, \
गेहूँ und قمح heißt, was darin ist. Σ xᵢ² ≤ 4·10⁻³, naïve café, 👩🏽‍🌾🚢!\t\r\n  (End of list.)
'''


def check_possible(args: ModelArgs) -> None:
    """Before anything is written: is transformers here, and memory for one model in fp32?

    Raises: UserError: no; with the remedy.
    """
    try:
        import_package("transformers")
    except UserError as error:
        raise UserError(
            "an export is compared with the checkpoint in transformers, which is not installed: "
            "pip install transformers, or pass --no-gate to export without the comparison"
        ) from error
    needed, there = bytes_needed(args), bytes_available()
    if there is not None and needed > there:
        raise UserError(
            f"comparing the export in transformers takes about {needed / 2**30:.1f} GiB of memory "
            f"and {there / 2**30:.1f} are free; free some, or pass --no-gate"
        )


def bytes_needed(args: ModelArgs) -> int:
    """Memory of the comparison, about: a model in fp32, logits of both sides, and room to work."""
    logits = _length(args) * args.vocab_size * 4
    return int(4 * count_parameters(args).total * 1.05) + 3 * logits + 2**28


def bytes_available() -> int | None:
    """Memory that can be had without swapping, of the machine or of this control group if less;
    None where Linux does not say."""
    try:
        fields = Path("/proc/meminfo").read_text()
        found = int(re.search(r"MemAvailable:\s+(\d+) kB", fields)[1]) * 1024
    except (OSError, TypeError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(found, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no group, or "max"
        return found


def compare(
    step: Path,
    folder: Path,
    args: ModelArgs,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
) -> str:
    """Compares a step with its export; returns what was found, for people.

    Args:
        dtype: What the export's weights were rounded to; None: not at all.

    Raises: UserError: tokens or logits part; where, and both values.
    """
    ids = _ids(folder, args, tokenizer)
    ours = _our_logits(step, args, ids, dtype)
    gc.collect()
    theirs = _their_logits(folder, ids)
    if theirs.shape != ours.shape:
        raise UserError(
            f"gate: transformers gives logits {list(theirs.shape)}, the checkpoint "
            f"{list(ours.shape)}"
        )
    norms = ours.norm(dim=-1).clamp(min=1e-12)
    apart = ((theirs - ours).norm(dim=-1) / norms).nan_to_num(nan=float("inf"))
    worst = apart.max().item()
    if worst > TOLERANCE:
        raise UserError(_where(ours, theirs, apart, ids, tokenizer))
    return f"gate: logits at {len(ids)} positions agree within {worst:.0e} of their norm"


def _where(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    apart: torch.Tensor,
    ids: list[int],
    tokenizer: Tokenizer | None,
) -> str:
    """The first position beyond the tolerance, and the logit that is furthest off there."""
    at = int((apart > TOLERANCE).nonzero()[0])
    off = (theirs[at] - ours[at]).abs().nan_to_num(nan=float("inf"))
    token = int(off.argmax())
    piece = f" {tokenizer.decode([ids[at]])!r}" if tokenizer is not None else ""
    return (
        f"gate: the export does not compute what the checkpoint does: {(apart > TOLERANCE).sum()} "
        f"of {len(ids)} positions differ by more than {TOLERANCE:.0e} of their norm, the first "
        f"being {at} (token {ids[at]}{piece}) with {apart[at]:.1e}: logit {token} is "
        f"{ours[at, token]:.5g} in the checkpoint and {theirs[at, token]:.5g} in transformers; "
        "nothing was written"
    )


def _length(args: ModelArgs) -> int:
    """Positions to compare: beyond the window, and no more than a learned table has."""
    enough = min(MOST_TOKENS, max(512, args.window + 64))
    return min(enough, args.max_positions or enough)


def _ids(folder: Path, args: ModelArgs, tokenizer: Tokenizer | None) -> list[int]:
    """Ids of the text in both tokenizers, which must agree, made as long as the comparison asks.

    Without a tokenizer random ids do.
    """
    length = _length(args)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(args.vocab_size, (length,), generator=generator).tolist()
    text = TEXT
    if not splits_special(tokenizer):  # chat: there the mark is a token, here it is text
        text = TEXT.replace(EOT, "eot")
    if isinstance(tokenizer, CharTokenizer):
        text = "".join(c for c in TEXT if c in tokenizer.alphabet) or tokenizer.alphabet
    mine = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
    auto = import_package("transformers").AutoTokenizer
    with _quiet():
        reader = _loaded(auto, folder)
        theirs = reader(text)["input_ids"]
        alike = reader.decode(theirs) == tokenizer.decode(mine)
    if theirs != mine:
        pairs = zip([*mine, None], [*theirs, None], strict=False)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        raise UserError(
            f"gate: AutoTokenizer reads the same text otherwise: token {at} is "
            f"{theirs[at : at + 1]} there and {mine[at : at + 1]} here; nothing was written"
        )
    if not alike:
        raise UserError("gate: AutoTokenizer decodes the same ids to another text")
    return (mine * (length // len(mine) + 1))[:length]


def _our_logits(
    step: Path, args: ModelArgs, ids: list[int], dtype: torch.dtype | None
) -> torch.Tensor:
    """[positions, V], fp32."""
    slow = args.override({"attn_backend": "eager", "experts_backend": "loop"})
    model = empty_model(slow, torch.device("cpu"), torch.float32)
    dcp.read_into(step, model)
    with torch.no_grad():
        for parameter in model.parameters() if dtype is not None else ():
            parameter.copy_(parameter.to(dtype))
        return model(torch.tensor([ids]))[0].float()


def _their_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """[positions, V], fp32. Raises: UserError where a weight is missing or not asked for."""
    auto = import_package("transformers").AutoModelForCausalLM
    with _quiet(), torch.no_grad():
        model, info = _loaded(auto, folder, dtype=torch.float32, output_loading_info=True)
        wrong = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        if wrong:
            raise UserError(f"gate: transformers lacks, or does not know, {dcp.listed(wrong)}")
        return model.eval()(torch.tensor([ids]), use_cache=False).logits[0].float()


def _loaded(auto: Any, folder: Path, **options: object) -> Any:  # noqa: ANN401
    """What transformers makes of the folder, running no code that a tokenizer's config names."""
    only = {"local_files_only": True, "trust_remote_code": False}
    try:
        return auto.from_pretrained(folder, **only, **options)
    except Exception as error:  # transformers and tokenizers raise all kinds
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"gate: transformers cannot load the export ({type(error).__name__}: {told})"
        ) from error


class _quiet:
    """transformers without its progress bars and advice, which are not about this export."""

    def __enter__(self) -> None:
        self.logging: Any = import_package("transformers.utils.logging")
        self.level = self.logging.get_verbosity()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        self.logging.set_verbosity(self.level)
        self.logging.enable_progress_bar()
