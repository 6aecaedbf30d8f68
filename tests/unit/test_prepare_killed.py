"""prepare, killed at any moment, goes on to the same bytes.

The kill tests run ``KILLER`` in a process of its own, which forks a prepare for every file
operation and kills it there.
"""

import fcntl
import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from test_prepare import ENV, WORK, corpus, files_of, refusal, write_corpus

from microtron.data import prepare as module
from microtron.data import sources, workers
from microtron.data.prepare import prepare
from microtron.data.shards import DatasetInfo, check_shard
from microtron.errors import UserError

KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
from microtron.data import prepare as module, prepare_report, sources, workers

module.CHECKPOINT_S = 0
sources.PART_BYTES = workers.BATCH_CHARS = 700
options, step = json.loads(sys.argv[1]), int(sys.argv[2])

def run(kill_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fsync"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = lambda fd: sys.audit("fsync")  # a killed process loses nothing that was written
    sys.addaudithook(hook)
    module.prepare(**options, out=Path(f"{kill_at}" if kill_at else "whole"), workers=1)
    os._exit(0)

assert run(0) == 0
for moment in range(1, 10_000, step):
    if os.path.isdir("old"):
        shutil.copytree("old", f"{moment}")
    if run(moment) == 0:
        print(*range(1, moment, step))
        break
"""


def run_killer(folder, options, step=1):
    """The moments (1st, 2nd, .. file operation) at which folders of that name were left behind."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(options), str(step)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    return [int(moment) for moment in done.stdout.split()]


def loads_as(folder, complete):
    """The dataset that a reader who checks sizes alone takes the folder for: one of ``complete``,
    or none."""
    try:
        info = DatasetInfo.load(folder)
        for split in ("train", "val"):
            for entry in info.split(split):
                check_shard(folder / entry.file, entry)
    except UserError:
        return None
    (name,) = [
        name
        for name, files in complete.items()
        if all(files_of(folder)[f] == files[f] for f in files if f.endswith(".bin"))
    ]
    assert (folder / "dataset.json").read_bytes() == complete[name]["dataset.json"]
    return name


@pytest.mark.parametrize(("name", "step"), [("a.jsonl", 1), ("a.jsonl.gz", 5)])
def test_killed_at_any_file_operation_it_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, capsys, quick_disk, name, step
):
    monkeypatch.setattr(sources, "PART_BYTES", 700)
    monkeypatch.setattr(workers, "BATCH_CHARS", 700)
    spec = write_corpus(tmp_path / name, corpus(9))
    options = {"source": spec, "tokenizer": "char", "shard_tokens": 600, "val_fraction": 0.2}
    moments = run_killer(tmp_path, options, step)
    complete = {"whole": files_of(tmp_path / "whole")}
    assert len(moments) * step > 60
    assert len([f for f in complete["whole"] if f.startswith("train")]) > 2
    resumed, told = 0, set()
    read = module.list_tasks

    def note_start(parts, field, start=(0, 0)):
        told.add(start)
        return read(parts, field, start)

    monkeypatch.setattr(module, "list_tasks", note_start)
    for moment in moments:
        out = tmp_path / str(moment)
        if not out.exists():  # killed before anything was written
            continue
        unfinished = loads_as(out, complete) is None
        for path in (out / WORK).glob("*.bin"):  # a shard that passes its check has its content
            check_shard(path)
            assert path.read_bytes() == complete["whole"][path.name]
        prepare(**options, out=out, workers=1)
        shown = {f: c for f, c in files_of(out).items() if not f.startswith(WORK)}
        assert shown == complete["whole"]
        resumed += unfinished
    assert "starting anew" not in capsys.readouterr().err
    assert resumed * step > 50 and len(told) > 2  # it went on from where it was, not from the start


