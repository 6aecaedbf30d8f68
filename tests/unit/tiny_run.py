"""The small run that the estimate's tests count by formula and for real."""

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
GPT2 = (
    DENSE,
    "--model.args.norm=layer",
    "--model.args.positions=learned",
    "--model.args.max_positions=130",
    "--model.args.activation=gelu",
    "--model.args.sinks=false",
    "--model.args.window_pattern=L",
    "--model.args.n_kv_heads=8",
)
LLAMA = (
    DENSE,
    "--model.args.activation=swiglu",
    "--model.args.sinks=false",
    "--model.args.window_pattern=L",
    "--model.args.attention_bias=false",
    "--model.args.mlp_bias=false",
)
