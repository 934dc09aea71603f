"""Start real processes under torch's launcher, which talk to each other on loopback."""

import ctypes
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path


# `accelerate launch --cpu` starts one process only, whatever it is told; on several it runs torchrun.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def launcher(processes=2):
    """Arguments of Python that start a script on several processes."""
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", *address]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(processes, script, *arguments):
    """Start a script on several processes, or without the launcher for 0; its output is one stream of text."""
    command = [sys.executable, *(launcher(processes) if processes else []), str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# Processes without the seconds that a script needs to import everything


PRELOADED = ["conftest", "texts", "supershaper_hf.training.loop", "torch.distributed.launcher.api"]


@functools.cache
def fork_server():
    """Return a context of `multiprocessing` whose processes start in no time: a server has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with environment({"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}):
        forkserver.ensure_running()
    return context


@contextmanager
def environment(changes):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch(processes, function, *arguments, log):
    """Run a function on several processes under the agent of `torchrun`; return the agent's process.

    Nothing tells Accelerate to use the CPU, as with plain `torchrun`. What all of them print goes to the file `log`.
    """
    launcher = fork_server().Process(target=run_launcher, args=(processes, function, arguments, log))
    launcher.start()
    return launcher


def run_launcher(processes, function, arguments, log):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with Path(log).open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="test",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": 60},
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, alone)(function, *arguments)


def alone(function, *arguments):
    """Call a function without torch's wish that a process gets a signal when its launcher dies: `torchrun` has none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG
    function(*arguments)
