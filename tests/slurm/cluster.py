"""A real Slurm of several nodes on this machine: munged, slurmctld and a slurmd in a namespace for each node.

Debian's packages (22.05, built for several slurmd on one machine), root, no system file touched: own configuration,
own munge key, own state, all under one directory. A node is a UTS, mount and process-id namespace (tests/slurm/node.py)
with an address of its own in 127.0.0.0/8, so that several clusters stand beside each other. Without cgroups: Slurm
limits neither memory nor devices here.

Every process is held as a child of this one by its handle and dies with it, so that nothing is ended by name and
nothing is left. Timers are short: a silent node is down after 10 s, a requeued job may start again after 5 s.
"""

import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NODE_INIT = Path(__file__).with_name("node.py")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "setpriv")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NAMESPACES = (
    "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL",
    "--mount-proc", "--propagation", "private",
)  # fmt: skip
SLURMD_TIMEOUT_SECONDS = 10
KILL_WAIT_SECONDS = 5
GRACE_SECONDS = 20

_CONFIGURATION = """\
ClusterName=bloomery
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=10
KillWait={kill_wait}
BatchStartTimeout=10
MessageTimeout=30
TCPTimeout=5
UnkillableStepTimeout=60
CompleteWait=0
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why no Slurm can be had here; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm for tests needs root (namespaces, slurmd)"
    if not all(map(shutil.which, COMMANDS)) and (reason := _install()):
        return reason
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces for nodes ({tried.stderr.strip()})"


def _install() -> str | None:
    """Debian's packages, without starting what they would start; takes 10 to 20 s once, whoever else tests here."""
    if shutil.which("apt-get") is None:
        return f"Slurm is not installed, and there is no apt-get for {', '.join(PACKAGES)}"
    with open("/tmp/bloomery-slurm-packages.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return None if all(map(shutil.which, COMMANDS)) else _install_packages()


def _install_packages() -> str | None:
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=30"]
    try:
        for step in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                [*apt, *step],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
                return f"Slurm's packages cannot be installed: {said[-1]}"
    finally:
        if ours:
            policy.unlink()
    return None if all(map(shutil.which, COMMANDS)) else "Slurm's packages lack a command that the tests need"


class Cluster:
    """The daemons, the faults that can be done to them, and Slurm's own commands."""

    def __init__(self, nodes: int = 4, cpus: int = 16) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="bloomery-slurm-", dir="/tmp"))
        self.configuration = self.directory / "slurm.conf"
        self.nodes = [f"node{number}" for number in range(nodes)]
        self.environment = {"SLURM_CONF": str(self.configuration)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port, self._addresses = (
            _free_port(),
            f"127.{secrets.choice(range(20, 250))}.{secrets.choice(range(1, 250))}",
        )
        for name in ("state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.directory / name).mkdir(parents=True)
        self._write(cpus)

    def _write(self, cpus: int) -> None:
        addresses = {node: f"{self._addresses}.{10 + number}" for number, node in enumerate(self.nodes)}
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={self._port + 1 + number} CPUs={cpus} "
            f"Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000"
            for number, (node, address) in enumerate(addresses.items())
        ]
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname(),
                port=self._port,
                directory=self.directory,
                slurmd_timeout=SLURMD_TIMEOUT_SECONDS,
                kill_wait=KILL_WAIT_SECONDS,
                grace=GRACE_SECONDS,
                nodes="\n".join(lines),
            )
        )
        known = [line for line in Path("/etc/hosts").read_text().splitlines() if line.strip()]
        own = [f"{address} {node}" for node, address in addresses.items()]
        (self.directory / "hosts").write_text("\n".join([*own, *known]) + "\n")
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))

    def start(self) -> None:
        """Brings everything up; returns when all nodes are idle."""
        directory = self.directory
        files = ("key-file", "socket", "pid-file", "log-file")
        munge = [f"--{name}={directory}/munge.{name.split('-')[0]}" for name in files]
        self._spawn("munged", ["munged", "--foreground", "--force", *munge, f"--seed-file={directory}/munge.seed"])
        until(lambda: (directory / "munge.socket").exists(), 20, "munged")
        self.start_controller()
        for node in self.nodes:
            self.power_on(node)
        until(lambda: self.idle() == len(self.nodes), 180, f"all nodes idle:\n{self.said('sinfo', '-N', '-l')}")

    def start_controller(self) -> None:
        """Starts slurmctld, on the state that an earlier one left."""
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.configuration)])

    def stop(self) -> None:
        """Ends every process of the cluster and removes its directory."""
        for node in self.nodes:
            self._end(node, signal.SIGKILL)
        self._end("slurmctld", signal.SIGTERM)
        self._end("munged", signal.SIGTERM)
        shutil.rmtree(self.directory, ignore_errors=True)

    def power_on(self, node: str) -> None:
        """A node with nothing on it but its slurmd."""
        python = [os.path.realpath(sys.executable), "-I", "-S"]
        self._spawn(
            node,
            [*NAMESPACES, *python, str(NODE_INIT), node, str(self.configuration), str(self.directory / "hosts")],
        )

    def power_cut(self, node: str) -> None:
        """Ends everything on the node at once."""
        self._end(node, signal.SIGKILL)

    def back(self, node: str) -> None:
        """Powers a node on again and waits until Slurm uses it."""
        if self._processes[node].poll() is not None:
            self.power_on(node)
        until(lambda: self._usable(node), 90, f"{node} back")

    def _usable(self, node: str) -> bool:
        state = self.said("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T").strip()
        if "down" in state or "drain" in state:
            self.said("scontrol", "update", f"nodename={node}", "state=resume")
        return state in ("idle", "mixed", "allocated", "completing")

    def kill(self, process: int) -> None:
        """Ends a process of a node, which `processes` has found, as the kernel does where memory is exhausted."""
        os.kill(process, signal.SIGKILL)

    def kill_slurmd(self, node: str) -> None:
        """Ends the node's slurmd alone; the jobs there run on."""
        for process in self.processes(node, r"^slurmd "):
            os.kill(process, signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Starts a node's slurmd again."""
        os.kill(self._init(node), signal.SIGUSR2)

    def kill_controller(self) -> None:
        """Ends slurmctld as a crash would."""
        self._end("slurmctld", signal.SIGKILL)

    def freeze(self, node: str) -> None:
        """Stops every process on the node; two rounds, because one may just have been started."""
        for process in [*self.processes(node), *self.processes(node)]:
            _send(process, signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        """Lets a frozen node go on."""
        for process in self.processes(node):
            _send(process, signal.SIGCONT)

    def shrink_disk(self, node: str, directory: Path) -> None:
        """What the node sees in a directory becomes a disk of 16 MiB."""
        inside = ["nsenter", f"--target={self._init(node)}", "--mount"]
        subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=16m", "small", str(directory)], check=True)

    def processes(self, node: str, pattern: str = ".") -> list[int]:
        """Processes on the node (ids of this machine) whose command line matches."""
        if self._processes[node].poll() is not None:
            return []
        namespace = os.readlink(f"/proc/{self._init(node)}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                inside = os.readlink(entry / "ns/pid") == namespace
            except OSError:
                continue
            if inside and re.search(pattern, line):
                found.append(int(entry.name))
        return found

    def left_over(self) -> list[str]:
        """Command lines of what runs on any node besides the node's own slurmd."""
        lines = []
        for node in self.nodes:
            for process in self.processes(node, r"launcher|slurmstepd|slurm_script|raylet|gcs_server"):
                if not (Path(f"/proc/{process}/cmdline").read_bytes().endswith(b"infinity\0")):
                    lines.append(f"{node}: {Path(f'/proc/{process}/cmdline').read_bytes()!r}")
        return lines

    def idle(self) -> int:
        """How many nodes wait for work."""
        answer = self.said("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip()
        return int(answer or 0)

    def said(self, *command: str) -> str:
        """What one of Slurm's commands prints; empty where it fails."""
        return self.run(*command).stdout

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs one of Slurm's commands, or anything that calls them, against this cluster."""
        given: dict[str, Any] = {"env": os.environ, **options}
        given["env"] = {**given["env"], **self.environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **given)

    def _init(self, node: str) -> int:
        outer = self._processes[node].pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._processes.get(name)
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits until something holds; fails with its name."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.2)


@contextmanager
def running(nodes: int = 4) -> Iterator[Cluster]:
    """A cluster for the block."""
    cluster = Cluster(nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _free_port() -> int:
    """The first of some ports in a row, for the controller and the nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return 16000 + free.getsockname()[1] % 3000
