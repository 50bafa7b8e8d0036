"""Run independent tasks in parallel: in processes of this machine, or on the nodes of a Ray cluster.

Results come in any order, and what a task does must not depend on it. At most two tasks per worker are submitted at a
time, so that any number of tasks takes the same memory.
"""

import contextlib
import errno
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

from gptkit.base import streams
from gptkit.base.cli import SHARED_MEMORY_REMEDY, skip_destructors

ExecutorName = Literal["local", "ray"]
RunTasks = Callable[[Callable[[int], Any], Sequence[int]], Iterator[tuple[int, Any]]]
TASKS_PER_WORKER = 2


class ExecutorError(Exception):
    """An error of the executor, not of a task. The message names the remedy."""


def available_cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def open_executor(engine: ExecutorName, num_workers: int) -> Iterator[RunTasks]:
    """Provide run(task, numbers), which yields (number, task(number)) as tasks end; its workers serve many calls.

    `task` is pickled. With "ray" the nodes must see its files at the same paths, and the cluster decides the number of
    workers. Raises what a task raises, and ExecutorError where a worker was killed or Ray is not available.
    """
    if engine == "ray":
        with _ray_cluster() as run:
            yield run
    elif num_workers == 1:
        yield lambda task, numbers: ((number, task(number)) for number in numbers)
    else:
        with _process_pool(num_workers) as run:
            yield run


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Block SIGINT: processes started within leave it to this one, which receives it at the end of the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker() -> None:
    """Exit when the parent does: one that is killed cannot stop its workers. What cannot be printed ends no worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    streams.replace_streams()

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_bounded(
    submit: Callable[[int], Any],
    wait_for_some: Callable[[list[Any]], Iterable[Any]],
    numbers: Sequence[int],
    max_pending: int,
) -> Iterator[tuple[int, Any]]:
    """Yield (number, the future that `submit` returned for it) as they end, with at most max_pending submitted."""
    waiting, pending = iter(numbers), dict[Any, int]()
    while True:
        while len(pending) < max_pending and (number := next(waiting, None)) is not None:
            pending[submit(number)] = number
        if not pending:
            return
        for ended in wait_for_some(list(pending)):
            yield pending.pop(ended), ended


@contextlib.contextmanager
def _process_pool(num_workers: int) -> Iterator[RunTasks]:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks held by the parent's threads
    try:
        pool = ProcessPoolExecutor(num_workers, spawn, _init_worker)
    except (OSError, ImportError) as error:  # its locks are semaphores, which Linux keeps in /dev/shm
        remedy = SHARED_MEMORY_REMEDY if getattr(error, "errno", None) == errno.ENOSPC else "make /dev/shm writable"
        raise ExecutorError(f"no shared memory for worker processes ({error}); {remedy}, or give --num_workers 1")

    def first_ended(futures: list[Any]) -> Iterable[Any]:
        return wait(futures, return_when=FIRST_COMPLETED).done

    def run(task: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        def submit(number: int) -> Any:
            with _without_ctrl_c():  # a new process would print a traceback while it imports
                return pool.submit(task, number)

        try:
            for number, future in _run_bounded(submit, first_ended, numbers, TASKS_PER_WORKER * num_workers):
                yield number, future.result()
        except BrokenProcessPool:
            raise ExecutorError(
                "a worker process was killed, perhaps for lack of memory; run again with fewer --num_workers"
            )

    try:
        yield run
    except BaseException:  # nobody waits for the tasks that still run
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
    root = str(Path(__file__).resolve().parents[2])  # the nodes share the file system, this code included
    try:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": root}}, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ExecutorError(
            f"--engine ray: no cluster answers ({error}); ray start --head starts one, or unset RAY_ADDRESS"
        )
    remote: Any = ray.remote(num_cpus=1)(run_on_ray)

    def run(task: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        shared = ray.put(task)
        max_pending = TASKS_PER_WORKER * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        for number, reference in _run_bounded(
            lambda number: remote.remote(shared, number),
            lambda references: ray.wait(references)[0],
            numbers,
            max_pending,
        ):
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause
            yield number, result

    skip_destructors()  # after shutdown Ray's threads still run, and log
    try:
        yield run
    finally:
        ray.shutdown()


def run_on_ray(task: Callable[[int], Any], number: int) -> Any:
    """Run one task, on the node where Ray calls this."""
    return task(number)
