"""The time below which a step cannot come on a device: the longest of what can run side by side.

Assumed at their best: products at the peak of the sheet, memory and links at full speed, and
arithmetic, memory and both kinds of links entirely hidden behind one another. A real step is
longer; a plan whose floor is too long cannot be mended by tuning.
"""

from dataclasses import dataclass

from microtron.model import accounting
from microtron.scaling.activations import mode_of
from microtron.scaling.communication import Traffic, bubble, traffic_of
from microtron.scaling.devices import Device
from microtron.scaling.memory import FP32, gathered_numel, local_parameters
from microtron.scaling.plan import Plan, Stage


@dataclass(frozen=True)
class Floor:
    """Seconds of a step, each as if it were alone; ``step`` is the longest."""

    compute: float
    memory: float
    intra_node: float
    inter_node: float

    @property
    def step(self) -> float:
        """The floor."""
        return max(self.compute, self.memory, self.intra_node, self.inter_node)


def floor_of(plan: Plan, rank: int, device: Device) -> Floor:
    """The floor of a rank's step."""
    stages = plan.stages_of(plan.place(rank).pp)
    flops = sum(stage_flops(plan, stage) for stage in stages)
    shared_by = plan.layout.world // plan.layout.pp
    compute = flops * plan.step_tokens / shared_by / device.flops / (1 - bubble(plan))
    # AdamW reads weight, gradient and two moments, writes three of them; a forward reads the
    # weights, a backward reads them again and writes their gradients.
    step = 7 * FP32 * sum(local_parameters(plan, rank).values())
    forwards = plan.passes * plan.pipelined
    step += forwards * 3 * plan.width * gathered_numel(plan, rank)
    links = [_seconds(t, device) for t in traffic_of(plan, rank)]
    intra, inter = (sum(link[i] for link in links) for i in (0, 1))
    return Floor(compute, step / device.memory_bytes_s, intra, inter)


def stage_flops(plan: Plan, stage: Stage) -> float:
    """FLOPs a token in one stage, forward, backward and what full checkpointing computes again."""
    total = 0.0
    for position, layer in enumerate(stage.layers):
        own = sum(accounting.layer_flops(plan.args, layer, plan.seq_len).values())
        total += own * (4 / 3 if mode_of(plan, position) == "full" else 1)
    head = accounting.flops_per_token(plan.args, plan.seq_len)["head"]
    return total + (head if stage.last else 0.0)


def _seconds(traffic: Traffic, device: Device) -> tuple[float, float]:
    """(inside a node, between nodes). A collective enters each node once and is handed on inside;
    rows of an all-to-all, and sends, are for one rank alone.
    """
    here = max(1, min(traffic.ranks, device.node // traffic.stride))
    inside = traffic.sent_bytes / device.intra_bytes_s
    if here == traffic.ranks:
        return inside, 0.0
    if traffic.kind.endswith(("all-to-all", "send")):
        away = (traffic.ranks - here) / (traffic.ranks - 1)
        return inside * (1 - away), traffic.sent_bytes * away / device.inter_bytes_s
    return (inside if here > 1 else 0.0), traffic.sent_bytes / here / device.inter_bytes_s
