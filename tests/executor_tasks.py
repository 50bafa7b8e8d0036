"""Tasks of test_executors.py, in a module of their own: a worker process imports it, and not torch and the tests."""

import os
import signal
import time


def square(number: int) -> int:
    time.sleep(0.02 if number % 2 else 0)
    return number * number


def fail_at(bad: int, number: int) -> int:
    if number == bad:
        raise KeyError(f"task {number}")
    return number


def be_killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def process_of(number: int) -> int:
    time.sleep(0.1)
    return os.getpid()
