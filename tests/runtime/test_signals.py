import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from inbatch.runtime import signals
from inbatch.runtime.signals import SIGNALS, Stop, StopRequested, ending, stop_on_signals
from inbatch.runtime.thread_map import thread_map

CHILD = """
import signal, sys, time
from inbatch.runtime.signals import SIGNALS, stop_on_signals
for number in SIGNALS:
    signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, and an ignored signal stays ignored
with stop_on_signals() as stop:
    print("ready", flush=True)
    seen = None
    for _ in range(500):
        if stop.requested != seen:
            seen = stop.requested
            print(int(seen), flush=True)
        time.sleep(0.01)
"""


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_flag_and_the_first_one_counts(child, number):
    child.send_signal(number)
    assert child.stdout.readline() == f"{int(number)}\n"
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert child.poll() is None


def test_a_third_ctrl_c_ends_the_process_at_once(child):
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == f"{int(signal.SIGINT)}\n"
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=2) == -signal.SIGINT


def test_old_handlers_come_back():
    got = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with pytest.raises(ZeroDivisionError), stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested == signal.SIGTERM and not got
            raise ZeroDivisionError
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_outside_the_main_thread_nothing_is_changed():
    before, results = [signal.getsignal(n) for n in SIGNALS], []

    def work():
        with stop_on_signals() as stop:
            results.append((stop, [signal.getsignal(n) for n in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    stop, during = results[0]
    assert isinstance(stop, Stop) and stop.requested is None and during == before


def test_signal_is_acknowledged_during_the_work(monkeypatch):
    monkeypatch.setattr(signals, "ACKNOWLEDGED", 0.02)
    heard = []
    with signals.answered_in_time(lambda error: None, heard.append) as stop:
        os.kill(os.getpid(), signal.SIGXCPU)
        end = time.monotonic() + 10
        while not heard and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.requested == signal.SIGXCPU
    assert heard == [signal.SIGXCPU]


def test_an_ignored_signal_stays_ignored_except_that_of_the_keyboard():
    chosen = (signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU, signal.SIGINT)
    old = {number: signal.signal(number, signal.SIG_IGN) for number in chosen}
    try:
        with stop_on_signals() as stop:
            for number in chosen[:3]:
                signal.raise_signal(number)
                assert stop.requested is None
            signal.raise_signal(signal.SIGINT)
            assert stop.requested == signal.SIGINT
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in chosen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_signal_during_the_exit_of_python_does_not_change_the_exit_code():
    script = """
import atexit, os, signal, sys
from inbatch.apps.cli import main
atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGHUP)])
sys.argv = ["inbatch", "--version"]
main()
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_threads_that_work_are_not_waited_for():
    """Decoding, scanning statistics, and k-means: the tasks that have not begun are cancelled."""
    begun, finish = [], threading.Event()

    def work(number):
        begun.append(number)
        finish.wait(30)

    began = time.monotonic()
    try:
        with pytest.raises(StopRequested, match="SIGTERM"), ending():
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            list(thread_map(work, range(100), 2))
        assert time.monotonic() - began < 10
    finally:
        finish.set()
    assert sorted(begun) == [0, 1]
    assert list(thread_map(lambda number: number**2, range(5), 2)) == [0, 1, 4, 9, 16]


def test_results_do_not_accumulate_for_a_slow_consumer():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = thread_map(lambda number: number**2, items(), 2)
    for number in range(3):
        assert next(results) == number**2 and len(taken) < number + 20
    assert len(list(results)) == 97


def test_work_that_may_be_lost_within_work_that_must_be_finished():
    """An evaluation on rank 0, for which the other ranks wait."""
    with stop_on_signals() as stop:
        stop.hold()
        stop.quick = True  # a step that was quick
        with pytest.raises(StopRequested), stop.losing():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested), stop.losing():  # requested before
            pytest.fail("the work has begun")


def test_a_fork_that_has_no_handlers_of_its_own_yet_does_not_raise(monkeypatch):
    """A data worker may get the signal of its group before its first line: Python would print a traceback."""
    with ending():
        monkeypatch.setattr(os, "getpid", lambda: -1)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
        with pytest.raises(StopRequested):
            signal.raise_signal(signal.SIGTERM)
