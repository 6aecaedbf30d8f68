"""`microtron generate` against transformers' ``generate`` on the exported folder: the same text."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build_random, tiny_args

from microtron import checkpoints, dcp
from microtron.cli import main
from microtron.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
GPT2 = {
    "dim": 64,
    "num_experts": 0,
    "norm": "layer",
    "positions": "learned",
    "max_positions": 64,
    "activation": "gelu",
    "sinks": False,
    "n_kv_heads": 4,
    "window_pattern": "L",
    "tie_embeddings": True,
}
LLAMA = {"num_experts": 0, "activation": "swiglu", "sinks": False, "window_pattern": "L"}
PROMPT = "def é(self):"


@pytest.mark.parametrize(
    "fields", [{"window": 8}, GPT2, LLAMA | {"mlp_bias": False}], ids=["gpt_oss", "gpt2", "llama"]
)
def test_same_text(fields, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from microtron.hf.to_hf import export

    args = tiny_args(**{"vocab_size": 264, "load_balance": "aux_loss"} | fields)
    model = build_random(args).eval()
    with torch.no_grad():
        model.tok_embeddings.weight *= 3
        for name, parameter in model.named_parameters():
            if "bias" in name:  # else they alone would choose the tokens
                parameter *= 0.2
    held, step = model.state_dict(), tmp_path / "step-1"
    dcp.write(step, {n: (t.shape, t.dtype) for n, t in held.items()}, held.__getitem__)
    checkpoints.write_identity(step, args, load_tokenizer("byte"), {"seq_len": 64})
    folder = export(step, tmp_path / "hf", check=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        found = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)
    expected = PROMPT + tokenizer.decode(found[0, inputs["input_ids"].shape[1] :])
    capsys.readouterr()
    for checkpoint in (step, folder):
        command = ["generate", "--checkpoint", str(checkpoint), "--prompt", PROMPT]
        options = ["--max-new-tokens", "40", "--temperature", "0", "--device", "cpu"]
        assert main([*command, *options]) == 0
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/generate.py"), "--tiny", "--repeats", "1"]
    command += ["--batch", "2", "--tokens", "9", "--prompt", "5", "--out", str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "transformers (grouped_mm" in done.stdout, done.stderr
    assert (tmp_path / "a.json").is_file()
