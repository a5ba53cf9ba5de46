"""Independent jobs over a few processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from jaxablate.errors import UserError

log = logging.getLogger(__name__)

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

_FEW = 8  # fewer jobs than this finish sooner than processes start
_MOST = 16


def run_jobs(
    function: Callable[[JobT], ResultT], jobs: Sequence[JobT], workers: int, title: str
) -> list[ResultT]:
    """`[function(job) for job in jobs]` over `workers` processes (0: one a core), in the order of jobs.

    Processes are spawned, never forked, because the caller may hold JAX's threads. The first error
    cancels what has not begun. Progress goes to the log, ten lines or so.
    """
    count = min(workers or os.cpu_count() or 1, _MOST, len(jobs))
    if count <= 1 or len(jobs) < _FEW:
        return _collect(map(function, jobs), len(jobs), title)
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        return _collect(pool.map(function, jobs), len(jobs), title)
    except BrokenProcessPool as error:
        raise UserError(
            f"{title}: a worker process died, most likely for lack of memory; "
            f"start again with fewer workers than {count} (finished volumes are kept)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(results: Iterable[ResultT], total: int, title: str) -> list[ResultT]:
    done: list[ResultT] = []
    for result in results:
        done.append(result)
        if len(done) % max(total // 10, 1) == 0 or len(done) == total:
            log.info("%s: %d of %d", title, len(done), total)
    return done
