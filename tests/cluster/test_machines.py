"""The scripts of examples/cluster on two machines: network namespaces of this one, with sshd or SLURM in each.

They need Linux, root and iproute2; what is missing is named where a test is skipped. Debian's packages: iproute2,
openssh-server; slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core import records
from perennial.core.lineage import checkpoints_of
from perennial.train.recipe import read
from perennial.train.run import make_run, train
from tests.workspace import Workspace

pytestmark = pytest.mark.timeout(300)  # many processes start, on a machine that may be busy

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "cluster"


class Machines:
    """Two network namespaces that a bridge joins; `addresses` are theirs, and `here` is this machine's among them."""

    def __init__(self, folder: Path) -> None:
        number = os.getpid()
        self.folder = folder
        self.names = [f"p{number}m{machine}" for machine in (1, 2)]
        self.bridge = f"p{number}"
        net = f"10.213.{number % 250}"
        self.here, self.addresses = f"{net}.254", [f"{net}.1", f"{net}.2"]
        self._processes: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        """Raises CalledProcessError where namespaces are not permitted."""
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.here}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            ip("link", "add", f"{self.bridge}v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{self.bridge}v{number}", "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")

    def start(self, name: str | None, *command: str) -> None:
        """Starts a service on a machine (None: here), ended with the machines; its output goes to a file."""
        enter = [] if name is None else ["nsenter", f"--net=/run/netns/{name}"]
        with open(self.folder / f"{Path(command[0]).name}-{name}.out", "wb") as out:
            self._processes.append(subprocess.Popen([*enter, *command], stdout=out, stderr=out))

    def close(self) -> None:
        """Ends the services and takes the network down."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(timeout=20)
        # The links first: those of a deleted namespace go some time later, and the next test needs their names.
        for device in (*(f"{self.bridge}v{number}" for number in range(len(self.names))), self.bridge):
            subprocess.run(["ip", "link", "del", device], check=False, capture_output=True)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Two machines, or a skip."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    for program in ("ip", "nsenter", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    made = Machines(tmp_path)
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        yield made
    finally:
        made.close()


@pytest.fixture
def variables(machines: Machines) -> dict[str, str]:
    """The environment that the scripts run in."""
    ours = {
        "HOSTS": " ".join(machines.addresses),
        "PYTHON": sys.executable,
        "DIRECTORY": str(ROOT),
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # it misses names for the addresses, which nothing needs
        "ENVIRONMENT": "TORCH_CPP_LOG_LEVEL",
    }
    return {**os.environ, **ours}


@pytest.fixture
def over_ssh(machines: Machines, variables: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """`variables` with a way into the machines: sshd in each, or without one a stand-in that enters the namespace."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if sshd is None or shutil.which("ssh-keygen") is None:
        names = dict(zip(machines.addresses, machines.names, strict=True))
        cases = "".join(f"{address}) name={name} ;;\n" for address, name in names.items())
        stand_in = tmp_path / "ssh"
        stand_in.write_text(
            "#!/usr/bin/env bash\nwhile [[ $1 == -o ]]; do shift 2; done\n"
            f'case $1 in\n{cases}esac\nexec nsenter --net=/run/netns/$name bash -c "$2"\n',
            encoding="utf-8",
        )
        stand_in.chmod(0o700)
        return {**variables, "SSH": str(stand_in)}
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    for name, address in zip(machines.names, machines.addresses, strict=True):
        config = tmp_path / f"sshd-{name}"
        config.write_text(
            f"ListenAddress {address}\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
            f"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n",
            encoding="utf-8",
        )
        machines.start(name, sshd, "-D", "-f", str(config))
    config = tmp_path / "ssh_config"
    config.write_text(
        f"IdentityFile {tmp_path}/user\nStrictHostKeyChecking no\nUserKnownHostsFile {tmp_path}/known\nLogLevel ERROR\n"
        "ConnectionAttempts 10\n",
        encoding="utf-8",
    )
    return {**variables, "SSH": f"ssh -F {config}"}