def test_an_overwrite_killed_at_any_file_operation_leaves_the_old_the_new_or_none(
    tmp_path, quick_disk
):
    """Old and new hold as many tokens: only their contents tell them apart."""
    texts = [f"{text} {i}".encode("ascii", "ignore").decode() for i, text in enumerate(corpus(6))]
    spec = write_corpus(tmp_path / "a.jsonl", texts)
    options = {"source": spec, "tokenizer": "byte", "shard_tokens": 700, "val_fraction": 0.2}
    prepare(**options, out=tmp_path / "old")
    complete = {"old": files_of(tmp_path / "old")}
    options |= {"tokenizer": "char", "overwrite": True}
    moments = run_killer(tmp_path, options)
    complete["whole"] = files_of(tmp_path / "whole")
    old, new = DatasetInfo.load(tmp_path / "old"), DatasetInfo.load(tmp_path / "whole")
    assert [e.tokens for e in old.split("train")] == [e.tokens for e in new.split("train")]
    assert old.fingerprint("train") != new.fingerprint("train")
    states = []
    for moment in moments:
        out = tmp_path / str(moment)
        states.append(loads_as(out, complete))
        prepare(**options, out=out, workers=1)
        assert loads_as(out, complete) == "whole"
    assert set(states) == {"old", None, "whole"}
    assert states == sorted(states, key=["old", None, "whole"].index)


def test_kill_9_with_workers_leaves_no_process_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 20_000)
    spec = write_corpus(tmp_path / "a.jsonl", corpus(3000))
    options = {"source": spec, "tokenizer": "char", "shard_tokens": 50_000, "val_fraction": 0.1}
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from microtron.data import prepare as module, sources\n"
        "module.Progress.update = lambda self, size: time.sleep(0.1)\n"
        "module.CHECKPOINT_S, module.POOL_BYTES, sources.PART_BYTES = 0, 0, 20_000\n"
        "module.prepare(**json.loads(sys.argv[1]), out=Path(sys.argv[2]), workers=2)\n"
    )
    prepare(**options, out=tmp_path / "whole")
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(options), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENV,
    )
    deadline = time.monotonic() + 60
    while (
        not (state := out / WORK / "state.json").exists()
        or not json.loads(state.read_text())["documents"]
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1], "workers outlive a killed prepare"
    assert loads_as(out, {"whole": files_of(tmp_path / "whole")}) is None
    prepare(**options, out=out)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_unfinished_work_of_other_settings_is_refused_by_name(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", [*corpus(), 3])
    options = {"source": spec, "tokenizer": "byte", "out": tmp_path / "out", "val_fraction": 0.3}
    assert "line 61" in refusal(**options)
    assert "tokenizer: byte there, char now" in refusal(**options | {"tokenizer": "char"})
    assert "line 61" in refusal(**options)


@pytest.mark.parametrize("damage", ["spool", "shard", "parts"])
def test_unfinished_work_that_was_damaged_starts_anew(
    tmp_path, monkeypatch, quick_disk, damage, capsys
):
    monkeypatch.setattr(sources, "PART_BYTES", 700)
    monkeypatch.setattr(module, "CHECKPOINT_S", 0)
    (good := corpus()).append("the end")
    options = {
        "tokenizer": "byte",
        "out": tmp_path / "out",
        "shard_tokens": 900,
        "source": write_corpus(tmp_path / "a.jsonl", good),
    }
    with monkeypatch.context() as patch:
        patch.setattr(module.Spool, "finish", lambda self: (_ for _ in ()).throw(OSError("pulled")))
        assert "pulled" in refusal(**options)
    work = tmp_path / "out" / WORK
    if damage == "parts":  # as another version might cut them: the position would mean another
        monkeypatch.setattr(sources, "PART_BYTES", 800)
    else:
        path = sorted(work.glob("train_*.spool" if damage == "spool" else "train_*.bin"))[-1]
        path.write_bytes(path.read_bytes()[:-4])
    prepare(**options)
    assert "starting anew" in capsys.readouterr().err
    prepare(**options | {"out": tmp_path / "whole"})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    (tmp_path / "out" / WORK).mkdir(parents=True)
    with open(tmp_path / "out" / WORK / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another `microtron prepare` is writing" in refusal(
            source=spec, tokenizer="byte", out=tmp_path / "out"
        )
    prepare(source=spec, tokenizer="byte", out=tmp_path / "out")
