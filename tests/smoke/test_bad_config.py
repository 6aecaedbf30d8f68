"""Bad input that the configuration shows: one line, before the run's folder exists.

What only data, disks and checkpoints can show is in test_bad_input.py.
"""

import pytest
from runs import assert_one_line

from microtron import startup, train

MOCK = "--data.mock"

# TOML, what the line says: the value, and how to go on.
TOML = {
    "key": ("[training]\nstpes = 3", ["training.stpes", "did you mean training.steps"]),
    "key without a section": ("steps = 3", ["no key steps", "did you mean training.steps"]),
    "section": ("[trainning]\nsteps = 3", ["no section trainning", "did you mean training"]),
    "inner section": ("[model.arg]\ndim = 8", ["no section model.arg", "did you mean model.args"]),
    "inner key": ("[model.args]\ndims = 8", ["model.args.dims", "did you mean model.args.dim"]),
    "section as a key": ("training = 3", ["training = 3", "write [training]"]),
    "not TOML": ("[training]\nsteps 3", ["is not TOML", "line 2", "mend that place"]),
    "not text": (b"\xff\xfe\x00", ["is not TOML", "byte 0xff", "mend that place"]),
    "str for int": ('[training]\nsteps = "3"', ["training.steps = '3'", "a whole number"]),
    "float for int": ("[training]\nsteps = 1.5", ["training.steps = 1.5", "a whole number"]),
    "int for list": ("[data]\ndirs = 3", ["data.dirs = 3", "a list"]),
    "str for list": ('[data]\ndirs = "a"', ["data.dirs = 'a'", "a list"]),
    "list of str": ('[data]\nweights = ["a"]', ["data.weights = ['a']", "each item a number"]),
    "bool for float": ("[optimizer]\nlr = true", ["optimizer.lr = True", "a number"]),
    "int for bool": ("[validation]\nenable = 1", ["validation.enable = 1", "true or false"]),
    "choice": ('[model.args]\nattn_backend = "flash"', ["'flash'", "'eager', 'sdpa'"]),
    "not a number": ("[optimizer]\nlr = nan", ["optimizer.lr = nan", "give a finite number"]),
}
# Arguments beside data.mock, what the line says.
ARGUMENTS = {
    "--training.stpes=3": ["--training.stpes", "did you mean training.steps"],
    "--steps 3": ["--steps", "did you mean training.steps"],
    "--xyzzy=3": ["--xyzzy", "--help lists them"],
    "--training.steps=three": ["--training.steps=three", "a whole number"],
    "--training.steps three": ["--training.steps=three", "a whole number"],
    "--training.steps": ["--training.steps", "has no value", "a whole number"],
    "--model.args.dim=wide": ["--model.args.dim=wide", "a whole number"],
    "--model.args.sinks=maybe": ["--model.args.sinks=maybe", "true or false"],
    "--data.weights=1,b": ["--data.weights=1,b", "each item a number"],
    "stray": ["'stray'", "write --section.key=value"],
    "-n 3": ["'-n'", "--section.key=value"],
    "--job.config_file=nowhere.toml": ["'nowhere.toml'", "train_configs/ holds ready ones"],
    "--job.dump_folder=": ["job.dump_folder = ''", "name the folder"],
    "--job.custom_config_module=os": ["job.custom_config_module = 'os'", "leave it out"],
    "--model.name=llama3": ["'llama3'", "write microtron"],
    "--model.flavor=gpt5": ["'gpt5'", "choose one of debug, gpt_oss_656m"],
    "--model.args.top_k=5": ["model.args.top_k = 5", "from 1 to num_experts = 4"],
    "--model.args.n_kv_heads=3": ["model.args.n_kv_heads = 3", "divisor of n_heads = 4"],
    "--model.args.head_dim=12": ["model.args.head_dim = 12", "multiple of 8"],
    "--model.args.window=0": ["model.args.window = 0", "give a positive number"],
    "--model.args.window_pattern=SXL": ["'SXL'", "write it with S"],
    "--model.args.num_experts=0": ["hidden_dim = 0", "needs a feed-forward width"],
    "--model.args.experts_backend=triton": ["triton", "'loop', 'grouped_mm'"],
    "--checkpoint.keep_latest_k=1": ["keep_latest_k = 1", "keep 2 or more"],
    "--checkpoint.load_step=-2": ["load_step = -2", "-1 for the newest"],
    "--validation.val_target=2.0": ["val_target = 2.0", "set validation.enable = true"],
    "--validation.enable": ["validation.enable = True", "leave out one of the two"],
    "--data.dirs=a,b --data.weights=1": ["data.weights = [1.0]", "each of the 2 folders"],
    "--data.no-mock": ["data.dirs = []", "`microtron prepare`", "data.mock = true"],
    "--training.seq_len=0": ["training.seq_len = 0", "give a positive number"],
    "--model.flavor=gpt2_124m --training.seq_len=1025": [
        "training.seq_len = 1025",
        "model.args.max_positions = 1024: give that or less",
    ],
    "--model.flavor=gpt2_124m --training.seq_len=8 --validation.enable --validation.seq_len=1025": [
        "validation.seq_len = 1025",
        "max_positions = 1024",
    ],
    "--eval.hellaswag=x --eval.hellaswag_freq=0": ["hellaswag_freq = 0", "a positive number"],
    "--eval.hellaswag=x --eval.hellaswag_examples=0": ["hellaswag_examples = 0", "-1 for all"],
    "--training.steps=0": ["training.steps = 0", "give a positive number"],
    "--training.global_batch_size=0": ["global_batch_size = 0", "-1 for one micro-batch"],
    "--optimizer.lr=-1": ["optimizer.lr = -1.0", "above 0"],
    "--optimizer.lr=inf": ["optimizer.lr = inf", "give a finite number"],
    "--optimizer.name=Lion": ["'Lion'", "choose Adam or AdamW"],
    "--optimizer.weight_decay=-1": ["weight_decay = -1.0", "give 0 (off)"],
    "--optimizer.beta1=1.5": ["optimizer.beta1 = 1.5", "from 0 to below 1"],
    "--lr_scheduler.min_lr_factor=2": ["min_lr_factor = 2.0", "from 0 to 1"],
    "--lr_scheduler.total_steps=3": ["total_steps = 3", "at least training.steps = 10000"],
    "--debug.seed=99999999999999999999": ["debug.seed = 99999999999999999999", "2^63 - 1"],
    "--model.converters=float8": ["model.converters = ['float8']", "leave it out"],
    "--checkpoint.initial_load_in_hf": ["initial_load_in_hf = True", "initial_load_path"],
    "--checkpoint.initial_load_in_hf_quantized": ["_quantized = True", "convert from-hf"],
    "--checkpoint.last_save_in_hf --model.args.load_balance=bias": [
        "last_save_in_hf = True",
        "load_balance = aux_loss",
    ],
    "--validation.steps=10": ["validation.steps = 10", "leave it out"],
    "--comm.mode=fake_backend": ["'fake_backend'", "leave it out"],
    "--compile.enable --compile.backend=fast": ["'fast'", "inductor"],
    "--activation_checkpoint.mode=selective --activation_checkpoint.selective_ac_option=x": [
        "selective_ac_option = 'x'",
        "give op",
    ],
}
ON_CPU = {
    "--model.args.attn_backend=flex": ["'flex'", "use sdpa"],
    "--checkpoint.async_mode=async_with_pinned_mem": ["'async_with_pinned_mem'", "use async"],
    "--training.enable_cpu_offload": ["enable_cpu_offload = True", "leave it out"],
}


@pytest.fixture
def refused_at_once(monkeypatch, capsys):
    """Runs `microtron.train` here and checks its refusal; the run's folder is never opened."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")

    def opened(path):
        pytest.fail(f"{path} was opened")

    monkeypatch.setattr(startup, "open_folder", opened)

    def check(argv, told):
        assert train.main(argv) == 1
        assert_one_line(capsys.readouterr().err, *told)

    return check


@pytest.mark.parametrize("case", TOML)
def test_toml(tmp_path, refused_at_once, case):
    text, told = TOML[case]
    file = tmp_path / "run.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    at = [] if case == "not a number" else [str(file)]
    refused_at_once([f"--job.config_file={file}"], [*at, *told])


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments(refused_at_once, arguments):
    refused_at_once([MOCK, *arguments.split()], ARGUMENTS[arguments])


@pytest.mark.parametrize("arguments", ON_CPU)
def test_what_needs_cuda(refused_at_once, arguments):
    if train.DEVICE_TYPE == "cuda":
        pytest.skip("this machine has what is refused")
    refused_at_once([MOCK, *arguments.split()], ON_CPU[arguments])
