"""Where candidates are measured: in processes of this machine, or on a Dask cluster."""

import contextlib
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from typing import TypeVar

from shared.command.errors import ToolError, first_line
from shared.command.resources import available_memory_bytes, cpu_count
from shared.command.watchdog import die_with_parent

CONNECT_TIMEOUT_S = 15

Key = TypeVar("Key")
Result = TypeVar("Result")


def finished(jobs: Mapping["Future[Result]", Key]) -> Iterator[tuple[Key, Result]]:
    """Yield what each job was for, and its result, as they come.

    Raises:
        ToolError: Raised by a job; or the process or the cluster that a job ran on is gone.
    """
    try:
        for future in as_completed(jobs):
            yield jobs[future], future.result()
    except (BrokenExecutor, CancelledError) as error:
        raise ToolError("the processes that measure are gone", got=first_line(error), remedy="start again to go on") from None
    except Exception as error:
        if "deserialization of the task graph" in str(error):
            install = "pip install --constraint constraints.txt --editable '.[dask,quantize-tflite,quantize-onnx]'"
            remedy = f"install it on all of them: {install}"
            raise ToolError("the Dask scheduler or a worker lacks this project", remedy=remedy) from None
        if not type(error).__module__.startswith("distributed"):
            raise
        raise ToolError("the Dask cluster failed", got=first_line(error), remedy="start again to go on") from None


@contextlib.contextmanager
def local_processes(job_bytes: int = 0) -> Iterator[Executor]:
    """Yield an executor with one process for each CPU, as far as memory allows; they end with this process, however it ends.

    Args:
        job_bytes: Memory that one job takes.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    available = available_memory_bytes()
    fitting = cpu_count() if available is None or not job_bytes else max(1, available // job_bytes)
    workers = min(cpu_count(), fitting)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(parent: int) -> None:
    """Tie a worker to its parent, and drop what libraries print: errors come back as exceptions."""
    die_with_parent(parent)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextlib.contextmanager
def dask_cluster(address: str, _: int = 0) -> Iterator[Executor]:
    """Yield an executor over the workers of a Dask scheduler, such as tcp://10.0.0.5:8786; it limits its own memory.

    Scheduler and workers need this project installed, workers the model and the samples at the same paths.

    Raises:
        ToolError: Nobody answers there, or there are no workers.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        remedy = "start one with 'dask scheduler' and 'dask worker ADDRESS'"
        raise ToolError("no Dask scheduler answers", where=address, got=first_line(error), remedy=remedy) from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise ToolError("the Dask scheduler has no workers", where=address, remedy=f"start some with 'dask worker {address}'")
        yield client.get_executor()


def choose_executor(dask: str | None) -> Callable[[int], contextlib.AbstractContextManager[Executor]]:
    """Return what makes an executor: over the Dask cluster at an address, or over this machine's processes where it is None."""
    return local_processes if dask is None else functools.partial(dask_cluster, dask)
