"""`microtron convert to-hf` against torch's own way out of a DCP step and save_pretrained.

    python benchmarks/convert.py --out benchmarks/results/convert.json
    python benchmarks/convert.py --tiny

A step of the gpt_oss_656m flavor with random fp32 weights, as a run writes it but without optimizer
state (the peer would load that too), becomes bf16 safetensors: by ours, with and without the gate,
and by `dcp_to_torch_save`, `torch.load` and GptOssForCausalLM.save_pretrained. Each is a process of
its own, whose seconds and peak resident memory are those the kernel counted. The peer builds its
model on the meta device and casts tensor by tensor. At the end all weights must be equal.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from common import facts, summary, write_json  # noqa: E402
from safetensors import safe_open  # noqa: E402

from microtron import checkpoints, dcp  # noqa: E402
from microtron.data.tokenizers import load_tokenizer  # noqa: E402
from microtron.flavors import flavor  # noqa: E402
from microtron.hf import keys  # noqa: E402
from microtron.hf.config import to_config  # noqa: E402
from microtron.model import accounting, init  # noqa: E402
from microtron.model.args import ModelArgs  # noqa: E402

SEQ_LEN = 2048


def write_step(step: Path, args: ModelArgs) -> None:
    """A checkpoint as a run leaves it, of weights alone."""

    shapes = keys.shapes(args)

    def produce(name: str) -> torch.Tensor:
        return init.normal(name, shapes[name], 0.02, seed=0)

    told = {"step": 1, "tokens": SEQ_LEN, "seq_len": SEQ_LEN}
    checkpoints.write_identity(step, args, load_tokenizer("byte"), told)
    dcp.write_step(step, {n: (s, torch.float32) for n, s in shapes.items()}, produce)


def peer(step: Path, out: Path) -> None:
    """torch's and transformers' own way, in this process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import GptOssConfig, GptOssForCausalLM

    args = checkpoints.architecture(step)
    whole = out.with_suffix(".pt")
    dcp_to_torch_save(step, whole)
    state = torch.load(whole, weights_only=True)
    renamed = {
        theirs: state.pop(ours).bfloat16()
        for claim in keys.claims(args)
        for ours, theirs in zip(claim.ours, claim.theirs, strict=False)
    }
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**to_config(args, max_positions=SEQ_LEN)))
    missing, unexpected = model.load_state_dict(renamed, strict=False, assign=True)
    assert not missing and not unexpected, (missing, unexpected)
    model.save_pretrained(out)
    whole.unlink()


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, seconds of CPU and peak resident bytes of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": usage.ru_maxrss * 1024}


def weights(folder: Path) -> dict[str, Path]:
    """Name -> the file that holds it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), path)
    return found


def check_same(first: Path, second: Path) -> int:
    """Asserts that two exports hold the same weights; how many tensors there are."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, path in one.items():
        with safe_open(path, "pt") as a, safe_open(other[name], "pt") as b:
            assert torch.equal(a.get_tensor(name), b.get_tensor(name)), name
    return len(one)


def main() -> None:
    """Converts in turns, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the debug flavor, once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (3 times the weights)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", type=Path, nargs=2, metavar=("STEP", "OUT"), help="only that")
    asked = parser.parse_args()
    if asked.peer:
        peer(*asked.peer)
        return
    args = flavor("debug" if asked.tiny else "gpt_oss_656m")
    parameters = accounting.count_parameters(args).total
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        step, ours, theirs = (Path(name) / part for part in ("step-1", "ours", "theirs"))
        write_step(step, args)
        convert = [sys.executable, "-m", "microtron.cli", "convert", "to-hf", str(step), str(ours)]
        convert += ["--dtype", "bfloat16"]
        commands = {
            "imports alone": [sys.executable, "-c", "import transformers.models.gpt_oss, torch"],
            "microtron, no gate": [*convert, "--no-gate"],
            "microtron": convert,
            "torch + transformers": [sys.executable, __file__, "--peer", str(step), str(theirs)],
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(1 if asked.tiny else asked.repeats):
            for name, command in commands.items():
                made = theirs if name == "torch + transformers" else ours
                shutil.rmtree(made, ignore_errors=True)
                runs[name].append(measured(command))
        tensors = check_same(ours, theirs)
    rows = {
        name: {key: summary([run[key] for run in found]) for key in found[0]}
        for name, found in runs.items()
    }
    for name, row in rows.items():
        seconds, peak = row["seconds"], row["peak_bytes"]
        print(
            f"{name:22} {seconds['median']:7.1f} s [{seconds['min']:.1f} .. {seconds['max']:.1f}]"
            f"  CPU {row['cpu_seconds']['median']:6.1f} s  peak {peak['median'] / 2**30:6.2f} GiB"
        )
    print(f"{parameters:,} parameters in {tensors} tensors: equal to the bit")
    if asked.out:
        result = {"flavor": "debug" if asked.tiny else "gpt_oss_656m", "parameters": parameters}
        write_json(asked.out, json.loads(json.dumps({**result, "rows": rows, **facts()})))


if __name__ == "__main__":
    main()
