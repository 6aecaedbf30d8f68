"""``microtron eval``: what a checkpoint scores, beside GPT-2.

    microtron eval outputs/run --tasks lambada_openai,arc_easy
    microtron eval outputs/run/checkpoint/step-300 --hellaswag hellaswag_val.jsonl --limit 1000
    microtron eval exported --bpb book.txt notes.txt --out results.json

The checkpoint is a step, a run's folder (its newest step) or a Hugging Face folder. Three kinds of
figures, each by itself: tasks of lm-evaluation-harness (`harness.py`), HellaSwag from a local file
(`choice.py`), bits per byte of any text (`bpb.py`).
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from microtron.data.tokenizers import write_file
from microtron.errors import UserError
from microtron.evals import bpb as bits
from microtron.evals import choice, harness, table
from microtron.evals.asked import Asked, facts
from microtron.infer.load import choose, load


def evaluate(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    tasks: str = "",
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    hellaswag: Path | None = None,
    bpb: tuple[Path, ...] = (),
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokenizer: str | None = None,
    out: Path | None = None,
) -> None:
    """Prints the scores of a checkpoint, beside those of GPT-2.

    Args:
        checkpoint: A step, a run's folder or a Hugging Face folder.
        tasks: Tasks of lm-evaluation-harness, with commas between them.
        include_path: A folder with more of its YAML tasks; their data may be local files.
        limit: Examples of each task, and of HellaSwag; default: all.
        num_fewshot: Solved examples before each question; default: as the task says.
        hellaswag: HellaSwag's validation jsonl, asked without the harness.
        bpb: Text files, for bits per byte.
        stride: Tokens that a window of --bpb moves on; default: half of --max-length.
        max_length: Tokens the model sees at once; default: as it was trained.
        batch_size: Rows computed together.
        device: auto, cpu, cuda or cuda:N.
        dtype: Of weights and computation.
        tokenizer: As for `microtron prepare`, where the checkpoint has none.
        out: Also write the results there, as JSON.

    Raises:
        UserError: nothing is asked for, or the checkpoint, a file, a task or a value is wrong.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not (names or hellaswag or bpb):
        raise UserError("nothing to measure: give --tasks, --hellaswag or --bpb, or several")
    settings: dict[str, Any] = {
        "tasks": names,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "hellaswag": hellaswag and str(hellaswag),
        "bpb": list(map(str, bpb)),
        "batch_size": batch_size,
        "dtype": dtype,
    }
    _check(settings | {"stride": stride, "max_length": max_length}, out)
    # What can be wrong beside the model is told before it is loaded.
    manager = harness.task_manager(names, include_path) if names else None
    examples = choice.read(hellaswag, limit or -1) if hellaswag else []
    texts = {str(path): bits.read_text(path) for path in bpb}
    began = time.perf_counter()
    where, kind = choose(device, dtype)
    loaded = load(checkpoint, device=where, dtype=kind, tokenizer=tokenizer)
    asked = Asked(loaded, max_length, batch_size, stride)
    settings |= {"max_length": asked.scorer.max_length, "window": asked.window}
    scores = asked.tasks(names, manager, limit, num_fewshot) if names else []
    scores += asked.hellaswag(examples) if examples else []
    for name, text in texts.items():
        scores += asked.bpb(name, text)
    found = {
        **facts(loaded),
        "settings": settings | {"stride": asked.stride},
        "seconds": round(time.perf_counter() - began, 1),
        "scores": scores,
    }
    at = f" (step {found['step']})" if found["step"] is not None else ""
    if out is not None:
        write_file(out.absolute().parent, out.name, json.dumps(found, indent=1).encode() + b"\n")
    print(f"{table.text(checkpoint.resolve().name + at, scores, limit)}\n\n{table.NOTE}")


def _check(settings: dict[str, Any], out: Path | None) -> None:
    for name in ("limit", "batch_size", "stride", "max_length"):
        if settings[name] is not None and settings[name] < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {settings[name]} cannot work: give a number above 0"
            )
    shots = settings["num_fewshot"]
    if shots is not None and shots < 0:
        raise UserError(f"--num-fewshot {shots} cannot work: give 0 or more")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"cannot write --out {out}: name a file in a folder that exists")
