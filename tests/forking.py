"""Start several processes of one run quickly: each is forked from a server that has imported the package once.

`launching.start` runs torch's own launcher, which costs seconds of imports for each process. Here the processes get the
same environment as the launcher's and talk to each other on loopback.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from unittest import mock

from launching import free_port


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["conftest", "texts", "supershaper_hf.search.evaluation", "supershaper_hf.data.sequences"]
)
SECONDS = 100  # after which a process that waits for another one is ended


def fork(processes, act, *arguments):
    """Start `act(*arguments)` on several processes of one run, or on a single one without a run for 0."""
    environment = {"OMP_NUM_THREADS": "1"}
    if processes:
        environment |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(free_port())}  # fmt: skip
        environment |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(processes))
    ranks = [environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}) for rank in
             range(processes or 1)]  # fmt: skip
    # The server imports the modules when it starts, and looks for them where this process does.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    started = [CONTEXT.Process(target=_run, args=(rank, act, arguments), daemon=True) for rank in ranks]
    for process in started:
        process.start()
    return started


def finish(started):
    """Wait for the processes and expect that none has failed; a traceback is in the captured output."""
    for process in started:
        process.join(SECONDS + 10)
    assert [process.exitcode for process in started] == [0] * len(started)


def _run(environment, act, arguments):
    signal.alarm(SECONDS)
    os.environ.update(environment)
    act(*arguments)
