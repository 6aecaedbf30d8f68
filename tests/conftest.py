"""What every test needs: one thread, no network, no GPU tests without a GPU.

The environment is set before torch is imported: with two OpenMP threads small matrices spin-wait.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skips, with the reason, what this machine cannot run."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords have a case's name too
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A dataset folder of a few thousand byte tokens, prepared as a person would."""
    from microtron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        words = [f"line {j} of text {i} says {'abcdefghij'[j % 10] * (j % 7)}" for j in range(40)]
        (folder / f"text{i}.txt").write_text("\n".join(words))
    prepare(source=f"text:{folder}/*.txt", tokenizer="byte", out=folder / "data", workers=1)
    return folder / "data"


@pytest.fixture
def quick_disk(monkeypatch):
    """Without fsync, which costs milliseconds a call and guards against power failure alone."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
