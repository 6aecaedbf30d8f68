"""The rotary part of a config.json, and how a config is asked field by field.

transformers 5 keeps it in rope_parameters, 4.57 in rope_theta and rope_scaling; both are written
with the same numbers, and a config in which they differ is refused.
"""

import math
from typing import Any

from microtron.errors import UserError
from microtron.model.args import ModelArgs


class Fields:
    """config.json, asked field by field."""

    def __init__(self, config: dict[str, Any], inside: str = "") -> None:
        self.config, self.inside = config, inside

    def refused(self, name: str, wanted: str) -> UserError:
        """What to raise for a value that is not computed here."""
        return UserError(
            f"config.json: {self.inside}{name} = {self.config.get(name)!r} is not computed "
            f"here; this would take {wanted}"
        )

    def get(self, name: str, default: Any, kind: type) -> Any:  # noqa: ANN401
        """A value of its type; the default where it is missing or null."""
        value = self.config.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise UserError(f"config.json: {self.inside}{name} = {value!r} is no {kind.__name__}")
        return value

    def only(self, name: str, default: Any, *right: Any) -> None:  # noqa: ANN401
        """Refuses a field with another value than those that are computed here."""
        if self.config.get(name, default) not in right:
            raise self.refused(name, " or ".join(map(repr, right)))


def write_rope(args: ModelArgs, max_positions: int, plain: str) -> dict[str, Any]:
    """The rotary part of a config in both spellings, which hold the same."""
    kind = plain if args.rope_factor == 1 else args.rope_scaling
    original = args.rope_original_len if args.rope_factor > 1 else max_positions
    if kind == "yarn":
        # Readers check max_position_embeddings against the factor.
        max_positions = round(args.rope_factor * original)
        scaling = {
            "beta_fast": args.rope_beta_fast,
            "beta_slow": args.rope_beta_slow,
            "truncate": False,
        }
    else:
        scaling = {"low_freq_factor": args.rope_beta_slow, "high_freq_factor": args.rope_beta_fast}
    told: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        told |= {
            "factor": args.rope_factor,
            "original_max_position_embeddings": original,
            **scaling,
        }
    return {
        "max_position_embeddings": max_positions,
        "rope_theta": args.rope_theta,
        "rope_scaling": None if kind == "default" else dict(told),
        "rope_parameters": {"rope_theta": args.rope_theta, **told},
    }


def read_rope(
    fields: Fields, theta: float, max_positions: int, default: dict[str, Any]
) -> dict[str, Any]:
    """RoPE from rope_parameters or from rope_theta and rope_scaling; refused where they differ."""
    max_positions = fields.get("max_position_embeddings", max_positions, int)
    found = []
    for name in ("rope_scaling", "rope_parameters"):  # the first wins in transformers
        told = fields.get(name, None, dict)
        if told:
            found.append(_rope_of(name, {**_theta(fields, theta), **told}, max_positions))
    if len(found) == 2 and found[0] != found[1]:
        raise fields.refused("rope_scaling", f"the same as in rope_parameters ({found[1]})")
    return found[0] if found else _rope_of("rope", {**_theta(fields, theta), **default}, 0)


def _theta(fields: Fields, default: float) -> dict[str, float]:
    return {"rope_theta": fields.get("rope_theta", default, float)}


def _rope_of(name: str, told: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """The fields of ModelArgs for one of transformers' rope dictionaries."""
    if "rope_type" not in told and "type" in told:  # the older spelling
        told = {**told, "rope_type": told["type"]}
    inner = Fields(told, f"{name}.")
    kind = told.get("rope_type", "default")
    inner.only("rope_type", "default", "default", "yarn", "llama3")
    inner.only("partial_rotary_factor", 1.0, 1.0, None)
    theta = {"rope_theta": inner.get("rope_theta", None, float)}
    if kind == "default":
        return theta
    factor = inner.get("factor", None, float)
    if factor is None or factor < 1:
        raise inner.refused("factor", "a number from 1")
    if kind == "yarn":
        betas = _yarn(inner, factor)
    else:
        betas = {
            "rope_beta_slow": inner.get("low_freq_factor", 1.0, float),
            "rope_beta_fast": inner.get("high_freq_factor", 4.0, float),
        }
    if factor == 1:  # either rule then leaves every frequency as it is
        return theta
    original = inner.get("original_max_position_embeddings", max_positions, int)
    extended = {"rope_factor": factor, "rope_scaling": kind, "rope_original_len": original}
    return theta | extended | betas


def _yarn(inner: Fields, factor: float) -> dict[str, float]:
    """The bounds of YaRN's ramp; refused where its ends are rounded or its factor is another."""
    usual = 0.1 * math.log(factor) + 1.0
    if abs(inner.get("attention_factor", usual, float) - usual) > 1e-6:
        raise inner.refused("attention_factor", f"0.1 ln(factor) + 1 = {usual:.6f}")
    if inner.config.get("mscale") and inner.config.get("mscale_all_dim"):
        raise inner.refused("mscale", "none")
    if factor > 1:
        inner.only("truncate", True, False)
    return {
        "rope_beta_fast": inner.get("beta_fast", 32.0, float),
        "rope_beta_slow": inner.get("beta_slow", 1.0, float),
    }