def ssh_script(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(EXAMPLES / "ssh.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=variables, check=False)


def recipe_file(workspace: Workspace, folder: Path, **changes: Any) -> Path:
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(workspace.recipe(**changes)), encoding="utf-8")
    return path


def losses(folder: Path) -> dict[int, float]:
    path = folder / "events.jsonl"
    return {e["tokens"]: e["loss"] for e in records.read(path, "train")} if path.is_file() else {}


@pytest.mark.slow
def test_doctor_names_the_slow_link(machines: Machines, over_ssh: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("tc") is None:
        pytest.skip("tc is not installed")
    shape = ["tc", "-n", machines.names[1], "qdisc", "add", "dev", "eth0", "root"]
    rate = ["tbf", "rate", "200mbit", "burst", "64k", "latency", "50ms"]
    shaped = subprocess.run([*shape, *rate], capture_output=True, text=True, check=False)
    if shaped.returncode:
        pytest.skip(f"this kernel cannot shape traffic: {shaped.stderr.strip()}")
    done = ssh_script("doctor", "--folder", tmp_path, "--json", **over_ssh)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["processes"], report["machines"]) == (2, 2)
    slow, fast = sorted(report["links"], key=lambda link: link["bytes_per_second"])
    assert (slow["from"], slow["to"]) == (1, 0)
    assert slow["bytes_per_second"] < 25e6 < fast["bytes_per_second"]
    assert any(text.startswith("the link from machine 1 to machine 0 carries") for text in report["advice"])
    (clock,) = report["clocks"]
    assert abs(clock["offset_seconds"]) < 0.05  # they share this machine's clock
    assert all(rank["folder_seen_seconds"] < 5 for rank in report["ranks"])
    assert socket.gethostname() not in done.stdout


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(
    workspace: Workspace, machines: Machines, over_ssh: dict[str, str], tmp_path: Path
) -> None:
    recipe = recipe_file(workspace, tmp_path)
    done = ssh_script("train", recipe, "--out", tmp_path / "many", **{**over_ssh, "PROCESSES": "2"})
    assert done.returncode == 0, done.stderr
    (run,) = records.read(tmp_path / "many" / "events.jsonl", "run")
    assert run["processes"] == 4
    make_run(read(recipe), tmp_path / "one", base=tmp_path)
    train(tmp_path / "one", quiet=True)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    bad = ssh_script("train", recipe, "--out", tmp_path / "bad", "seed=minus one", **over_ssh)
    assert bad.returncode == 2
    assert bad.stderr.count("error:") == 1


@pytest.mark.slow
def test_a_stopped_script_saves_and_goes_on(
    workspace: Workspace, machines: Machines, over_ssh: dict[str, str], tmp_path: Path
) -> None:
    long = recipe_file(workspace, tmp_path, batch={"sequences": 8, "sequence_length": 32, "micro_batch": 1})
    command = ["bash", str(EXAMPLES / "ssh.sh"), "train", str(long), "--out", str(tmp_path / "run")]
    command += ["stages.0.budget=200 k tokens"]
    with subprocess.Popen(command, env=over_ssh, stderr=subprocess.PIPE, text=True) as script:
        wait_for(lambda: losses(tmp_path / "run") or script.poll() is not None, "the first update", seconds=120)
        script.send_signal(signal.SIGTERM)
        _, told = script.communicate(timeout=120)
    assert script.returncode == 130, told
    assert "Traceback" not in told
    assert told.count("saved; resume with") == 1
    assert int(checkpoints_of(tmp_path / "run")[-1].name) == max(losses(tmp_path / "run"))


SLURM = """
ClusterName=test
SlurmctldHost={host}({here})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
SlurmctldPort=27817
SlurmdPort=27818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
NodeName=machine1 NodeAddr={first} NodeHostname={host} CPUs={cores}
NodeName=machine2 NodeAddr={second} NodeHostname={host} CPUs={cores}
PartitionName=main Nodes=machine1,machine2 Default=YES
"""


@pytest.fixture
def slurm(machines: Machines, variables: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """SLURM on the two machines; the environment for its commands."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program, path="/usr/sbin:/usr/bin") is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path / "slurm"
    for name in ("", "spool-machine1", "spool-machine2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{name}={folder}/munge.{ending}" for name, ending in files.items()]
    machines.start(None, "/usr/sbin/munged", "--foreground", "--force", *options)
    wait_for((folder / "munge.socket").exists, "munged")
    facts = {"host": socket.gethostname().partition(".")[0], "here": machines.here, "folder": folder}
    first, second = machines.addresses
    config = folder / "slurm.conf"
    config.write_text(SLURM.format(**facts, first=first, second=second, cores=os.cpu_count()), encoding="utf-8")
    machines.start(None, "/usr/sbin/slurmctld", "-D", "-f", str(config))
    for number, name in enumerate(machines.names, 1):
        machines.start(name, "/usr/sbin/slurmd", "-D", "-N", f"machine{number}", "-f", str(config))
    found = {**variables, "SLURM_CONF": str(config)}

    def idle() -> bool:
        told = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=found, capture_output=True, text=True, check=False)
        return told.stdout.split() == ["idle", "2"]

    wait_for(idle, "the nodes of SLURM")
    return found


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_goes_back_to_the_queue_and_resumes(
    workspace: Workspace, machines: Machines, slurm: dict[str, str], tmp_path: Path
) -> None:
    recipe, run, log = recipe_file(workspace, tmp_path), tmp_path / "run", tmp_path / "job.log"

    def slurm_says(*command: str) -> str:
        return subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout.strip()

    def state() -> str:
        return slurm_says("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)

    script = [str(EXAMPLES / "slurm.sbatch"), "train", str(recipe), "--out", str(run), "stages.0.budget=40 k tokens"]
    job = slurm_says("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", *script)
    wait_for(lambda: losses(run) or state() == "FAILED", "the first update", seconds=120)
    assert state() == "RUNNING", log.read_text(encoding="utf-8")
    slurm_says("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: state() == "PENDING", "the job to be queued again")
    told = log.read_text(encoding="utf-8")
    assert told.count("saved; resume with") == 1
    assert "Traceback" not in told
    saved = int(checkpoints_of(run)[-1].name)
    wait_for(lambda: subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=slurm), "a start")
    wait_for(lambda: state() in ("COMPLETED", "FAILED"), "the end of the job", seconds=120)
    assert state() == "COMPLETED", log.read_text(encoding="utf-8")
    assert [e["tokens"] for e in records.read(run / "events.jsonl", "resume")] == [saved]
    assert max(losses(run)) >= 40_000
