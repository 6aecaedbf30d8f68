"""README.md of an export: what a reader of the hub wants to know, from what the run wrote down.

Figures come from microtron.json in the step and from metrics.jsonl of its run; what is not there is
left out rather than guessed, and no licence is invented.
"""

import json
from pathlib import Path
from typing import Any

from microtron.data.tokenizers import Tokenizer
from microtron.hf.keys import architecture
from microtron.model.accounting import count_parameters
from microtron.model.args import ModelArgs

HOME = "https://github.com/pytorch/torchtitan"


def model_card(
    name: str,
    args: ModelArgs,
    tokenizer: Tokenizer | None,
    about: dict[str, Any],
    dtype: str,
    step: Path,
    passed: str | None,
) -> str:
    """The text of README.md, front matter included.

    Args:
        name: What the model is called: the folder's name.
        about: microtron.json of the step.
        passed: What the gate said; None: it did not run.
    """
    kind = architecture(args)
    tags = ["microtron", kind.replace("_", "-")] + ["mixture-of-experts"] * args.moe
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += [f"- {tag}" for tag in tags]
    rows = [*_training(about, step), *_shape(args, kind), *_reading(tokenizer, dtype)]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    checked = (
        f"Checked when it was exported ({passed.removeprefix('gate: ')})."
        if passed
        else "Exported without comparing it in transformers."
    )
    warned = vllm_differs(args)
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {name}",
            "",
            _origin(about),
            "",
            "| | |",
            "|---|---|",
            table,
            "",
            checked,
            "",
            *([warned, ""] if warned else []),
            *_usage(name, tokenizer),
            "",
        ]
    )


def vllm_differs(args: ModelArgs) -> str:
    """What vLLM would compute otherwise, its GptOss not asking config.json; '' where nothing is.

    (github.com/vllm-project/vllm, vllm/model_executor/models/gpt_oss.py: ``layer_idx % 2`` and
    ``eps=1e-5``. SGLang and transformers read the file.)
    """
    if architecture(args) != "gpt_oss":
        return ""
    kinds = [args.mask_kind(layer) for layer in range(args.n_layers)]
    found = []
    if kinds != [("window", "full")[layer % 2] for layer in range(args.n_layers)]:
        found.append(f"window_pattern {args.window_pattern!r} (it takes 'SL')")
    if args.norm_eps != 1e-5:
        found.append(f"norm_eps {args.norm_eps} (it takes 1e-05)")
    told = "vLLM does not read all of config.json and would compute something else: "
    return f"{told}{', '.join(found)}." if found else ""


def _origin(about: dict[str, Any]) -> str:
    source = about.get("source")
    if source and not about.get("step"):
        return f"Converted with microtron from `{Path(source).name}`, not trained on."
    return (
        "A language model pretrained with microtron, a plug-in of "
        f"[TorchTitan]({HOME}). It is a base model: it continues text."
    )


def _training(about: dict[str, Any], step: Path) -> list[tuple[str, str]]:
    """Step, tokens, data, and the last validation up to the step, where the run says so."""
    rows = []
    if about.get("step"):
        rows.append(("step", f"{about['step']:,}"))
    if about.get("tokens"):
        rows.append(("tokens trained on", f"{about['tokens']:,}"))
    for source in about.get("data") or []:
        rows.append(("data", _about_data(Path(source))))
    if about.get("seq_len"):
        rows.append(("sequence length", f"{about['seq_len']:,}"))
    found = last_validation(step.parent.parent / "metrics.jsonl", about.get("step", 0))
    if "val_loss" in found:
        rows.append((f"validation loss (step {found['step']:,})", f"{found['val_loss']:.4f}"))
    if "val_bpb" in found:
        rows.append(("validation bits per byte", f"{found['val_bpb']:.4f}"))
    return rows


def _about_data(folder: Path) -> str:
    """A dataset by its name and source; a full path would tell about a machine, not about data."""
    try:
        source = json.loads((folder / "dataset.json").read_text()).get("source")
    except (OSError, ValueError, AttributeError):
        source = None
    return (
        f"`{folder.name}` ({source})" if source and "/" not in str(source) else f"`{folder.name}`"
    )


def last_validation(metrics: Path, step: int) -> dict[str, Any]:
    """The newest validation line of metrics.jsonl that is not beyond ``step``; {} without one."""
    found: dict[str, Any] = {}
    try:
        lines = metrics.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if "val_loss" in entry and entry.get("step", 0) <= step:
            found = entry
    return found


def _shape(args: ModelArgs, kind: str) -> list[tuple[str, str]]:
    parameters = count_parameters(args)
    counted = f"{parameters.total:,}"
    if args.moe:
        counted += f" ({parameters.active:,} active a token, without the embedding)"
    rows = [
        ("architecture", kind.replace("_", "-")),
        ("parameters", counted),
        ("layers", str(args.n_layers)),
        ("width", f"{args.dim:,}"),
        ("heads", f"{args.n_heads} of {args.head_dim} ({args.n_kv_heads} for keys and values)"),
    ]
    if "S" in args.window_pattern:
        rows.append(("window", f"{args.window:,} tokens, layers `{args.window_pattern}` repeated"))
    if args.moe:
        rows.append(
            ("experts", f"{args.num_experts} of width {args.expert_dim:,}, top {args.top_k}")
        )
    else:
        rows.append(("feed-forward", f"{args.hidden_dim:,} wide, {args.activation}"))
    rope = f"RoPE, base {args.rope_theta:,.0f}"
    if args.rope_factor > 1:
        rope += f", {args.rope_scaling} factor {args.rope_factor:g}"
    learned = f"learned, {args.max_positions:,}"
    rows.append(("positions", learned if args.positions == "learned" else rope))
    return rows


def _reading(tokenizer: Tokenizer | None, dtype: str) -> list[tuple[str, str]]:
    rows = [("weights", dtype)]
    if tokenizer is not None:
        name = tokenizer.name.removeprefix("json:")
        name = Path(name).parent.name if "/" in name else name
        rows.append(("tokenizer", f"{name}, {tokenizer.vocab_size:,} ids"))
    return rows


def _usage(name: str, tokenizer: Tokenizer | None) -> list[str]:
    loading = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    if tokenizer is None:
        return [*loading, "```", "", "No tokenizer came with the checkpoint."]
    return [
        *loading,
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        'prompt = tokenizer("Once", return_tensors="pt")',
        "ids = model.generate(**prompt, max_new_tokens=100)",
        "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
        "```",
        "",
        "```bash",
        f"microtron generate --checkpoint {name} --prompt Once --max-new-tokens 100",
        "```",
    ]
