"""benchmarks/throughput.py: each rung adds one thing, peers have our shape, a failure is a row."""

import gc
import json
import os
import subprocess
from pathlib import Path
from unittest import mock

from microtron.accelerator import DEVICE_TYPE

import pytest
import torch

from microtron.config import resolved_args
from microtron.errors import UserError
from microtron.flavors import flavor
from microtron.model.accounting import count_parameters
from microtron.model.args import ModelArgs
from microtron.model.model import Transformer

ROOT = Path(__file__).parents[2]
on_cpu = pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="what it looks at is of a CPU")
SMALL = ["--model.args.n_layers=2", "--model.args.dim=64", "--model.args.expert_dim=48"]
SMALL += ["--model.args.window=24"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The scripts importable; what a rank sets is put back."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with mock.patch.dict(os.environ):
        yield
    gc.enable()  # TorchTitan's Trainer collects by itself


def small_work(recipe="debug", options=SMALL, **changed):
    from throughput_step import Work

    shape = {"seq_len": 32, "micro_tokens": 64, "step_tokens": 128, "steps": 1, "blocks": 1}
    toml = str(ROOT / f"train_configs/{recipe}.toml")
    return Work(toml, tuple(options), **(shape | {"backend": "eager"} | changed))


def test_each_rung_adds_one_optimisation():
    from throughput import RUNGS, rung_options

    work = small_work()
    rungs = [rung_options(work, added) for added in range(len(RUNGS) + 1)]
    for before, after in zip(rungs[:-1], rungs[1:], strict=True):
        changed = {a.split("=")[0].replace("no-", "") for a in set(before) ^ set(after)}
        assert len({name.split(".")[-1] for name in changed}) == 1 or all(
            name.startswith("--kernels.") for name in changed
        ), changed
    slow, fast = (work.parsed(options) for options in (rungs[0], rungs[-1]))
    for job, attention, experts, chunk, optimizer, compiled, kernel in (
        (slow, "eager", "loop", 64, "for-loop", False, "torch"),
        (fast, "auto", "auto", 32, "fused", True, "auto"),
    ):
        args = resolved_args(job)
        assert (args.attn_backend, args.experts_backend) == (attention, experts)
        assert args.loss_chunk_tokens == chunk
        assert (job.optimizer.implementation, job.compile.enable) == (optimizer, compiled)
        assert {job.kernels.norm, job.kernels.rope, job.kernels.swiglu, job.kernels.loss} == {
            kernel
        }
        assert (job.training.local_batch_size, job.training.global_batch_size) == (2, 4)
        assert job.training.mixed_precision_param == "bfloat16" and not job.data.document_mask


def test_optimizer_implementations():
    from microtron.optim.build import GroupedOptimizers

    config, model = small_work().parsed().optimizer, Transformer(ModelArgs(dim=32, n_layers=1))
    for name, fused, foreach in (("fused", 1, None), ("foreach", None, 1), ("for-loop", None, 0)):
        config.implementation = name
        made = GroupedOptimizers([model], config).optimizers[0]
        assert (made.defaults["fused"], made.defaults["foreach"]) == (fused, foreach)


def test_the_dense_twin_is_the_flavors():
    from throughput import dense_options

    work = small_work("gpt_oss_656m_1gpu", (), seq_len=2048, micro_tokens=16384, step_tokens=65536)
    assert resolved_args(work.parsed(dense_options(work))) == flavor("gpt_oss_656m_dense")


@on_cpu
def test_liger_computes_the_loss_alone():
    from throughput import RUNGS, liger_options, run_here, rung_options

    work = small_work()
    (added,) = set(liger_options(work)) - set(rung_options(work, len(RUNGS)))
    assert added == "--kernels.loss=liger"
    told = run_here("microtron, loss by Liger", work, None)["failed"]  # it needs a GPU
    assert told.startswith("UserError: kernels.loss = 'liger'")


def test_work_is_whole_sequences_and_batches():
    with pytest.raises(UserError, match="--micro-tokens 65"):
        small_work(micro_tokens=65)
    with pytest.raises(UserError, match="--step-tokens 100"):
        small_work(step_tokens=100)


def test_peers_have_our_parameters():
    from throughput_peers import titan_args, transformers_model
    from torchtitan.models.gpt_oss import GptOssModel

    args = flavor("gpt_oss_656m").override({"n_layers": 2})
    wanted = count_parameters(args).total
    with torch.device("meta"):
        titan = GptOssModel(titan_args(args, 2048))
        theirs = transformers_model(args, 2048, "eager", "batched_mm")
    for model in (titan, theirs):
        assert sum(p.numel() for p in model.parameters()) == wanted
    assert theirs.config._attn_implementation == "eager"
    assert theirs.config._experts_implementation == "batched_mm"


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention has no backward on a CPU: plain scores stand in for it."""
    import torchtitan.models.gpt_oss.model.model as titan
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    def attend(self, q, k, v, *, block_mask, scale, return_lse, enable_gqa):
        groups, seq_len = q.shape[1] // k.shape[1], q.shape[2]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        mask = create_mask(block_mask.mask_mod, 1, 1, seq_len, seq_len, device="cpu")
        scores = (q @ k.transpose(-1, -2)).float() * scale
        scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ v), scores.logsumexp(-1)

    def mask_on_cpu(mod, *sizes):
        return create_block_mask(mod, *sizes, device="cpu")

    count = torch.histc  # of whole numbers: CUDA only
    monkeypatch.setattr(torch, "histc", lambda x, **kw: count(x.float(), **kw).to(x.dtype))
    monkeypatch.setattr(titan.FlexAttentionWrapper, "forward", attend)
    monkeypatch.setattr(titan, "create_attention_mask", mask_on_cpu)


def test_torchtitan_computes_what_we_compute(flex_on_cpu):
    from throughput_peers import titan_args
    from torchtitan.models.gpt_oss import GptOssModel

    args = ModelArgs(dim=32, n_layers=2, expert_dim=24, window=8, vocab_size=64)
    ours = Transformer(args)
    ours.init_weights()
    told = titan_args(args, 32)
    told.moe_args.use_grouped_mm = False  # as it decides itself without CUDA
    theirs = GptOssModel(told).float()
    with torch.no_grad():
        theirs.init_weights(torch.device("cpu"))
        for name, parameter in ours.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_()
    weights = dict(ours.named_parameters())
    renamed = {"gate_up": "mlp1", "down": "mlp2"}
    for name in [n for n in weights if ".experts." in n]:
        value = weights.pop(name)
        part = name.rsplit(".", 1)[-1].removesuffix("_bias")
        kind = "bias" if name.endswith("_bias") else "weight"
        name = f"{name.rsplit('.', 1)[0]}.{renamed[part]}_{kind}"
        weights[name] = value if kind == "bias" else value.transpose(1, 2)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("expert_bias" in name for name in missing)
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens, theirs.get_attention_masks(tokens, None))
    torch.testing.assert_close(logits, ours(tokens), rtol=1e-4, atol=1e-4)


@on_cpu
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "FSDP2"])
def test_torchtitans_trainer_trains_our_shape(flex_on_cpu, wrapped):
    from throughput_peers import titan_running
    from throughput_step import measure

    work = small_work()
    with titan_running(work, wrapped) as running:
        found = measure(running, work)  # refuses a loss far from chance
    assert len(found["tokens_per_s"]) == work.blocks and found["tokens_per_s"][0] > 0
    assert running.args.expert_dim == 48
    assert not torch.distributed.is_initialized()


ROUND = {"first_step_s": 9.0, "last_loss": 5.0, "flops_per_token": 2.0, "parameters_active": 4}


def a_round(*speeds, peak=8, **changed):
    return ROUND | {"tokens_per_s": list(speeds), "peak_bytes": peak} | changed


def test_rows_and_goals():
    from throughput import goals, rows_of

    runs = {
        "microtron eager": [a_round(10.0), a_round(30.0, first_step_s=1.0, peak=9)],
        "microtron + fused AdamW": [a_round(50.0, 70.0), {"failed": "once"}],
        "dense twin": [a_round(70.0, parameters_active=5)],
        "torchtitan": [{"failed": "OutOfMemoryError: no"}],
        "transformers flex": [a_round(25.0)],
        "transformers eager": [a_round(40.0), a_round(40.0, last_loss=None)],
    }
    rows = rows_of(runs, peak_flops=200.0)
    eager = rows["microtron eager"]
    assert eager["tokens_per_s"] == {"median": 20.0, "min": 10.0, "max": 30.0}
    assert (eager["mfu"], eager["peak_bytes"], eager["first_step_s"]) == (0.2, 9, 9.0)
    assert eager["ratio_to_best_peer"] == 0.5
    assert rows["torchtitan"] == {"failed": "OutOfMemoryError: no"}
    assert eager["loss_is_finite"] and not rows["transformers eager"]["loss_is_finite"]
    mfu, titan, theirs, dense = goals(rows)
    assert (mfu["ours"], mfu["value"], mfu["met"]) == ("microtron + fused AdamW", 0.6, True)
    assert (titan["value"], titan["met"]) == (None, False)
    assert (theirs["peer"], theirs["value"]) == ("transformers eager", 1.5)
    assert not theirs["met"]
    assert dense["value"] == pytest.approx((60 / 4) / (70 / 5)) and dense["met"]
    assert all(not g["met"] for g in goals(rows_of({"torchtitan": [{"failed": "x"}]}, 1.0)))


@pytest.mark.parametrize(
    "code, out, err, expected",
    [
        (0, 'noise\n{"failed": "a"}\n', "", {"failed": "a"}),
        (0, "noise\n", "lost\n", {"failed": "exit code 0: lost"}),
        (0, "12\n", "", {"failed": "exit code 0: it said nothing"}),
        (-9, '{"a": 1}\n', "x\nkilled\n", {"failed": "exit code -9: killed"}),
    ],
)
def test_what_a_process_says(code, out, err, expected):
    from throughput import told_by

    assert told_by(subprocess.CompletedProcess([], code, out, err)) == expected


def test_a_loss_far_from_chance_is_refused():
    from throughput_step import Running, measure

    running = Running(ModelArgs(), lambda: None, lambda: 1.0)
    with pytest.raises(UserError, match="first loss is 1.000 where chance is 5.576"):
        measure(running, small_work())


@on_cpu
def test_tiny(tmp_path, capsys):
    from throughput import main

    out = tmp_path / "a.json"
    names = ["microtron eager", "dense twin", "torchtitan"]
    main(["--tiny", "--only", *names, "--profile", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]["64"]
    assert set(rows) == {*names, "torchtitan, FSDP2"}
    assert not torch.distributed.is_initialized()
    assert "FlexAttention" in rows["torchtitan"]["failed"]
    assert rows["microtron eager"]["tokens_per_s"]["median"] > 0
    told = capsys.readouterr().out
    assert "dense twin" in told and "not measured" in told
    table = (tmp_path / "a_profile/64_microtron_eager.txt").read_text()
    assert "ms a step" in table and "aten::" in table
    main(["--tiny", "--only", "sdpa", "--extend", "--out", str(out)])
    again = json.loads(out.read_text())["rows"]["64"]
    assert "does not support" in again["transformers sdpa, grouped_mm, bf16"]["failed"]
    assert again["dense twin"] == rows["dense twin"]
    with pytest.raises(UserError, match="--only xyz names no candidate"):
        main(["--tiny", "--only", "xyz"])
    with pytest.raises(UserError, match="measured with settings"):
        main(["--tiny", "--only", "sdpa", "--extend", "--out", str(out), "--training.max_norm=2.0"])


def test_transformers_trains_our_shape():
    from throughput_peers import run_transformers
    from throughput_step import measure

    work = small_work()
    for weights in ("bf16", "fp32"):
        with run_transformers(work, "eager", "grouped_mm", weights, False) as running:
            found = measure(running, work)
        assert found["tokens_per_s"][0] > 0 and found["parameters_active"] > 0


@on_cpu
@pytest.mark.slow
def test_all_of_it(tmp_path):
    from throughput import candidates, main

    main(["--tiny", "--out", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]["64"]
    assert set(rows) == set(candidates())
    ran = [name for name, row in rows.items() if "failed" not in row]
    assert len([n for n in ran if n.startswith("microtron")]) == 7 and "dense twin" in ran
    assert "transformers eager, grouped_mm, bf16, compiled" in ran


@pytest.mark.slow
def test_apart(tmp_path):
    from throughput import run_apart

    work = small_work()
    found = run_apart("microtron + grouped GEMM", work, tmp_path / "p.txt", tmp_path, 300)
    assert found.get("tokens_per_s"), found
    assert (tmp_path / "p.txt").is_file()
    assert "not done after" in run_apart("dense twin", work, None, tmp_path, 0.01)["failed"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "microtron + kernels",
        "torchtitan",
        "torchtitan, FSDP2",
        "transformers eager, grouped_mm, bf16",
        "transformers flex, grouped_mm, bf16, compiled",
    ],
)
def test_on_a_gpu(name, tmp_path):
    from throughput import run_apart

    work = small_work(
        options=[], seq_len=128, micro_tokens=256, step_tokens=512, backend="inductor"
    )
    found = run_apart(name, work, tmp_path / "p.txt", tmp_path, 500)
    assert found.get("peak_bytes"), found
    assert (tmp_path / "p.txt").is_file()
