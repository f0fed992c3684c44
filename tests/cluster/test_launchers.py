"""Several machines' launchers on this one: two agents of torchrun, and deepspeed's over ssh."""

import getpass
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import QUICKSTART, ROOT, call, environment
from shards import write_shard
from test_slurm import free_ports, losses, wait_for

SSH = ("sshd", "ssh", "ssh-keygen", "pdsh")


def arguments(folder: Path, out: str) -> list[str]:
    given = [f"--config={QUICKSTART / 'pretrain.yaml'}", "--model=CLIP-tiny", f"--train_data={folder / 'x.tar'}"]
    given += ["--caption_member=txt", "--global_batch_size=16", "--epochs=1", "--logging_steps=1", "--num_workers=0"]
    return [*given, "--report_to=none", "--use_cpu=true", f"--output_dir={folder / out}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with pairs, and the losses of one process in it."""
    folder = tmp_path_factory.mktemp("pairs")
    write_shard(folder / "x.tar", 64)
    call("stages.pretrain", *arguments(folder, "alone"))
    return folder, losses(folder / "alone")


def check(folder, out, wanted):
    record = json.loads((folder / out / "run.json").read_text())
    assert record["ranks"] == 2 and record["state"] == "finished"
    found = losses(folder / out)
    assert found.keys() == wanted.keys() and len(found) == 4
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranked", [True, False])
def test_two_agents_of_torchrun_are_one_training(ranked, alone):
    folder, wanted = alone
    out = f"agents-{ranked}"
    variables = environment() | {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "DEVICES": "1", "VIRTUAL_ENV": sys.prefix}
    variables["MASTER_PORT"] = str(free_ports(1)[0])
    agents = [
        subprocess.Popen(
            [ROOT / "scripts" / "1_pretrain.sh", *arguments(folder, out)],
            env=variables | ({"NODE_RANK": str(node)} if ranked else {}),  # without, they agree on it (c10d)
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    told = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    check(folder, out, wanted)


@pytest.fixture
def two_hosts(tmp_path):
    """An sshd of our own, and options of deepspeed's launcher for two hosts, which are both this machine."""
    if missing := [program for program in SSH if not shutil.which(program)]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install openssh-server pdsh")
    if not os.getuid():
        Path("/run/sshd").mkdir(exist_ok=True)  # of which a daemon that root starts takes care elsewhere
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    (tmp_path / "user.pub").rename(tmp_path / "authorized")
    port = free_ports(1)[0]
    settings = [f"HostKey {tmp_path / 'host'}", f"AuthorizedKeysFile {tmp_path / 'authorized'}", "StrictModes no"]
    settings += [f"Port {port}", "ListenAddress 127.0.0.1", "UsePAM no", f"PidFile {tmp_path / 'pid'}"]
    (tmp_path / "sshd_config").write_text("\n".join([*settings, "PermitRootLogin yes", ""]))
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    server = subprocess.Popen([shutil.which("sshd"), "-D", "-f", tmp_path / "sshd_config"], stderr=subprocess.PIPE)
    trusting = f"-i {tmp_path / 'user'} -p {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    command = ["ssh", "-q", *trusting.split(), f"{getpass.getuser()}@127.0.0.1", "true"]
    try:
        wait_for(lambda: subprocess.run(command, check=False).returncode == 0, 20)
        options = ["--hostfile", str(tmp_path / "hosts"), "--no_ssh_check", "--master_addr", "127.0.0.1"]
        yield [*options, "--master_port", str(free_ports(1)[0])], {"PDSH_SSH_ARGS_APPEND": trusting}
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_deepspeed_starts_two_hosts_over_ssh(two_hosts, alone):
    folder, wanted = alone
    options, variables = two_hosts
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), *options, "--module", "diffclip"]
    ended = subprocess.run(
        [*launcher, "pretrain", *arguments(folder, "hosts")],
        env=environment() | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    check(folder, "hosts", wanted)
