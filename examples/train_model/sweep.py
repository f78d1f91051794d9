"""Train models x seeds x learning rates in parallel processes, every run into one lab.

    python examples/train_model/sweep.py                             # 27 runs on iris
    python examples/train_model/sweep.py --dataset digits --n_jobs 4
    python examples/train_model/sweep.py --models perceptron --seeds 0 1 2 3 --learning_rates 0.1
    python examples/train_model/sweep.py --backend dask --scheduler tcp://HOST:8786
    python ailab.py leaderboard accuracy

Experiments are named <dataset>_<model>_sweep_v1. A run that fails does not stop the others: they
are listed at the end and the exit code is 1. Ctrl-C ends the running ones, recorded as killed,
leaves the finished ones as they are, and the exit code is 130.

On a Dask cluster (see cluster.py) a run whose worker dies is trained again by another, and Ctrl-C
lets those under way end.
"""
from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import time
from collections.abc import Generator
from concurrent.futures import CancelledError
from importlib.util import find_spec
from itertools import product
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool
from run import DATASETS, MODELS, check_arguments  # makes lab_logger importable too
from tqdm import tqdm

from lab_logger import StoreError, default_db_path, drain_all, lab_url

SEEDS = [0, 1, 2]
LEARNING_RATES = [0.01, 0.03, 0.1]


def train_one(job: dict) -> tuple[dict, dict]:
    """Train one run in a worker; return its arguments, and its metrics or {"error": sentence}."""
    from run import train_model  # not at the top: Dask's scheduler, which has no run.py,
    started = time.perf_counter()        # unpickles this function with all it names
    try:
        result = train_model(**job)
    except Exception as error:           # the logger has recorded it as failed; the sweep goes on
        return job, {"error": f"{type(error).__name__}: {error}"}
    return job, {**result, "duration_s": time.perf_counter() - started}


