"""Independent tasks side by side: in processes of this machine, or on the nodes of a Ray cluster.

The order in which results come is the engine's; what a task does must not depend on it. At most two tasks a worker
are under way or waiting, so that any number of tasks takes the same memory.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, TypeVar

EngineName = Literal["local", "ray"]
Result = TypeVar("Result")
TASKS_A_WORKER = 2


class EngineError(Exception):
    """The engine, not a task, failed. The message names the remedy."""


def available_cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    task: Callable[[int], Result], numbers: Sequence[int], engine: EngineName, num_workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (number, task(number)) as they end. `task` is pickled; Ray's nodes see its files at the same paths.

    Raises what a task raises, and EngineError where a worker was killed or Ray is not to be had.
    """
    if engine == "ray":
        yield from _run_on_ray(task, numbers)
    elif min(num_workers, len(numbers)) <= 1:
        for number in numbers:
            yield number, task(number)
    else:
        yield from _run_in_processes(task, numbers, min(num_workers, len(numbers)))


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end when the parent does: a killed one cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_in_processes(
    task: Callable[[int], Result], numbers: Sequence[int], num_workers: int
) -> Iterator[tuple[int, Result]]:
    waiting = iter(numbers)
    under_way: dict[Future[Result], int] = {}
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads' locks
    pool = ProcessPoolExecutor(num_workers, spawn, _begin_worker, (os.getpid(),))
    try:
        while True:
            while len(under_way) < TASKS_A_WORKER * num_workers and (number := next(waiting, None)) is not None:
                under_way[pool.submit(task, number)] = number
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), future.result()
    except BrokenProcessPool:
        raise EngineError(
            "a worker process was killed, perhaps for lack of memory; give fewer --num_workers and run again"
        )
    finally:
        pool.shutdown(wait=not under_way, cancel_futures=True)
        for worker in multiprocessing.active_children() if under_way else ():
            worker.terminate()


def _run_on_ray(task: Callable[[int], Result], numbers: Sequence[int]) -> Iterator[tuple[int, Result]]:
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"--engine ray needs Ray ({error}); pip install ray, or leave the flag out")
    root = str(Path(__file__).resolve().parent.parent)  # the nodes share the file system, this code included
    try:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": root}}, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise EngineError(
            f"--engine ray: no cluster answers ({error}); start one (ray start --head), or unset RAY_ADDRESS"
        )
    try:
        remote: Any = ray.remote(num_cpus=1)(task_on_ray)
        shared = ray.put(task)
        waiting = iter(numbers)
        under_way: dict[Any, int] = {}
        while True:
            n_most = TASKS_A_WORKER * max(int(ray.cluster_resources().get("CPU", 1)), 1)
            while len(under_way) < n_most and (number := next(waiting, None)) is not None:
                under_way[remote.remote(shared, number)] = number
            if not under_way:
                break
            for done in ray.wait(list(under_way), num_returns=1)[0]:
                number = under_way.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause
                yield number, result
    finally:
        ray.shutdown()


def task_on_ray(task: Callable[[int], Result], number: int) -> Result:
    """One task, on some node."""
    return task(number)
