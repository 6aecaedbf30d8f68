"""A TOML and a command line become one JobConfig: who wins, what is understood, what comes back."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import tomli

from microtron import check, config, parse
from microtron.errors import UserError, unboxed
from microtron.flavors import FLAVORS
from microtron.model.args import ModelArgs
from microtron.startup import write_config

CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
MERGED = parse.ConfigManager._merge_configs(parse.JobConfig, config.JobConfig)
KNOWN = parse.option_types(MERGED)


@pytest.fixture
def job_of(tmp_path):
    """Parses a TOML text and arguments; data are mock unless the arguments say otherwise."""

    def make(toml="", *argv):
        file = tmp_path / "run.toml"
        file.write_text(toml)
        return parse.parse([f"--job.config_file={file}", "--data.mock", *argv])

    return make


# -- who wins -------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_toml_over_the_defaults(job_of):
    toml = "[training]\nsteps = 7\nseq_len = 64\n[optimizer]\nlr = 1e-3"
    job = job_of(toml, "--training.steps=8")
    assert (job.training.steps, job.training.seq_len, job.optimizer.lr) == (8, 64, 1e-3)
    assert job.training.local_batch_size == parse.JobConfig().training.local_batch_size
    assert job.checkpoint.enable and job.debug.seed == 1337  # ours, not TorchTitan's
    assert job.job.custom_config_module == "microtron.config"


def test_the_last_of_two_arguments_wins(job_of, tmp_path):
    assert job_of("", "--training.steps=8", "--training.steps=9").training.steps == 9
    other = tmp_path / "other.toml"
    other.write_text("[training]\nsteps = 11")
    job = job_of("[training]\nsteps = 7", f"--job.config_file={other}")
    assert job.training.steps == 11 and job.job.config_file == str(other)


def test_fields_of_the_flavor_can_be_replaced_from_both_sides(job_of):
    toml = "[model.args]\ndim = 64\ntop_k = 1\nsinks = false\nrope_theta = 10000"
    job = job_of(toml, "--model.args.dim=96", "--model.args.qk_norm=true")
    assert config.overrides(job) == {
        "dim": 96,
        "top_k": 1,
        "sinks": False,
        "rope_theta": 10000.0,
        "qk_norm": True,
    }
    args = config.resolved_args(job)
    assert (args.dim, args.top_k, args.sinks, args.qk_norm) == (96, 1, False, True)
    assert args.n_layers == FLAVORS["debug"]().n_layers
    assert type(args.rope_theta) is float


def test_every_field_of_the_model_is_an_option_of_its_own_type(job_of):
    fields = {f.name: f.type for f in dataclasses.fields(ModelArgs)}
    options = {n.rpartition(".")[2]: t for n, t in KNOWN.items() if n.startswith("model.args.")}
    assert options.keys() == fields.keys()
    for name, expected in fields.items():
        assert parse.matches(getattr(ModelArgs(), name), options[name]), name
        assert parse.describe(options[name]) == parse.describe(expected)
    values = {f: getattr(FLAVORS["gpt_oss_20b"](), f) for f in fields}
    argv = [f"--model.args.{name}={value}" for name, value in values.items()]
    assert config.overrides(job_of("", *argv)) == values


# -- what is understood ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--training.seq_len=32"], "training.seq_len", 32),
        (["--training.seq-len", "32"], "training.seq_len", 32),
        (["--optimizer.lr=1e-4"], "optimizer.lr", 1e-4),
        (["--optimizer.lr", ".5"], "optimizer.lr", 0.5),
        (["--training.max_norm=2"], "training.max_norm", 2.0),
        (["--debug.deterministic"], "debug.deterministic", True),
        (["--debug.deterministic=true"], "debug.deterministic", True),
        (["--debug.deterministic=False"], "debug.deterministic", False),
        (["--checkpoint.no-enable"], "checkpoint.enable", False),
        (["--checkpoint.enable=false"], "checkpoint.enable", False),
        (["--data.dirs=a,b"], "data.dirs", ["a", "b"]),
        (["--data.dirs", "a", "b", "--data.weights", "1", "2.5"], "data.weights", [1.0, 2.5]),
        (["--data.dirs=a,b", "--data.weights=1,2.5"], "data.weights", [1.0, 2.5]),
        (["--model.args.sinks=false"], "model.args.sinks", False),
        (["--model.args.sinks=None"], "model.args.sinks", None),
        (["--model.args.window_pattern=SSL"], "model.args.window_pattern", "SSL"),
        (["--sample.prompt=--a=b, c"], "sample.prompt", "--a=b, c"),
        (["--sample.prompt="], "sample.prompt", ""),
        (["--sample.prompt", "two\nlines"], "sample.prompt", "two\nlines"),
        (["--lr_scheduler.decay_ratio=0.2"], "lr_scheduler.decay_ratio", 0.2),
        (["--checkpoint.load_step", "-1"], "checkpoint.load_step", -1),
    ],
)
def test_spellings_of_an_argument(job_of, argv, name, value):
    found = job_of("[debug]\ndeterministic = true" if value is False else "", *argv)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_every_option_is_read_as_torchtitan_reads_it():
    """ConfigManager, which takes its time, is the twin."""
    left_out = {"job.config_file", "experimental.custom_args_module", "model.tokenizer_path"}
    words = ("7", "0.5", "true", "None", "word", "a,b", "1,2.5")
    given, argv = {}, ["--job.custom_config_module=microtron.config"]
    for number, (name, expected) in enumerate(sorted(KNOWN.items())):
        fitting = []
        for word in (*getattr(expected, "__args__", ()), *words):  # the words of a Literal too
            with contextlib.suppress(ValueError):
                if isinstance(word, str):
                    fitting.append((word, parse.reading(word, expected)))
        if name in left_out or name in ("job.custom_config_module", "model.hf_assets_path"):
            continue
        word, given[name] = fitting[number % len(fitting)]
        section, _, key = name.rpartition(".")
        if expected is bool:
            argv.append(f"--{section}.{key}")
        elif expected in (list[int], list[float]):
            argv += [f"--{name}", *word.split(",")]
        else:
            argv.append(f"--{name}={word.capitalize() if given[name] is True else word}")
    theirs = parse.ConfigManager().parse_args(argv)
    ours = parse.merge(MERGED, {}, given)
    assert len(given) > 200 and repr(ours) == repr(theirs)


def test_a_section_that_refuses_itself(job_of):
    for option in ("--parallelism.context_parallel_load_balancer=", "--validation.steps=-3"):
        section = option[2:].partition(".")[0]
        with pytest.raises(UserError, match=f"section {section} is refused") as refused:
            job_of("", option)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("training.stpes", "training.steps"),
        ("trianing.steps", "training.steps"),
        ("steps", "training.steps"),
        ("seq_len", "training.seq_len"),
        ("model.arg.dim", "model.args.dim"),
        ("model.args.n_expert", "model.args.num_experts"),
        ("model.dim", "model.args.dim"),
        ("checkpoint.intervall", "checkpoint.interval"),
        ("qwertz", None),
    ],
)
def test_the_closest_name(typed, meant):
    told = parse.closest(typed, KNOWN)
    listed = "; ./run_train.sh --help lists them all"
    assert told == (f"; did you mean {meant}?" if meant else listed)


@pytest.mark.parametrize(
    "expected, fitting, wrong, words",
    [
        (int, [0, -3], [1.0, True, "1", None], "a whole number"),
        (float, [0, 1.5, -2], [True, "1.5", None], "a number"),
        (bool, [True, False], [0, 1, "true"], "true or false"),
        (str, ["", "a"], [1, None, ["a"]], "a text"),
        (str | None, ["a", None], [1], "a text"),
        (float | int, [1, 2.5], ["1"], "a number or a whole number"),
        (list[str], [[], ["a"]], ["a", [1]], "a list, each item a text,"),
        (list[float], [[1, 2.5]], [[True], 1.0], "a list, each item a number,"),
        (Literal["a", "b"], ["a"], ["c", 1], "one of 'a', 'b'"),
    ],
)
def test_types(expected, fitting, wrong, words):
    assert all(parse.matches(value, expected) for value in fitting)
    assert not any(parse.matches(value, expected) for value in wrong)
    assert parse.describe(expected) == words


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse.parse(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for name in ("model.args.window-pattern", "data.document-mask", "training.steps"):
        assert f"--{name}" in told
    assert "Keys a window layer sees, the token itself included." in " ".join(told.split())


def test_a_complaint_of_tyro_loses_its_frame():
    box = (
        "╭─ Value error ──────╮\n│ Error parsing --a: │\n│ it is no number    │\n│ ──────── │\n"
        "│ Argument helptext: │\n│ much of it │\n╰────────────────────╯\n"
    )
    assert unboxed(box) == "Error parsing --a: it is no number"


# -- auto, and what is checked --------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, dtype, mode", [("cpu", "float32", "disabled"), ("cuda", "bfloat16", "async")]
)
def test_auto(job_of, monkeypatch, device, dtype, mode):
    monkeypatch.setattr(parse, "DEVICE_TYPE", device)
    job = job_of("[training]\nseq_len = 48")
    assert job.training.mixed_precision_param == dtype
    assert job.checkpoint.async_mode == mode
    assert job.validation.seq_len == 48
    told = job_of(
        "",
        "--training.mixed_precision_param=bfloat16",
        "--checkpoint.async_mode=async",
        "--validation.seq_len=16",
    )
    assert told.training.mixed_precision_param == "bfloat16"
    assert told.checkpoint.async_mode == "async" and told.validation.seq_len == 16


def test_rules_speak_of_options_that_exist():
    assert check.RULES.keys() <= KNOWN.keys()
    sections = {name.rsplit(".", n)[0] for name in KNOWN for n in range(name.count("."))}
    assert set(check.NOT_HERE) <= KNOWN.keys() | sections | {n.split(".")[0] for n in KNOWN}


def test_the_defaults_pass_every_rule(job_of):
    job = job_of()
    check.check(job)
    for name in check.RULES:
        found = job
        for part in name.split("."):
            found = getattr(found, part)
        assert check.RULES[name][0](found), name


def test_two_jobs_share_nothing(job_of):
    first = job_of()
    first.data.dirs.append("mine")
    first.model.args.dim = 8
    second = job_of()
    assert second.data.dirs == [] and second.model.args.dim is None


# -- the shipped files, and what a run writes -----------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)  # without data or outputs
    job = parse.parse([f"--job.config_file={path}"])
    config.resolved_args(job)
    assert job.job.description and job.job.dump_folder.startswith("outputs/")
    assert not list(tmp_path.iterdir())


def as_told(job):
    """The job without the name of its file."""
    table = job.to_dict()
    table["job"].pop("config_file")
    return table


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_written_config_is_the_same_job(tmp_path, path):
    job = parse.parse(
        [
            f"--job.config_file={path}",
            "--model.args.qk_norm=true",
            '--sample.prompt=a "quoted"\nline',
            "--optimizer.lr=3.3e-5",
            "--checkpoint.no-enable",
            "--checkpoint.keep_latest_k=0",
            "--model.args.sinks=false",
            "--data.tokenizer=",
        ]
    )
    write_config(tmp_path / "config.toml", job.to_dict())
    written = tomli.loads((tmp_path / "config.toml").read_text())
    assert "config_file" not in written["job"] and written["model"]["args"]["qk_norm"] is True
    again = parse.parse([f"--job.config_file={tmp_path / 'config.toml'}"])
    assert as_told(again) == as_told(job)
    write_config(tmp_path / "again.toml", again.to_dict())
    assert (tmp_path / "again.toml").read_text() == (tmp_path / "config.toml").read_text()


def test_a_toml_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        parse.read_toml(str(tmp_path))
    with pytest.raises(UserError, match="No such file"):
        parse.read_toml(str(tmp_path / "none.toml"))
