"""Upload to the hub, against a stand-in of its HTTP interface: what arrives, what never does."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from exporting import args_of, write_step
from hub import Hub

from microtron.errors import UserError
from microtron.hf import push, to_hf

TOKEN = "hf_ThisIsASecretThatNobodyMaySee"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export in several shards."""
    folder = tmp_path_factory.mktemp("push")
    step = write_step(folder / "step-3", args_of("llama"))
    return to_hf.export(step, folder / "out", max_shard_gib=1e-4, check=False)


@pytest.fixture
def client(monkeypatch, tmp_path):
    """The library as a user has it, pointed at a hub; settings are read when it is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")

    def connect(url, token=TOKEN):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)

    return connect


def test_every_byte_arrives_in_one_commit(export, client, capfd):
    with Hub() as hub:
        client(hub.url)
        address = push.push(export, "me/model", private=True, message="the first")
    assert hub.files == {path.name: path.read_bytes() for path in export.iterdir()}
    assert {"README.md", "config.json", "tokenizer.json"} < hub.files.keys()
    assert len(hub.blobs) > 1 and len(hub.commits) == 1
    assert hub.commits[0]["summary"] == "the first"
    assert hub.commits[0]["path"] == "/api/models/me/model/commit/main"
    created = hub.created[0]
    assert (created["organization"], created["name"]) == ("me", "model")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert hub.tokens == {f"Bearer {TOKEN}"}
    told = capfd.readouterr()
    assert told.out == f"pushed {export} to me/model: {len(hub.files)} files, {address}\n"
    assert TOKEN not in told.out + told.err


def test_a_branch(export, client):
    with Hub() as hub:
        client(hub.url)
        push.push(export, "me/model", revision="step-3")
    assert "/api/models/me/model/branch/step-3" in hub.calls
    assert hub.commits[0]["path"].endswith("/commit/step-3")


def test_the_command_as_a_user_calls_it(export, tmp_path):
    """In a process of its own: settings from the environment, the token in no file it leaves."""
    with Hub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "microtron.cli", "push", str(export), "me/model"],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "HOME": str(tmp_path),
                "HF_HOME": str(tmp_path / "hf"),
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_XET": "1",
            },
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in export.iterdir()}
    assert TOKEN not in done.stdout and done.stderr == ""
    left = [p for p in [*tmp_path.rglob("*"), *export.iterdir()] if p.is_file()]
    assert not [p for p in left if TOKEN.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    ("where", "status", "told"),
    [
        ("/create", 401, "does not accept the token.*HF_TOKEN"),
        ("/create", 403, "token may not write there"),
        ("/preupload", 404, "no such repository"),
        ("/commit", 400, "refuses the request.*a reason"),
        ("/objects/batch", 403, "token may not write there"),
    ],
)
def test_what_the_hub_refuses_is_one_line(export, client, where, status, told):
    with Hub({where: (status, "a reason")}) as hub:
        client(hub.url)
        with pytest.raises(UserError, match=f"push to me/model: .*{told}") as caught:
            push.push(export, "me/model")
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert f"({status}" in str(caught.value) and not hub.files


def test_no_token_no_network_no_name(export, client, monkeypatch):
    with Hub() as hub:
        client(hub.url, token=None)
        with pytest.raises(UserError, match="'not/a/name' cannot name a .*give USER/NAME"):
            push.push(export, "not/a/name")
        with pytest.raises(UserError, match="set HF_TOKEN, or run `hf auth login`"):
            push.push(export, "me/model")
        client(hub.url)
        assert not hub.calls
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client(f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="cannot be reached .*check the network"):
            push.push(export, "me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        push.push(export, "me/model")


# -- what may be sent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "optimizer.pt",
        "model.bin",
        "run.log",
        "modelling.py",
        "old.config.json",
        "LICENSE.pt",
    ],
)
def test_only_an_export_is_sent(export, tmp_path, name):
    folder = shutil.copytree(export, tmp_path / "out")
    assert push.files_of(folder) == sorted(p.name for p in export.iterdir())
    (folder / name).write_text("x")
    with pytest.raises(UserError, match=f"no part of an export .*{name}"):
        push.files_of(folder)


def test_no_folders_and_no_links(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "out")
    (folder / "vocab.json").mkdir()
    with pytest.raises(UserError, match=r"no part of an export \(vocab\.json\)"):
        push.files_of(folder)
    (folder / "vocab.json").rmdir()
    (tmp_path / "elsewhere").write_text("private")
    (folder / "LICENSE").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no part of an export \(LICENSE\)"):
        push.files_of(folder)


def test_a_checkpoint_and_half_an_export_are_not_sent(export, tmp_path):
    step = write_step(tmp_path / "step-1", args_of("llama"))
    with pytest.raises(UserError, match=f"run `microtron convert to-hf {step} OUT`, then push OUT"):
        push.files_of(step)
    with pytest.raises(UserError, match="is not a folder"):
        push.files_of(tmp_path / "nothing")
    folder = shutil.copytree(export, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    missing = sorted(index["weight_map"].values())[1]
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        push.files_of(folder)
