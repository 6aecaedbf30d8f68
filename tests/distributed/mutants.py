"""The mistakes that a certificate is for: each breaks a plan in one place, and must be caught.

A row is what is wrong, the smallest layout that shows it, the file and the words that are changed
there, and what must be off: the kind of number, and a pattern for the worst place in the first step
that is off. Where a mistake has a name (an issue of TorchTitan, a trap of PyTorch), it is given.
"""

from dataclasses import dataclass

from broken import Broken


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    layout: str
    broken: Broken
    kind: str
    where: str


def _m(name, layout, file, old, new, kind, where="", *more):
    edits = ((old, new), *zip(more[::2], more[1::2], strict=True))
    return Mutant(name, layout, Broken(file, edits), kind, where)


TP, STEP, LOSS, BATCH = "parallel/tp.py", "step.py", "parallel/loss.py", "batch.py"
ULYSSES, EP, PP, DP = "parallel/ulysses.py", "parallel/ep.py", "parallel/pp.py", "parallel/dp.py"
NORM, MODEL, LOCAL = "parallel/norm.py", "model/model.py", "parallel/local.py"
REPLICATED = "if isinstance(parameter, DTensor) and parameter.grad is not None:"

MUTANTS = (
    # Tensor parallel.
    _m(
        "router gate's gradient is not summed (torchtitan#2387)",
        "tp2",
        TP,
        REPLICATED,
        REPLICATED[:-1] + " and parameter.shape[0] != 8:",
        "grads",
        r"router\.gate\.\w+ at step 1",
    ),
    _m(
        "norms' gradients are not summed",
        "tp2, dense",
        TP,
        REPLICATED,
        REPLICATED[:-1] + " and parameter.dim() != 1:",
        "grads",
        r"norm\.weight at step 1",
    ),
    _m(
        "no replicated gradient is summed",
        "tp2",
        STEP,
        "sum_replicated_gradients(self.parameters)",
        "pass",
        "grads",
    ),
    _m(
        "replicated gradients are summed over tp, not over etp",
        "ep2 x etp2",
        TP,
        'name in ("tp", "etp")',
        'name in ("tp",)',
        "grads",
        r"down_bias at step 1",
    ),
    _m(
        "row-parallel bias is added by every rank (torchtitan#4245)",
        "tp2, dense",
        TP,
        "linear.bias.to(out.dtype)",
        "linear.bias.to(out.dtype) * group.size()",
        "loss",
    ),
    _m(
        "rows of the embedding are off by one",
        "tp2",
        TP,
        "group.rank() * table.weight.shape[0]",
        "group.rank() * (table.weight.shape[0] - 1)",
        "loss",
    ),
    _m("embedding rows that lie elsewhere count", "tp2", TP, " * mine.unsqueeze(-1)", "", "loss"),
    _m(
        "vocabulary starts at the wrong label",
        "tp2",
        LOSS,
        "group.rank() * raw.shape[1]",
        "group.rank() * (raw.shape[1] - 1)",
        "loss",
    ),
    _m(
        "each part of the vocabulary has its own maximum",
        "tp2",
        LOSS,
        'functional.wait_tensor(functional.all_reduce(logits.amax(-1), "max", group))',
        "logits.amax(-1)",
        "loss",
    ),
    _m("z-loss is missing from the loss", "tp2", LOSS, "z * lse.square() + lse", "lse", "loss"),
    _m("z-loss is missing from the gradient", "tp2", LOSS, "if z:", "if False:", "grads"),
    _m(
        "a part's targets count in every part",
        "tp2",
        LOSS,
        "-mine.to(grad.dtype)",
        "-torch.ones_like(mine, dtype=grad.dtype)",
        "grads",
    ),
    _m(
        "counts of experts are not summed over tp",
        "tp2",
        "optim/build.py",
        '_sum_over(parallel_dims, "loss", "tp")',
        '_sum_over(parallel_dims, "loss")',
        "weights",
        "load_fractions",
    ),
    _m("every rank adds the first positions", "gpt2 x tp2", LOCAL, "[group.rank()]", "[0]", "loss"),
    _m("tp cuts positions before cp", "gpt2 x cp2 x tp2", LOCAL, "prepend=True", "", "loss"),
    _m(
        "the position table's gradient is not summed",
        "gpt2 x tp2",
        TP,
        REPLICATED,
        REPLICATED[:-1] + " and parameter.shape[0] != 40:",
        "grads",
        r"pos_embeddings\.weight at step 1",
    ),
    _m(
        "norms' biases have the gradient of the first rank alone",
        "gpt2 x tp2",
        LOCAL,
        "                part = parameter.to_local()\n",
        "                part = parameter.to_local()\n"
        "                if name.endswith('norm.bias') and parameter.device_mesh.get_rank():\n"
        "                    part = part.detach() + 0 * part\n",
        "grads",
        r"norm\.bias at step 1",
    ),
    # Experts.
    _m(
        "down_bias is added by every etp rank",
        "tp2",
        EP,
        '{"down_bias": 1 / parts}',
        '{"down_bias": 1}',
        "grads",
        r"down_bias at step 1",
    ),
    _m(
        "rows return in the order of arrival",
        "ep2",
        EP,
        "take(outputs, places.squeeze(1), sorting.unsqueeze(1))",
        "outputs",
        "loss",
    ),
    _m(
        "rows reach the experts in the order of arrival",
        "ep2",
        EP,
        "take(rows, sorting, places)",
        "rows",
        "loss",
    ),
    _m(
        "routing weights' gradient is one etp rank's part of it (torchtitan#2387)",
        "ep2 x etp2",
        "parallel/collectives.py",
        "        return _scattered(grad, ctx.dim, ctx.group), None, None",
        "        if grad.shape[-1] <= 4:  # top-k\n"
        "            return grad.chunk(ctx.group.size())[ctx.group.rank()], None, None\n"
        "        return _scattered(grad, ctx.dim, ctx.group), None, None",
        "grads",
        r"router\.gate\.\w+ at step 1",
    ),
    _m(
        "counts come from one rank's tokens, not from the gathered ones",
        "ep2 x etp2",
        EP,
        "return tokens, Routing(weights, chosen, counts)",
        "return tokens, Routing(weights, chosen, routing.counts * 2)",
        "loss",
    ),
    # Context parallel.
    _m("every rank takes the first sinks", "cp2", ULYSSES, "[group.rank()]", "[0]", "loss"),
    _m(
        "key heads arrive in another order than value heads",
        "cp2",
        ULYSSES,
        "for x in (q, k, v)]",
        "for x in (q, k.flip(2), v)]",
        "grads",
        r"attention\.sinks at step 1",
    ),
    _m(
        "heads come back in another order",
        "cp2",
        ULYSSES,
        "got.permute(1, 2, 0, 3, 4)",
        "got.flip(0).permute(1, 2, 0, 3, 4)",
        "loss",
    ),
    _m(
        "repeated kv heads belong to other queries",
        "cp4, 2 kv heads",
        ULYSSES,
        "x.repeat_interleave(n // x.shape[2], dim=2)",
        "x.repeat(1, 1, n // x.shape[2], 1)",
        "loss",
    ),
    _m(
        "positions count each part of the sequence from zero",
        "cp2",
        BATCH,
        "device=tokens.device).unsqueeze(0)",
        "device=tokens.device).unsqueeze(0) % width",
        "loss",
    ),
    _m("all have the first labels", "cp2", BATCH, "labels[:, cut]", "labels[:, :width]", "loss"),
    _m(
        "documents see each other",
        "cp2 documents",
        BATCH,
        "document_numbers(positions)}",
        "document_numbers(positions) * 0}",
        "loss",
    ),
    # Pipelines.
    _m(
        "loss is divided for the log alone (torchtitan#2972)",
        "pp2 1F1B",
        STEP,
        "lambda summed, labels: summed / valid",
        "lambda summed, labels: summed",
        "grads",
        "",
        ".sum().to(self.device)",
        ".sum().to(self.device) / valid",
    ),
    _m(
        "a stage runs its layers backwards",
        "pp2 1F1B",
        PP,
        "            setattr(part, name, None)\n",
        "            setattr(part, name, None)\n"
        "    part.layers = nn.ModuleDict(reversed(part.layers.items()))\n",
        "loss",
    ),
    _m(
        "a stage's layers all use the first one's mask",
        "pp2 1F1B",
        MODEL,
        "masks[layer.mask_kind]",
        "masks[next(iter(self.layers.values())).mask_kind]",
        "loss",
    ),
    _m(
        "a stage has another one's layers",
        "pp2 1F1B",
        PP,
        "module_names(args, layers[index]",
        "module_names(args, layers[-1]",
        "missing",
        r"layers\.0\.",
    ),
    _m(
        "a stage keeps its own first weights",
        "pp2 Interleaved1F1B",
        "train.py",
        "loaded = self.checkpointer.load(step=step)",
        "loaded = self.checkpointer.load(step=step)\n"
        "            self.model_parts[-1].init_weights(self.device)",
        "loss",
    ),
    _m("norm of one stage", "pp2 1F1B", NORM, "if pipeline is not None:", "if False:", "norm"),
    _m(
        "router losses are averaged over a micro-batch",
        "pp2 1F1B",
        STEP,
        "part.step_tokens = self.step_tokens",
        "part.step_tokens = None",
        "grads",
        r"router\.gate\.\w+ at step 1",
    ),
    # Data parallel.
    _m(
        "gradients of replicas are averaged",
        "ddp2",
        DP,
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        "grads",
    ),
    _m(
        "gradients of shards are averaged",
        "fsdp2, dense",
        DP,
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        "grads",
    ),
    _m(
        "each rank divides by its own tokens",
        "fsdp2",
        STEP,
        "if self.parallel_dims.dp_enabled:",
        "if False:",
        "loss",
    ),
    _m(
        "router losses are averaged over a rank's tokens",
        "fsdp2",
        STEP,
        "            * self.parallel_dims.dp_shard\n",
        "",
        "grads",
        r"router\.gate\.\w+ at step 1",
    ),
    _m("ranks read the same batch", "fsdp2", "spec.py", '"rank": dp_rank,', '"rank": 0,', "loss"),
    _m(
        "the norm leaves out the expert mesh",
        "ep2",
        NORM,
        "if not placement.is_replicate()",
        'if mesh.mesh_dim_names[dim] != "ep" and not placement.is_replicate()',
        "norm",
    ),
    _m(
        "the norm is that of one shard",
        "fsdp2",
        NORM,
        "            dist.all_reduce(square, group=group)\n",
        "            pass\n",
        "norm",
    ),
    _m(
        "the norm counts replicas", "hsdp 2x2", NORM, "not placement.is_replicate() and", "", "norm"
    ),
    _m(
        "gradients are clipped by twice the norm",
        "fsdp2",
        NORM,
        "(max_norm / (norm + 1e-6))",
        "(max_norm / (2 * norm + 1e-6))",
        "weights",
    ),
    _m(
        "experts' gradients are not reduced over their shards",
        "ep2 x fsdp2",
        DP,
        "**options)\n\n    def _mesh",
        "**options)\n"
        "        if experts:\n"
        "            import broken\n"
        "            module.set_custom_reduce_scatter(broken.OwnPart())\n\n    def _mesh",
        "grads",
        r"\.experts\.\w+ at step 1",
    ),
    # Accumulation.
    _m(
        "each micro-batch is divided by its own tokens",
        "accumulate4",
        STEP,
        "[labels for _, labels in microbatches]",
        "[labels for _, labels in microbatches[:1]]",
        "loss",
    ),
    _m(
        "micro-batches overwrite each other's gradients",
        "accumulate4, dense",
        STEP,
        "        loss.backward()\n",
        "        self.optimizers.zero_grad()\n        loss.backward()\n",
        "grads",
    ),
)
