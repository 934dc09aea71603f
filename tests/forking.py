"""Start several processes of one run quickly: each is forked from a server that has imported the package once.

`launching.start` runs torch's own launcher, which costs seconds of imports for each process. Here the processes get the
same environment as the launcher's and talk to each other on loopback.
"""

import os
import signal

from launching import fork_server, free_port


SECONDS = 300  # after this time a process ends, also if it waits for another one for ever


def fork(processes, act, *arguments):
    """Start `act(*arguments)` on several processes of one run, or for 0 on one process without a launcher."""
    alone = {"OMP_NUM_THREADS": "1"}
    together = alone | {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    environments = [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)] or [alone]
    started = [fork_server().Process(target=_run, args=(each, act, arguments), daemon=True) for each in environments]
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
