"""Process 1 of a virtual node: its own hostname and hosts file, its slurmd, and whatever Slurm starts there.

It runs in its own UTS, mount and process-id namespace, so that one SIGKILL to it ends everything on the node at once,
as a power cut would. It outlives its slurmd, as a node does; SIGUSR2 starts slurmd again. Only the standard library.
"""

import os
import signal
import socket
import subprocess
import sys

name, configuration, hosts = sys.argv[1:]
WOKEN_BY = {signal.SIGCHLD, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, WOKEN_BY)
for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(ignored, signal.SIG_IGN)
socket.sethostname(name)
subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)


def as_usual() -> None:
    """A daemon that ignores TERM could not be told to stop, nor could the jobs that it starts."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WOKEN_BY)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_slurmd() -> None:
    """The node's daemon, with nothing of this process's environment."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "SLURM_CONF": configuration}
    subprocess.Popen(["slurmd", "-D", "-N", name, "-f", configuration], env=environment, preexec_fn=as_usual)


def reap() -> None:
    """Orphans of the node's jobs too."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


start_slurmd()
while True:
    if signal.sigwait(WOKEN_BY) == signal.SIGUSR2:
        start_slurmd()
    reap()
