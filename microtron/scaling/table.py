"""The estimate as a page of text."""

from microtron.scaling.communication import KINDS
from microtron.scaling.plan import Plan

GIB = 2**30
# part of memory -> what it is
MEMORY = {
    "parameters": "fp32, this rank's part",
    "optimizer": "two fp32 states",
    "gradients": "fp32, this rank's part",
    "summed_gradients": "whole, of the microbatches so far",
    "gathered_weights": "whole for the blocks in use",
    "activations": "kept for backward",
    "recomputed": "of one block, in backward",
    "gathered_gradients": "whole, before they are reduced",
    "loss": "logits of a chunk, before backward begins",
}


def text(found: dict, plan: Plan, stages: bool) -> str:
    """Lines for a person.

    Args:
        found: what `estimate.numbers` counted.
        stages: all pipeline ranks, not only the one that needs most memory.
    """
    ranks = sorted(found["by_rank"], key=lambda r: -r["memory_bytes"]["peak"])
    device = found["device"]
    name = device["name"] if device else {"cpu": "CPU", "cuda": "GPU"}[plan.kind]
    flops = found["flops_a_token"]
    lines = [
        f"{found['toml']} on {found['ranks']} x {name}: {plan.layout}",
        f"{_count(found['parameters'])} parameters, {_count(found['parameters_active'])} active a "
        f"token; {_count(flops)}FLOP a token (forward and backward); "
        f"{_count(found['tokens_a_step'])} tokens a step",
    ]
    forwards = plan.passes * plan.pipelined
    lines.append(
        f"a rank takes {plan.microbatch} x {plan.seq_len} tokens at once"
        f"{' (shared with its tp and cp ranks)' if plan.layout.tp * plan.layout.cp > 1 else ''}, "
        f"{forwards} times a step; activation checkpointing {plan.checkpointing}"
        f"{', compiled' if plan.compiled else ''}"
    )
    if found["built_as_ranks"]:
        told = ", ".join(map(str, found["built_as_ranks"]))
        lines.append(f"layout built on the fake backend as rank {told}: parameters agree exactly")
    if plan.layout.pp > 1:
        lines.append(
            f"pipeline: {len(plan.stages)} stages, {plan.schedule}, {plan.pipelined} microbatches "
            f"of {plan.microbatch}: idle for {100 * found['bubble']:.1f}% of the step"
        )
    for row in ranks if stages else ranks[:1]:
        lines += ["", *_rank(row, plan, device, len(ranks))]
    return "\n".join(lines)


def _rank(row: dict, plan: Plan, device: dict | None, of: int) -> list[str]:
    layers = ", ".join(f"{part[0]}-{part[-1]}" for part in row["layers"])
    which = f"rank {row['rank']} (layers {layers})" if of > 1 else f"rank {row['rank']}"
    lines = [f"{which}, memory in GiB"]
    for name, told in MEMORY.items():
        size = row["memory_bytes"][name]
        if size:
            lines.append(f"  {name.replace('_', ' '):<20}{size / GIB:>9.3f}  {told}")
    peak = row["memory_bytes"]["peak"]
    room = f"of {device['memory_bytes'] / GIB:.1f}" if device else ""
    if device and peak > device["memory_bytes"]:
        room += ": DOES NOT FIT"
    room = f"{room} (they do not all stand at once)".strip()
    lines.append(f"  {'at most':<20}{peak / GIB:>9.3f}  {room}")
    if row["sent_bytes_a_step"]:
        lines.append(f"rank {row['rank']}, GiB sent a step")
    for item in row["sent_bytes_a_step"]:
        group = f"{item['ranks']} ranks" + (
            f", {item['stride']} apart" if item["stride"] > 1 else ""
        )
        size = item["sent_bytes"] / GIB
        lines.append(f"  {item['kind']:<20}{size:>9.3f}  {KINDS[item['kind']]} ({group})")
    return lines + (_floor(row["floor_s"], plan, device) if device else [])


def _floor(floor: dict, plan: Plan, device: dict) -> list[str]:
    tokens = plan.step_tokens / floor["step"]
    parts = {
        "compute": "at the sheet's peak, pipeline idling and recomputation included",
        "memory": "weights and optimizer at full bandwidth",
        "intra_node": "links inside a node",
        "inter_node": "links between nodes",
    }
    lines = ["least time of a step in s, if all of these hide behind the longest"]
    for name, told in parts.items():
        if floor[name]:
            lines.append(f"  {name.replace('_', ' '):<20}{floor[name]:>9.4f}  {told}")
    lines.append(f"  {'step':<20}{floor['step']:>9.4f}  at most {_count(tokens)} tokens/s")
    return lines


def _count(number: float) -> str:
    """12.3M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
