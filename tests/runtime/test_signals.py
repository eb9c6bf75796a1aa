import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from inbatch.runtime.signals import SIGNALS, Stop, stop_on_signals

CHILD = """
import sys, time
from inbatch.runtime.signals import stop_on_signals
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
    before, found = [signal.getsignal(n) for n in SIGNALS], []

    def work():
        with stop_on_signals() as stop:
            found.append((stop, [signal.getsignal(n) for n in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    stop, during = found[0]
    assert isinstance(stop, Stop) and stop.requested is None and during == before
