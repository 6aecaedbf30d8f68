"""``microtron convert from-hf``: a Hugging Face folder -> a step that training starts from.

    microtron convert from-hf models/gpt-oss-20b checkpoints/gpt-oss-20b
    microtron convert from-hf models/gpt2-large checkpoints/gpt2-large --dtype float32
    ./run_train.sh checkpoints/gpt2-large/train.toml

gpt-oss (bf16 or MXFP4), GPT-2 and Llama. The weights pass through memory one by one, and each is
looked at: shapes against config.json, and no NaN or infinity. OUT is the step itself, with its
tokenizer and a recipe beside the shards; it appears whole or not at all.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from microtron import checkpoints, dcp
from microtron.data.tokenizers import Tokenizer, load_tokenizer
from microtron.errors import UserError
from microtron.hf.folder import Folder, as_ours
from microtron.model import accounting
from microtron.model.args import ModelArgs

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def from_hf(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
) -> None:
    """Converts a Hugging Face folder into a checkpoint, with a recipe that trains it on.

    Args:
        folder: config.json and safetensors: gpt-oss (bf16 or MXFP4), GPT-2 or Llama.
        out: The new checkpoint; must not exist.
        dtype: Of the weights in it; keep: as they are (MXFP4 becomes bf16). A run computes with
            fp32 master weights whatever it is.

    Raises:
        UserError: the folder is damaged or of another architecture, or ``out`` exists.
    """
    started = time.perf_counter()
    source, out = Folder(Path(folder).expanduser()), Path(out).expanduser()
    args = source.args
    specs, produce = as_ours(source, args)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    if kind is not None:
        specs = {name: (shape, kind) for name, (shape, _) in specs.items()}
    tokenizer = _tokenizer(source, out)
    longest = source.config.get("max_position_embeddings")
    facts = {"step": 0, "tokens": 0, "source": str(folder), "seq_len": longest}
    with dcp.beside(out) as partial, _Progress(len(specs)) as progress:
        checkpoints.write_identity(partial, args, tokenizer, facts)
        if tokenizer is not None:
            for name in TOKENIZER_FILES:
                if (source.path / name).exists():
                    shutil.copyfile(source.file(name), partial / checkpoints.TOKENIZER / name)
        dcp.write_step(partial, specs, lambda name: progress(produce(name).to(specs[name][1])))
        (partial / "train.toml").write_text(recipe(args, out, tokenizer, source.config))
    counted, seconds = accounting.count_parameters(args), time.perf_counter() - started
    kinds = ", ".join(sorted({str(d).removeprefix("torch.") for _, d in specs.values()}))
    print(
        f"wrote {out}: {counted.total:,} parameters as {kinds}, train.toml"
        f"{' and its tokenizer' if tokenizer else ''}, in {seconds:.1f} s\n"
        f"next: ./run_train.sh {out / 'train.toml'}"
        f"{'' if tokenizer else ' (random tokens, until its [data] dirs names a dataset)'}"
    )


def recipe(args: ModelArgs, out: Path, tokenizer: Tokenizer | None, config: dict[str, Any]) -> str:
    """A TOML that trains the checkpoint on, on the built-in corpus until another is named."""
    import tomli_w

    name = out.resolve().name
    longest = args.max_positions or config.get("max_position_embeddings") or 1024
    if tokenizer is None:
        data: dict[str, Any] = {"mock": True}
    else:
        data = {
            "dirs": [f"data/stdlib_{name}"],
            "source": "stdlib",
            "tokenizer": str(out.resolve() / checkpoints.TOKENIZER),
        }
    architecture = {
        field: value
        for field, value in dataclasses.asdict(args).items()
        if field not in checkpoints.NOT_ARCHITECTURE
    }
    tables = {
        "job": {"description": f"{name}, trained on", "dump_folder": f"outputs/{name}"},
        "model": {"flavor": "debug", "args": architecture},
        "checkpoint": {"initial_load_path": str(out.resolve()), "interval": 100},
        "data": data,
        "training": {
            "seq_len": min(1024, longest),
            "local_batch_size": 1,
            "global_batch_size": 8,
            "steps": 100,
        },
        "optimizer": {"lr": 2e-5, "weight_decay": 0.1},
        "lr_scheduler": {"warmup_steps": 10, "min_lr_factor": 0.1},
        "validation": {
            "enable": tokenizer is not None,
            "freq": 50,
            "local_batch_size": 1,
            "val_tokens": 65536,
        },
        "metrics": {"log_freq": 1},
    }
    note = (
        ""
        if tokenizer
        else "# The source brought no tokenizer: random tokens, until [data] names some.\n"
    )
    return (
        f"# Goes on training {name}, whose architecture is [model.args]; another corpus: [data].\n"
        f"#   ./run_train.sh {out / 'train.toml'}\n{note}\n{tomli_w.dumps(tables)}"
    )


def _tokenizer(source: Folder, out: Path) -> Tokenizer | None:
    """The folder's tokenizer, under the name that it will have; None where it has none."""
    if not (source.path / "tokenizer.json").exists():
        print(f"note: {source.path} has no tokenizer.json, so text is left out", file=sys.stderr)
        return None
    for name in TOKENIZER_FILES:
        if (source.path / name).exists():
            source.file(name)
    tokenizer = load_tokenizer(str(source.path))
    if tokenizer.vocab_size > source.args.vocab_size:
        raise UserError(
            f"{source.path}: its tokenizer has {tokenizer.vocab_size:,} tokens, the model "
            f"{source.args.vocab_size:,} rows: without tokenizer.json the weights alone convert"
        )
    tokenizer.name = f"json:{out.resolve() / checkpoints.TOKENIZER / 'tokenizer.json'}"
    return tokenizer


class _Progress:
    """A bar on a terminal, one tick a tensor."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit=" tensors", disable=not sys.stderr.isatty())

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        self.bar.update()
        return value

    def __enter__(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
