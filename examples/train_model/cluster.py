"""What a sweep does on a Dask cluster: make the workers ready, hand the runs over, notice trouble.

    dask scheduler                                   # prints its address, tcp://HOST:8786
    dask worker tcp://HOST:8786                      # on each machine
    python examples/train_model/sweep.py --backend dask --scheduler tcp://HOST:8786

The scheduler needs dask and joblib, the workers scikit-learn too; run.py and lab_logger.py are
brought to them. They log where the sweep would: to the server of AILAB_URL, else into DB_PATH on
their own machine. Files go into `checkpoints/` in each worker's working directory. A run whose
worker dies is trained again by another; Ctrl-C begins no more and lets those under way end.
"""
from __future__ import annotations

import _thread
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import run  # makes lab_logger importable too
from distributed import Client, WorkerPlugin
from joblib._dask import DaskDistributedBackend

import lab_logger
from lab_logger import default_db_path, host_name, lab_url, setting

WAIT_S = 10.0    # for a scheduler's answer, for a first worker, for another after the last


class AllAtOnce(DaskDistributedBackend):
    """joblib's Dask backend, made to hand all runs over at once: the cluster may grow.

    It would give out as many as the cluster has threads now, and with one thread train here.
    """

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Say that there is a worker for each run."""
        return max(n_jobs, 2)


def connect(address: str, trouble: list[str]) -> AllAtOnce:
    """Give a joblib backend, with a `client`, of the cluster, whose workers are ready to train.

    Where joblib would wait for ever, the main thread is interrupted as by Ctrl-C, with a sentence
    in `trouble` before. Raises: ConnectionError, one sentence, for a cluster that cannot train.
    """
    place = {"DB_PATH": default_db_path()}
    if lab_url():
        place = {key: setting(key)[0] for key in ("AILAB_URL", "AILAB_TOKEN")}
    code = {Path(file).name: Path(file).read_bytes()
            for file in (lab_logger.__file__, run.__file__) if file}

    class Ready(WorkerPlugin):
        """What every worker does, also one that comes later, before it trains."""

        async def setup(self, worker: Any) -> None:
            os.environ.update(place)
            for name, body in code.items():       # a logger that may be in use is not loaded again
                is_loaded = name == "lab_logger.py" and "lab_logger" in sys.modules
                answer = await worker.upload_file(name, body, load=not is_loaded)
                if "exception" in answer:
                    raise answer["exception"]
            vars(sys.modules["run"])["CHECKPOINTS"] = Path.cwd() / "checkpoints"

    logging.disable()                    # what matters is told in a sentence
    try:
        client = Client(address, timeout=WAIT_S, set_as_default=False)
    except OSError as error:
        raise ConnectionError(f"no Dask scheduler answers at {address!r} ({error}): start one with "
                           "`dask scheduler`, it prints its address") from error
    try:
        client.submit(os.getpid).result(timeout=WAIT_S)    # an adaptive cluster starts some
        client.register_plugin(Ready(), "ai-lab sweep")
    except TimeoutError as error:
        raise ConnectionError(f"no worker at {address!r} within {WAIT_S:g} s: start some "
                           f"with `dask worker {address}`") from error
    except Exception as error:           # whatever keeps a worker from loading our code
        raise ConnectionError(f"a worker at {address!r} cannot train ({error}): the workers need "
                           "dask, joblib and scikit-learn in the sweep's versions") from error
    tell_place(set(client.run(host_name).values()) - {host_name()}, lab_url())
    threading.Thread(target=watch, args=(client, address, trouble), daemon=True).start()
    return AllAtOnce(client=client)


def tell_place(hosts: set[str], url: str | None) -> None:
    """Say where workers on these other machines record, if that is not one lab for all."""
    place = f"into {default_db_path()} there, which is another lab than here unless shared"
    if url and re.match(r"https?://(localhost|127\.|\[::1\])", url):
        place = f"to {url}, which is themselves and not this machine"
    elif url:
        return
    if hosts:
        print(f"sweep.py: the workers on {', '.join(sorted(hosts))} record {place}; for one lab "
              "run `ailab.py serve --host 0.0.0.0` here and set AILAB_URL to this machine's "
              "address and AILAB_TOKEN", file=sys.stderr)


def watch(client: Any, address: str, trouble: list[str]) -> None:
    """Interrupt the main thread where nothing more would come, and say why in `trouble`."""
    seen = time.monotonic()
    while not trouble and client.status != "closed":
        time.sleep(0.5)
        futures = {future.status: future for future in list(client.futures.values())}
        try:
            seen = time.monotonic() if client.scheduler_info()["workers"] else seen
            if "error" in futures:
                words = str(futures["error"].exception).split(". ")[0]
                trouble.append(f"a worker failed ({words})")
            elif time.monotonic() - seen > WAIT_S:
                trouble.append(f"no worker is left at {address!r}")
        except (KeyError, OSError):
            trouble.append(f"the scheduler at {address!r} went away")
    if trouble:
        _thread.interrupt_main()
