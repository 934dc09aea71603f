"""Start real processes under torch's launcher, which talk to each other on loopback."""

import os
import socket
import subprocess
import sys


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
