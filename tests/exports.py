"""Small models of each family, and the Hugging Face folders that hold the same weights.

Written claim by claim from the table of names, without the export command: a test of the way back
stands on its own feet.
"""

import json

from helpers import GPT2, LLAMA, build_random, tiny_args
from safetensors.torch import save_file

from microtron.hf import keys
from microtron.hf.config import to_config

FAMILIES = {"gpt_oss": {"load_balance": "aux_loss"}, "gpt2": GPT2, "llama": LLAMA}


def family(name, **overrides):
    """ModelArgs of a tiny gpt_oss, gpt2 or llama."""
    return tiny_args(**(FAMILIES[name] | overrides))


def theirs(model, args):
    """A model's weights in the names of transformers."""
    ours, found = model.state_dict(), {}
    for claim in keys.claims(args):
        values = claim.to_hf([ours[name] for name in claim.ours])
        found.update(zip(claim.theirs, (v.contiguous() for v in values), strict=True))
    return found


def write_folder(folder, args, seed=0, tensors=None, **config):
    """A Hugging Face folder of random weights; returns the model that has them."""
    model = build_random(args, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs(model, args) if tensors is None else tensors, folder / "model.safetensors")
    told = to_config(args, max_positions=64) | config
    (folder / "config.json").write_text(json.dumps(told))
    return model