def train_all(jobs: list[dict], n_jobs: int,
              backend: Any = "loky") -> Generator[tuple[dict, dict], None, None]:
    """Start the workers and return a generator of `train_one`'s results in order of completion.

    Ctrl-C in a terminal reaches the whole process group. The workers are started while it is
    ignored and inherit that, so that it interrupts this process alone, which then ends them.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with parallel_config(backend):
            parallel = Parallel(n_jobs, batch_size=1, return_as="generator_unordered")
            return parallel(delayed(train_one)(job) for job in jobs)
    finally:
        signal.signal(signal.SIGINT, handler)


def show(jobs: list[dict], n_jobs: int, done: list[tuple[dict, dict]], backend: Any) -> None:
    """Train all, appending to `done`; on stderr a progress bar, or a line a run off a terminal."""
    has_bar = sys.stderr.isatty()
    with (tqdm(total=len(jobs), unit="run", disable=not has_bar) as bar,
          contextlib.closing(train_all(jobs, n_jobs, backend)) as results):
        for job, result in results:
            done.append((job, result))
            bar.update()
            if not has_bar:
                told = result.get("error") or f"accuracy {result['accuracy']:.1%}, " \
                                              f"{result['duration_s']:.2f} s"
                print(f"{len(done)}/{len(jobs)} {label(job)}: {told}", file=sys.stderr, flush=True)


def label(job: dict) -> str:
    """Name a run for a person."""
    return "{model_name}, seed {random_state}, learning rate {learning_rate:g}".format(**job)


def end_workers() -> None:
    """Kill the workers and have their unfinished runs recorded as killed at once."""
    get_reusable_executor(reuse=True, kill_workers=True).shutdown(kill_workers=True)
    if url := lab_url():
        for problem in drain_all(None, url):
            print(f"sweep.py: {problem}", file=sys.stderr)
        return
    from ailab import open_store  # not at the top: training needs the logger alone
    try:
        open_store(default_db_path()).close()
    except StoreError as error:
        print(f"sweep.py: {error}", file=sys.stderr)


def parse(argv: list[str] | None) -> tuple[list[dict], int, str | None]:
    """Turn the command line into jobs (`train_model`'s arguments), n_jobs and Dask's scheduler."""
    parser = argparse.ArgumentParser("sweep.py", description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="iris", help=", ".join(DATASETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default: %(default)s")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES,
                        help="default: %(default)s")
    parser.add_argument("--n_epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--n_jobs", type=int, default=-1,
                        help="processes of loky; default: one a CPU")
    parser.add_argument("--backend", default="loky", choices=["loky", "dask"],
                        help="processes here, or a Dask cluster; default: %(default)s")
    parser.add_argument("--scheduler", help="address of the cluster's scheduler, for dask")
    options = parser.parse_args(argv)
    if (options.backend == "dask") != bool(options.scheduler):
        parser.error("--backend dask and --scheduler ADDRESS go together; `dask scheduler` prints "
                     "its address")
    if not re.fullmatch(r"((tcp|tls|ws|wss)://)?[^/\s]+:\d+", options.scheduler or "here:0"):
        parser.error(f"scheduler is {options.scheduler!r}; give tcp://HOST:PORT, as "
                     "`dask scheduler` prints it")
    if options.scheduler and not find_spec("distributed"):
        parser.error("--backend dask needs a package: pip install distributed")
    if options.n_jobs < 1 and options.n_jobs != -1:
        parser.error(f"n_jobs is {options.n_jobs}; give a whole number from 1, or -1 for all CPUs")
    grid = dict.fromkeys(product(options.models, options.seeds, options.learning_rates))
    jobs = [{"test_size": 0.25, "random_state": seed, "n_epochs": options.n_epochs,
             "learning_rate": learning_rate, "model_name": model_name,
             "dataset_id": options.dataset}
            for model_name, seed, learning_rate in grid]
    try:
        for job in jobs:
            check_arguments(**job)
    except ValueError as error:
        parser.error(str(error))
    for job in jobs:
        job["experiment_name"] = f"{options.dataset}_{job['model_name']}_sweep_v1"
    n_jobs = min(len(jobs), cpu_count() if options.n_jobs == -1 else options.n_jobs)
    return jobs, len(jobs) if options.scheduler else n_jobs, options.scheduler


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; return 0, 1 when a run failed, 2 for bad arguments, 130 after Ctrl-C."""
    jobs, n_jobs, scheduler = parse(argv)
    done: list[tuple[dict, dict]] = []
    trouble: list[str] = []
    backend: Any = "loky"
    started = time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt for both
    try:
        if scheduler:
            from cluster import connect  # not at the top: it needs dask
            backend = connect(scheduler, trouble)
        show(jobs, n_jobs, done, backend)
        if not scheduler:
            get_reusable_executor(reuse=True).shutdown()   # the workers take in what is left
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if scheduler:
            backend.client.close()       # which looks like trouble to whom watches it
    except ConnectionError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenProcessPool, CancelledError) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)       # ending takes less than a second
        lost = f"the scheduler at {scheduler!r} went away" if scheduler else "a worker process died"
        trouble += [lost] * (not isinstance(error, KeyboardInterrupt))
        fate = "how those under way end on their workers is recorded"
        if not scheduler:
            end_workers()
            fate = "those that were under way are recorded as killed"
        elif backend != "loky":
            backend.client.close(timeout=1)
        print(f"{(trouble or ['interrupted'])[-1]} after {len(done)} of {len(jobs)} runs; {fate}",
              file=sys.stderr)
        return 1 if trouble else 130
    failed = [f"{label(job)}: {result['error']}" for job, result in done if "error" in result]
    print(f"{len(done) - len(failed)} of {len(jobs)} runs finished in "
          f"{time.perf_counter() - started:.1f} s, recorded in {lab_url() or default_db_path()}")
    if failed:
        print(f"{len(failed)} failed:", *failed, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
