"""Small checkpoints of each family that transformers knows, for the tests of exports."""

from helpers import build_random, tiny_args
from safetensors import safe_open

from microtron import checkpoints, dcp
from microtron.data.tokenizers import load_tokenizer

DENSE = {"sinks": False, "window_pattern": "L", "num_experts": 0}
GPT2 = DENSE | {
    "norm": "layer",
    "positions": "learned",
    "max_positions": 64,
    "activation": "gelu",
    "n_heads": 5,
    "n_kv_heads": 5,
    "head_dim": 8,
    "tie_embeddings": True,
}
LLAMA = DENSE | {"activation": "swiglu", "attention_bias": False, "mlp_bias": False}
YARN = {"rope_theta": 100.0, "rope_factor": 4.0, "rope_original_len": 64, "rope_beta_fast": 4.0}
FAMILIES = {"gpt_oss": YARN, "gpt2": GPT2, "llama": LLAMA}


def write_step(step, args, tokenizer="byte", change=None, **facts):
    """A checkpoint of random weights; ``change`` may spoil them first."""
    state = {name: value.detach() for name, value in build_random(args).state_dict().items()}
    for name, spoil in (change or {}).items():
        spoil(state[name])
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    facts = {"step": 3, "tokens": 384, "seq_len": 32} | facts
    checkpoints.write_identity(step, args, tokenizer, facts)
    dcp.write_step(step, {n: (v.shape, v.dtype) for n, v in state.items()}, state.__getitem__)
    return step


def args_of(family="gpt_oss", **overrides):
    return tiny_args(**(FAMILIES[family] | {"vocab_size": 264} | overrides))


def weights_of(folder):
    """Every tensor as the files hold it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found
