"""Which parameter is treated how: one table, first match wins, every parameter claimed exactly
once.
"""

import re
from dataclasses import dataclass

from torch import nn

from microtron.model.init import plain_name


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches ``pattern`` get these multiples of the run's lr and weight
    decay.
    """

    name: str
    pattern: str
    lr: float = 1.0
    weight_decay: float = 1.0


# Vectors, sinks and router offsets have no scale to keep small; a decayed sink would be pulled to a
# weight of exp(0) in every softmax.
RULES = (
    Rule("no_decay", r"(norm\.weight|bias|sinks)$", weight_decay=0.0),
    Rule("embedding", r"^(tok|pos)_embeddings\.weight$", weight_decay=0.0),
    Rule("head", r"^output\.weight$"),
    Rule("matrices", r"^layers\.\d+\."),
)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, decay_embeddings: bool = False
) -> list[dict[str, object]]:
    """torch parameter groups, in the order of RULES, empty ones left out.

    Raises:
        ValueError: a parameter matches no rule.
    """
    members: dict[str, list[nn.Parameter]] = {rule.name: [] for rule in RULES}
    for raw, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_claim(plain_name(raw)).name].append(parameter)
    groups = []
    for rule in RULES:
        if members[rule.name]:
            decays = 1.0 if rule.name == "embedding" and decay_embeddings else rule.weight_decay
            groups.append(
                {
                    "params": members[rule.name],
                    "lr": lr * rule.lr,
                    "weight_decay": weight_decay * decays,
                    "name": rule.name,
                }
            )
    return groups


def _claim(name: str) -> Rule:
    for rule in RULES:
        if re.search(rule.pattern, name):
            return rule
    raise ValueError(f"no rule of optim/groups.py claims the parameter {name}")
