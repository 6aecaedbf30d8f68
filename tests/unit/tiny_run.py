"""The small run that the estimate's tests count by formula and for real."""

from microtron.certificate import layouts

TINY = (
    "--data.mock",
    "--model.args.dim=64",
    "--model.args.n_layers=4",
    "--model.args.n_heads=8",
    "--model.args.n_kv_heads=4",
    "--model.args.head_dim=16",
    "--model.args.vocab_size=136",
    "--model.args.num_experts=8",
    "--model.args.expert_dim=96",
    "--model.args.hidden_dim=192",
    "--model.args.window=32",
    "--training.seq_len=128",
    "--training.local_batch_size=8",
    "--activation_checkpoint.selective_ac_option=op",
)
DENSE = "--model.args.num_experts=0"
GPT2 = (*layouts.GPT2, "--model.args.max_positions=130")
LLAMA = layouts.LLAMA
