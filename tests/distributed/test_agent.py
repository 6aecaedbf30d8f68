"""What the launcher says and does when ranks end: small commands in the place of a training run."""

import logging
import os
import signal
import threading
import time

import pytest

from microtron.launch import together
from microtron.watchdog import LOST

HERE = (1, 0, "127.0.0.1", 0)  # one node
START = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
TELL = "def tell(text): print(text, file=sys.stderr, flush=True)\n"


@pytest.fixture
def ranks(tmp_path, capfd):
    """Runs ``code`` as two ranks: exit code, what the console showed; this process as before."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in signals}
    logging.disable(logging.CRITICAL)

    def run(code, restarts=0):
        ended = together(("-c", START + TELL + code), 2, restarts, HERE, tmp_path / "log")
        shown = capfd.readouterr()
        return ended, shown.out, shown.err

    yield run
    logging.disable(logging.NOTSET)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_is_well(ranks, tmp_path):
    ended = ranks("print('to the console', rank)\ntell(f'noise {rank}')")
    assert ended == (0, "to the console 0\n", "noise 0\n")
    assert (tmp_path / "log" / "rank1.err").read_text() == "to the console 1\nnoise 1\n"


def test_the_killed_rank_is_named_and_its_mourners_are_not_heard(ranks, tmp_path):
    code = f"""
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
tell('error: rank 1 is gone')
sys.exit({LOST})
"""
    log = f"{tmp_path}/log/rank1.log"
    assert ranks(code) == (
        1,
        "",
        f"error: rank 1 was killed (SIGKILL); its log is {log}; the same command goes on from the "
        "newest whole checkpoint\n",
    )


def test_a_refusal_is_told_once_and_not_tried_again(ranks):
    code = """
time.sleep(rank)
tell(f"error{' (rank 1)' * rank}: no such file")
sys.exit(1)
"""
    assert ranks(code, restarts=3) == (1, "", "error: no such file\n")


def test_the_rank_that_refuses_alone_is_heard(ranks):
    code = f"""
if rank == 0: sys.exit({LOST})
time.sleep(1.5)
tell('error (rank 1): disk 7 is full')
sys.exit(1)
"""
    assert ranks(code) == (1, "", "error (rank 1): disk 7 is full\n")


def test_a_hung_rank_is_ended(ranks):
    code = f"""
if rank == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)
time.sleep(0.5)
tell('error: rank 1 hangs')
sys.exit({LOST})
"""
    began = time.monotonic()
    assert ranks(code) == (1, "", "error: rank 1 hangs\n")
    assert time.monotonic() - began < 5


def test_a_bug_keeps_its_traceback_and_gets_a_line(ranks):
    ended, _, shown = ranks("if rank == 1: x = 1 / 0\ntime.sleep(9)")
    *trace, line = shown.splitlines()
    assert ended == 1 and trace[0].startswith("Traceback") and "x = 1 / 0" not in line
    assert line.startswith(
        "error: rank 1 ended with exit code 1: ZeroDivisionError: division by zero; its log is "
    )


def test_restarts_are_told_and_counted(ranks, tmp_path):
    """Attempt 0 dies, attempt 1 dies, attempt 2 ends well; the ranks of each meet elsewhere."""
    code = f"""
attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
print(os.environ['MASTER_PORT'], file=open({str(tmp_path)!r} + f'/port{{attempt}}{{rank}}', 'w'))
if attempt < 2 and rank == attempt: os.kill(os.getpid(), signal.SIGABRT + 2 * rank)
time.sleep(100 * (attempt < 2))
"""
    log = f"{tmp_path}/log/rank"
    assert ranks(code, restarts=2) == (
        0,
        "",
        f"rank 0 ended with SIGABRT; its log is {log}0.log; restart 1 of 2\n"
        f"rank 1 was killed (SIGFPE); its log is {log}1.log; restart 2 of 2\n",
    )
    ports = [(tmp_path / f"port{attempt}0").read_text() for attempt in range(3)]
    assert len(set(ports)) == 3 and (tmp_path / "port21").read_text() == ports[2]


def test_no_more_restarts_than_asked_for(ranks, tmp_path):
    ended, _, shown = ranks("time.sleep(9 * rank)\nsys.exit(3)", restarts=1)
    first, last = shown.splitlines()
    assert ended == 1 and first.endswith("; restart 1 of 1")
    assert last.startswith("error: rank 0 ended with exit code 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_each_rank_once_and_they_may_save(ranks, tmp_path, number):
    """The slower one is not killed when the other has left."""
    code = f"""
seen = []
for n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, lambda n, frame: seen.append(n))
open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()
while not seen: time.sleep(0.01)
time.sleep(0.2 + rank)
open({str(tmp_path)!r} + f'/saved{{rank}}', 'w').write(str(len(seen)))
sys.exit(128 + seen[0])
"""

    def send():
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    expected = signal.SIGTERM if number == signal.SIGHUP else number
    assert ranks(code, restarts=2) == (128 + expected, "", "")
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_a_progress_bar_is_shown_at_once_and_library_noise_is_filed(ranks, tmp_path):
    code = r"""
if rank == 0:
    sys.stderr.write('10%\r'); sys.stderr.flush(); time.sleep(0.3)
    sys.stderr.write('90%\n[rank0]:[W1120 23:03:34.5 TCPStore.cpp:106] told\nframe #1: x\n')
    sys.stderr.write('er'); sys.stderr.flush(); time.sleep(0.3)
    tell('ror: after all')
    sys.exit(1)
"""
    assert ranks(code) == (1, "", "10%\r90%\nerror: after all\n")
    assert "TCPStore.cpp" in (tmp_path / "log" / "rank0.err").read_text()
