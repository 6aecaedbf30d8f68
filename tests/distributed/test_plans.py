"""What the certificate cannot see in the numbers: where parts lie, what is sent, what waits."""

import contextlib
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from runs import PRELOAD, become, free_port
from torch.utils._python_dispatch import TorchDispatchMode

MODEL = [
    "--model.args.dim=16",
    "--model.args.n_layers=2",
    "--model.args.n_heads=4",
    "--model.args.n_kv_heads=2",
    "--model.args.head_dim=8",
    "--model.args.expert_dim=16",
    "--model.args.hidden_dim=32",
    "--model.args.vocab_size=64",
    "--training.seq_len=16",
    "--training.local_batch_size=2",
    "--data.mock",
    "--checkpoint.enable=false",
]


def _rank(check, argv, rank, ranks, port, folder, results):
    become(rank, ranks, port)
    from microtron.parse import parse
    from microtron.spec import register
    from microtron.train import Trainer

    logging.disable(logging.ERROR)
    try:
        register()
        trainer = Trainer(parse([*MODEL, *argv, f"--job.dump_folder={folder}"]))
        found = check(trainer)
        dist.barrier()
        results.put((rank, found))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    os._exit(0)


def on_ranks(ranks, check, argv, folder):
    """``check(trainer)`` on each rank of a real Trainer; their results in rank order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(check, argv, r, ranks, port, folder, results))
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    found, end = {}, time.monotonic() + 60
    while len(found) < ranks and time.monotonic() < end:
        if not results.empty():
            found.update([results.get()])
        elif any(p.is_alive() for p in processes):
            time.sleep(0.01)
        else:
            break
    for process in processes:
        process.kill()
        process.join()
    assert len(found) == ranks, "a rank hangs or died"
    for told in found.values():
        assert not isinstance(told, str), told
    return [found[r] for r in range(ranks)]


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
        self.count += any(word in func.name() for word in waiting)
        return func(*args, **(kwargs or {}))


def host_waits(trainer):
    """Times that a layer's host waits in forward and backward, experts left out (on CUDA they read
    the counts on the device).
    """
    tolist, lists = torch.Tensor.tolist, []

    def plain(self, x, counts, *rows):
        return x * 2.0

    def counted(self):
        lists.append(self.shape)
        return tolist(self)

    batches = trainer.batch_generator(trainer.dataloader)
    microbatches = [next(batches)]
    waits = _Waits()
    with contextlib.ExitStack() as stack:
        for block in trainer.model_parts[0].layers.values():
            experts = block.moe.experts
            stack.enter_context(
                mock.patch.object(experts, "forward", plain.__get__(experts, type(experts)))
            )
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", counted))
        valid = trainer._valid_tokens([microbatches[0][1]])
        with waits:
            trainer.forward_backward_step(
                input_dict=microbatches[0][0], labels=microbatches[0][1], global_valid_tokens=valid
            )
    return {"lists": len(lists), "scalars": waits.count}


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"tensor_parallel_degree": 2}, 0),
        ({"context_parallel_degree": 2}, 0),
        ({"expert_parallel_degree": 2}, 2),  # one a layer
        ({"tensor_parallel_degree": 2, "expert_parallel_degree": 2}, 2),
    ],
    ids=["tp", "cp", "ep", "ep on tp"],
)
def test_the_host_waits_once_a_layer_with_ep_and_never_without(degrees, expected, tmp_path):
    argv = [f"--parallelism.{k}={v}" for k, v in degrees.items()]
    for counts in on_ranks(2, host_waits, argv, tmp_path):
        assert counts == {"lists": expected, "scalars": 0}


def where_parts_lie(trainer):
    """name -> shape of this rank's part, and bytes of all of them with Adam's states."""
    valid = trainer.batch_generator(trainer.dataloader)
    trainer.step = 1
    trainer.train_step(valid)
    shapes = {
        name: tuple(p.to_local().shape if hasattr(p, "to_local") else p.shape)
        for part in trainer.model_parts
        for name, p in part.named_parameters()
    }
    optimizer = trainer.optimizers.optimizers[0]
    states = sum(
        (s[k].to_local() if hasattr(s[k], "to_local") else s[k]).numel()
        for s in optimizer.state.values()
        for k in ("exp_avg", "exp_avg_sq")
    )
    return {"shapes": shapes, "states": states, "step": trainer.step_result[0].dtype}


def test_tensor_parallel_parts(tmp_path):
    for rank in on_ranks(2, where_parts_lie, ["--parallelism.tensor_parallel_degree=2"], tmp_path):
        shapes = rank["shapes"]
        block = "layers.0."
        expected = {
            "tok_embeddings.weight": (32, 16),
            "output.weight": (32, 16),
            "norm.weight": (16,),
            block + "attention.wq.weight": (16, 16),
            block + "attention.wk.bias": (8,),
            block + "attention.wo.weight": (16, 16),
            block + "attention.wo.bias": (16,),
            block + "attention.sinks": (2,),
            block + "moe.router.gate.weight": (4, 16),
            block + "moe.experts.gate_up": (4, 16, 16),
            block + "moe.experts.gate_up_bias": (4, 16),
            block + "moe.experts.down": (4, 8, 16),
            block + "moe.experts.down_bias": (4, 16),
        }
        assert {name: shapes[name] for name in expected} == expected
        assert rank["states"] == 2 * sum(torch.Size(s).numel() for s in shapes.values())


def test_expert_parallel_parts(tmp_path):
    argv = [
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.expert_parallel_degree=2",
        "--parallelism.expert_tensor_parallel_degree=2",
    ]
    for rank in on_ranks(4, where_parts_lie, argv, tmp_path):
        shapes = rank["shapes"]
        assert shapes["layers.1.moe.experts.gate_up"] == (2, 16, 16)
        assert shapes["layers.1.moe.experts.down"] == (2, 8, 16)
        assert shapes["layers.1.moe.experts.down_bias"] == (2, 16)
        assert shapes["layers.1.attention.wq.weight"] == (8, 16)  # tp, then fsdp


def sent_dtypes(trainer):
    """dtypes of what FSDP2 gathers and reduces in one step, and the gradient norm."""
    seen = {"gather": set(), "reduce": set()}

    def noting(kind, plain):
        def collective(*args, **kwargs):
            tensors = [*args[:2], *(v for v in kwargs.values() if isinstance(v, torch.Tensor))]
            seen[kind].update(str(t.dtype) for t in tensors)
            return plain(*args, **kwargs)

        return collective

    names = {  # torch 2.13 renamed them
        "gather": ("all_gather_into_tensor", "all_gather_single"),
        "reduce": ("reduce_scatter_tensor", "reduce_scatter_single"),
    }
    batches = trainer.batch_generator(trainer.dataloader)
    with contextlib.ExitStack() as stack:
        for kind, both in names.items():
            for name in both:
                if hasattr(dist, name):
                    plain = noting(kind, getattr(dist, name))
                    stack.enter_context(mock.patch.object(dist, name, plain))
        trainer.gradients([next(batches)])
    masters = {str(p.dtype) for p in trainer.parameters}
    return {
        **{k: sorted(v) for k, v in seen.items()},
        "masters": masters,
        "norm": trainer.norm().item(),
    }


def test_bf16_weights_are_gathered_and_fp32_gradients_reduced(tmp_path):
    shard = ["--parallelism.data_parallel_shard_degree=2"]
    half = [*shard, "--training.mixed_precision_param=bfloat16"]
    results = on_ranks(2, sent_dtypes, half, tmp_path)
    single = on_ranks(2, sent_dtypes, shard, tmp_path)
    for rank, truth in zip(results, single, strict=True):
        assert rank["masters"] == {"torch.float32"}
        assert rank["gather"] == ["torch.bfloat16"]
        assert rank["reduce"] == ["torch.float32"]
        assert truth["gather"] == ["torch.float32"]
        assert rank["norm"] == pytest.approx(truth["norm"], rel=3e-2)
        assert rank["norm"] != truth["norm"]


@pytest.mark.parametrize("degree", ["tensor", "pipeline", "expert", "context"])
def test_bf16_compute_on_every_mesh(degree, tmp_path):
    """TorchTitan computes in fp32 where no FSDP2 is; here the option holds."""
    batch = 2 if degree == "expert" else 4  # whose two ranks read data of their own
    argv = [
        f"--parallelism.{degree}_parallel_degree=2",
        f"--training.local_batch_size={batch}",
        "--training.mixed_precision_param=bfloat16",
    ]
    truth = on_ranks(1, norm_of, ["--training.local_batch_size=4"], tmp_path / "truth")[0]
    mine = on_ranks(2, norm_of, argv, tmp_path / "half")[0]
    assert truth["dtypes"] == {"torch.float32"} and mine["dtypes"] == {"torch.bfloat16"}
    assert mine["norm"] == pytest.approx(truth["norm"], rel=3e-2)


def waits_of_a_step(trainer):
    """What torch says of host waits in the third step."""
    batches = trainer.batch_generator(trainer.dataloader)
    for trainer.step in (1, 2):
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.step = 3
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in told if "synchroniz" in str(w.message)]


@pytest.mark.gpu
def test_a_step_waits_once_for_the_device(tmp_path):
    assert len(on_ranks(1, waits_of_a_step, [], tmp_path)[0]) == 1


def norm_of(trainer):
    """The gradient norm, and the dtypes that linear layers returned."""
    dtypes = set()

    def note(module, args, out):
        dtypes.add(str(out.dtype))

    for part in trainer.model_parts:
        for block in part.layers.values():
            block.attention.wq.register_forward_hook(note)
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.gradients([next(batches)])
    return {"norm": trainer.norm().item(), "dtypes": dtypes}
