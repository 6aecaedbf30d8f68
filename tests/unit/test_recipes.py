"""Recipes in train_configs/: each parses, and runs on the ranks that its first lines state."""

import re
from pathlib import Path

import pytest

from microtron.parallel import layout
from microtron.parallel.layout import check_layout
from microtron.parse import parse

RECIPES = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))


def header(path):
    """The comment above the first table."""
    return path.read_text().partition("\n[")[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_on_the_ranks_that_they_state(monkeypatch, path):
    monkeypatch.setattr(layout, "DEVICE_TYPE", "cuda")
    job = parse([f"--job.config_file={path}"])
    stated = re.findall(r"(\d+) ranks?\b", header(path))
    for ranks in map(int, stated[:1] or (1, 2, 8)):
        assert check_layout(job, ranks).world == ranks
    if stated:
        nodes, each = re.search(r"(?:NNODES=(\d+) )?NGPU=(\d+) ", header(path)).groups()
        assert int(nodes or 1) * int(each) == int(stated[0])
        assert f"./run_train.sh train_configs/{path.name}" in header(path)


def test_the_656m_recipes_are_one_run():
    """The same model, data, tokens a step, steps, schedule; other ranks."""
    same = ["optimizer", "lr_scheduler", "data", "model", "compile", "checkpoint", "debug"]
    one = parse([f"--job.config_file={RECIPES[0].parent}/gpt_oss_656m.toml"])
    told = one.to_dict()
    recipes = [p for p in RECIPES if p.stem.startswith("gpt_oss_656m")]
    assert len(recipes) == 9
    folders = set()
    for path in recipes:
        job = parse([f"--job.config_file={path}"])
        tokens = job.training.global_batch_size * job.training.seq_len
        assert tokens == one.training.global_batch_size * one.training.seq_len
        for section in same:
            assert job.to_dict()[section] == told[section], (path.stem, section)
        assert job.training.steps == one.training.steps
        assert job.validation.val_tokens == one.validation.val_tokens
        folders.add(job.job.dump_folder)
    assert len(folders) == len(recipes)
