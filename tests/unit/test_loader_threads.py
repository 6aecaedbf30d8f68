"""The loader's thread: when it starts, what it holds, how it ends, and what a fork does to it."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_loader import make, take, unique_shards
from test_shards import write_dataset


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", unique_shards(), unique_shards(), dtype="uint32")


def threads():
    return [t for t in threading.enumerate() if t.name == "microtron-loader"]


def test_thread_starts_late_and_ends(data):
    loader = make(data, prefetch=2)
    batches = iter(loader)
    assert threads() == []
    next(batches)
    assert len(threads()) == 1 and threads()[0].daemon
    loader.close()
    loader.close()
    assert threads() == []
    with pytest.raises(RuntimeError, match="call iter"):
        next(batches)
    batches = iter(loader)
    next(batches)
    del batches
    gc.collect()
    assert threads() == []
    list(make(data, split="val", infinite=False, prefetch=2))
    assert threads() == []


def test_no_more_than_prefetch_batches_wait(data):
    loader, loaded = make(data, prefetch=3), []
    load = loader._load
    loader._load = lambda position: loaded.append(position) or load(position)
    batches = iter(loader)
    for taken in (1, 2, 5):
        while loader.state_dict()["position_samples"] < taken:
            next(batches)
        deadline = time.monotonic() + 5
        while len(loaded) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # room for one too many
        assert loaded == list(range(taken + 3))
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_only_the_newest_iterator_is_valid(data, prefetch):
    loader = make(data, prefetch=prefetch)
    old, new = iter(loader), iter(loader)
    next(new)
    with pytest.raises(RuntimeError, match="call iter"):
        next(old)
    next(new)
    loader.load_state_dict(loader.state_dict() | {"position_samples": 20})
    with pytest.raises(RuntimeError, match="call iter"):
        next(new)
    assert take(loader, 2) == take(make(data), 22)[20:]
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_in_the_thread_come_out_of_next(data, prefetch):
    loader, opened = make(data, prefetch=prefetch), []
    open_shard = loader._open

    def failing(shard):
        opened.append(shard)
        if len(opened) > 6:
            raise OSError("stale file handle")
        return open_shard(shard)

    loader._open = failing
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    with pytest.raises(OSError, match="stale file handle"):
        next(batches)
    assert loader.state_dict()["position_samples"] == 6 and threads() == []
    loader._open = open_shard
    assert take(loader, 2) == take(make(data), 8)[6:]
    loader.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_goes_on_by_itself(data):
    loader = make(data, prefetch=2)
    batches = iter(loader)
    expected = [row[:-1] for row in take(make(data), 10)]
    assert [next(batches)[0]["input"][0].tolist() for _ in range(4)] == expected[:4]
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for a thread it does not have must not stay
        code = 1
        try:
            rows = [next(batches)[0]["input"][0].tolist() for _ in range(6)]
            loader.close()
            code = 0 if rows == expected[4:] else 2
        finally:
            os._exit(code)
    assert [next(batches)[0]["input"][0].tolist() for _ in range(6)] == expected[4:]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loader.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_can_close_whatever_the_thread_was_doing(data):
    loader = make(data, prefetch=2)
    batches = iter(loader)
    next(batches)
    with loader._source._slots._cond:  # as if the thread held it: nobody frees it in the fork
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            loader.close()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    next(batches)
    loader.close()


def test_a_process_ends_with_its_thread_running(data):
    code = (
        "from microtron.data.loader import TokenLoader\n"
        f"loader = TokenLoader([{str(data)!r}], None, 'train', seq_len=8, batch_size=1, rank=0,"
        "world_size=1, seed=0, vocab_size=10**6, tokenizer_fingerprint=None)\n"
        "batches = iter(loader); next(batches); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
