"""Independent tasks side by side: in processes of this machine, or on the nodes of a Ray cluster.

The order in which results come is the engine's; what a task does must not depend on it. At most two tasks a worker
are under way or waiting, so that any number of tasks takes the same memory.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

ExecutorName = Literal["local", "ray"]
RunTasks = Callable[[Callable[[int], Any], Sequence[int]], Iterator[tuple[int, Any]]]
TASKS_PER_WORKER = 2


class ExecutorError(Exception):
    """The engine, not a task, failed. The message names the remedy."""


def available_cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def open_executor(engine: ExecutorName, num_workers: int) -> Iterator[RunTasks]:
    """A function run(task, numbers) that yields (number, task(number)) as they end; its workers serve many calls.

    `task` is pickled; Ray's nodes see its files at the same paths, and num_workers is then the cluster's affair. Raises
    what a task raises, and EngineError where a worker was killed or Ray is not to be had.
    """
    if engine == "ray":
        with _ray_cluster() as run:
            yield run
    elif num_workers == 1:
        yield lambda task, numbers: ((number, task(number)) for number in numbers)
    else:
        with _process_pool(num_workers) as run:
            yield run


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end when the parent does: a killed one cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _bounded(
    submit: Callable[[int], Any], wait_for_some: Callable[[list[Any]], Iterable[Any]], numbers: Sequence[int], most: int
) -> Iterator[tuple[int, Any]]:
    """(number, what `submit` gave for it) for those that have ended, with at most `most` under way."""
    waiting, under_way = iter(numbers), dict[Any, int]()
    while True:
        while len(under_way) < most and (number := next(waiting, None)) is not None:
            under_way[submit(number)] = number
        if not under_way:
            return
        for ended in wait_for_some(list(under_way)):
            yield under_way.pop(ended), ended


@contextlib.contextmanager
def _process_pool(num_workers: int) -> Iterator[RunTasks]:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads' locks
    pool = ProcessPoolExecutor(num_workers, spawn, _begin_worker, (os.getpid(),))

    def first_ended(futures: list[Any]) -> Iterable[Any]:
        return wait(futures, return_when=FIRST_COMPLETED).done

    def run(task: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        try:
            for number, future in _bounded(
                lambda number: pool.submit(task, number), first_ended, numbers, TASKS_PER_WORKER * num_workers
            ):
                yield number, future.result()
        except BrokenProcessPool:
            raise ExecutorError(
                "a worker process was killed, perhaps for lack of memory; run again with fewer --num_workers"
            )

    try:
        yield run
    except BaseException:  # no one waits for what is still under way
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ray_cluster() -> Iterator[RunTasks]:
    try:
        import ray
    except ImportError as error:
        raise ExecutorError(f"--engine ray needs Ray ({error}); pip install ray, or leave the flag out")
    root = str(Path(__file__).resolve().parent.parent)  # the nodes share the file system, this code included
    try:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": root}}, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ExecutorError(
            f"--engine ray: no cluster answers ({error}); ray start --head starts one, or unset RAY_ADDRESS"
        )
    remote: Any = ray.remote(num_cpus=1)(run_on_ray)

    def run(task: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        shared = ray.put(task)
        most = TASKS_PER_WORKER * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        for number, reference in _bounded(
            lambda number: remote.remote(shared, number), lambda references: ray.wait(references)[0], numbers, most
        ):
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause
            yield number, result

    try:
        yield run
    finally:
        ray.shutdown()


def run_on_ray(task: Callable[[int], Any], number: int) -> Any:
    """One task, on some node."""
    return task(number)
