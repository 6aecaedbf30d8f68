"""One loaded checkpoint, and what `microtron eval` asks it."""

import contextlib
import functools
import platform
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from microtron import checkpoints
from microtron.errors import UserError
from microtron.evals import bpb, choice, harness
from microtron.evals.score import Scorer
from microtron.infer.load import Loaded

_SCORE = ("task", "metric", "value", "stderr", "examples", "shots")
_UNKNOWN_LENGTH = 2048  # lm-evaluation-harness's own, where a config says nothing


class Asked:
    """A checkpoint and its scorer.

    Args:
        max_length: tokens at once; None: as its export says of itself.
        batch_size: rows computed together.
        stride: of the windows over a text; None: half a window.

    Raises:
        UserError: it has no tokenizer, cannot see ``max_length`` tokens, or ``stride`` is longer.
    """

    def __init__(
        self, loaded: Loaded, max_length: int | None, batch_size: int, stride: int | None = None
    ) -> None:
        self.tokenizer = loaded.need_tokenizer()
        self.prefix_ids, self.stop_ids = loaded.prefix_ids, loaded.stop_ids
        trained, exported = lengths(loaded)
        if max_length is not None and loaded.args.positions == "learned" and max_length > exported:
            raise UserError(
                f"--max-length {max_length} cannot work: the model has learned {exported} "
                "positions; give that or fewer"
            )
        self.scorer = Scorer(loaded.model, max_length or exported, batch_size)
        self.window = max_length or min(trained, exported)
        self.stride = stride or max(self.window // 2, 1)
        if self.stride > self.window:
            raise UserError(
                f"--stride {stride} is longer than the {self.window} tokens of a window: give "
                "that or fewer"
            )

    def tasks(
        self,
        names: list[str],
        manager: Any,  # noqa: ANN401
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> list[dict[str, Any]]:
        """Tasks of lm-evaluation-harness, out of `task_manager`'s index."""
        return harness.run_tasks(
            self.answers(_bar("requests")), names, manager, limit=limit, num_fewshot=num_fewshot
        )

    def answers(self, progress: Callable[[Iterable], Iterable] | None = None) -> harness.Answers:
        """What the harness asks."""
        return harness.Answers(
            self.scorer, self.tokenizer, self.prefix_ids, self.stop_ids, progress
        )

    def hellaswag(self, examples: list[choice.Example]) -> list[dict[str, Any]]:
        """HellaSwag from a file; of an ending that is too long the last part is scored, as while
        training.
        """
        pairs = [
            choice.shortened(pair, self.scorer.max_length)
            for example in examples
            for pair in choice.question(example, self.tokenizer.encode, self.prefix_ids)
        ]
        scores = self.scorer.score(pairs, _bar("HellaSwag"))
        told = choice.accuracy(examples, [score.logprob for score in scores])
        found = {"acc": told.acc, "acc_norm": told.acc_norm}
        return [
            dict(zip(_SCORE, row, strict=True))
            for row in (
                ("hellaswag file", metric, value, told.stderr(value), told.examples, 0)
                for metric, value in found.items()
            )
        ]

    def bpb(self, name: str, text: str) -> list[dict[str, Any]]:
        """Bits per byte of a text."""
        found = bpb.bits_per_byte(
            self.scorer.within(self.window),
            self.tokenizer,
            text,
            prefix=self.prefix_ids[0] if self.prefix_ids else self.tokenizer.eot_id,
            stride=self.stride,
            progress=_bar(name),
        )
        counts = {"tokens": found.tokens, "bytes": found.bytes}
        return [
            {"task": name, "metric": "bits_per_byte", "value": found.bpb, **counts},
            {"task": name, "metric": "loss", "value": found.loss, **counts},
        ]


def lengths(loaded: Loaded) -> tuple[int, int]:
    """Tokens at once: (as it was trained, as its export says of itself)."""
    args = loaded.args
    if args.positions == "learned":
        return args.max_positions, args.max_positions
    extended, whole = args.rope_factor > 1, round(args.rope_factor * args.rope_original_len)
    if loaded.kind == "hf":
        exported = loaded.max_tokens or _UNKNOWN_LENGTH
        return (args.rope_original_len if extended else exported), exported
    trained = loaded.max_tokens or args.rope_original_len
    if extended:
        return trained, whole if args.rope_scaling == "yarn" else max(trained, whole)
    return trained, trained


def facts(loaded: Loaded) -> dict[str, Any]:
    """What is measured, and with what."""
    told = checkpoints.identity(loaded.path) if loaded.kind == "dcp" else {}
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("microtron", "lm_eval"):
        with contextlib.suppress(PackageNotFoundError):  # run from a clone, or no harness
            found[package] = version(package)
    device = next(loaded.model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "checkpoint": str(loaded.path),
        "kind": loaded.kind,
        "step": told.get("step"),
        "trained_tokens": told.get("tokens"),
        "tokenizer": loaded.tokenizer.name if loaded.tokenizer else None,
        "device": f"{device.type} ({name})",
        "versions": found,
    }


def _bar(name: str) -> functools.partial:
    """A progress bar on stderr, where a person sees it."""
    from tqdm import tqdm

    return functools.partial(tqdm, desc=name, file=sys.stderr, disable=None, leave=False)
