"""A real Slurm on this machine: slurmctld and two slurmd, in a folder of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import QUICKSTART, ROOT, environment, run_ranks
from shards import write_shard

from diffclip.base import ranks

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=requeue_delay=1,batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs a command of Slurm's, and gives what it prints."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing or os.getuid():
        pytest.skip(f"a Slurm of our own needs root and {missing or PROGRAMS}: apt-get install slurm-wlm")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(3)))
    variables = environment() | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(*command: str, **more: str) -> str:
        ended = subprocess.run(
            command, env=variables | more, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
        return ended.stdout

    servers = [
        subprocess.Popen([*words, "-D"], env=variables)
        for words in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"])
    ]
    try:
        wait_for(lambda: run("sinfo", "-h", "-o", "%T").split() == ["idle"], 60)
        yield run
        run("scancel", "--full", "--signal=KILL", "--user=root")
        run("scancel", "--user=root")
        wait_for(lambda: not run("squeue", "-h").strip(), 60)
    finally:
        for server in reversed(servers):
            server.terminate()
            server.wait(20)


def wait_for(holds, seconds):
    deadline = time.time() + seconds
    while time.time() < deadline:
        try:
            if holds():
                return
        except AssertionError:
            pass  # slurmctld is not up yet
        time.sleep(0.2)
    assert holds()


def losses(out: Path):
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


@pytest.mark.slow
def test_a_job_that_is_told_to_end_queues_again_and_comes_to_the_undisturbed_digits(slurm, tmp_path):
    write_shard(tmp_path / "x.tar", 64)
    arguments = [f"--config={QUICKSTART / 'pretrain.yaml'}", "--model=CLIP-tiny", f"--train_data={tmp_path / 'x.tar'}"]
    arguments += [
        "--caption_member=txt",
        "--global_batch_size=16",
        "--epochs=8",
        "--logging_steps=1",
        "--save_steps=500",
    ]
    arguments += ["--num_workers=0", "--report_to=none"]
    out, log = tmp_path / "run", tmp_path / "job.log"
    flags = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    own = {"DIFFCLIP_ROOT": str(ROOT), "VIRTUAL_ENV": sys.prefix, "MASTER_ADDR": "127.0.0.1"}
    own["MASTER_PORT"] = str(free_ports(1)[0])
    script = str(ROOT / "scripts" / "slurm" / "pretrain.sbatch")
    job = slurm("sbatch", *flags, f"--output={log}", script, *arguments, f"--output_dir={out}", **own).strip()
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(losses(out)) >= 3, 120)
    slurm("scancel", "--batch", "--signal=USR1", job)  # as Slurm does two minutes before the end
    wait_for(lambda: slurm("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING", 60)
    # It would wait two minutes; one that starts in the second in which its last step is ended counts as killed.
    wait_for(lambda: not any(p.info["name"].startswith("slurmstepd") for p in psutil.process_iter(["name"])), 60)
    time.sleep(2)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    first = json.loads((out / "run.json").read_text())
    run_ranks(2, "diffclip", "pretrain", *arguments, f"--output_dir={tmp_path / 'calm'}")  # beside the other half
    assert first["ranks"] == 2 and first["job"] == job and first["state"] in ("stopped", "running", "finished")
    wait_for(lambda: json.loads((out / "run.json").read_text())["state"] == "finished", 180)
    assert "stopped at step" in log.read_text() and "resumes at step" in log.read_text()
    assert losses(out) == losses(tmp_path / "calm") and len(losses(out)) == 32


def test_tasks_of_a_step_are_the_ranks_of_one_training(monkeypatch):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "11", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    step |= {"SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_JOB_ID": "123456", "MASTER_ADDR": "n1"}
    wanted = {"RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "23456"}
    for left_out in ("", "SLURM_STEP_ID"):  # which a batch script has not
        monkeypatch.setattr(os, "environ", {name: value for name, value in step.items() if name != left_out})
        ranks.join_slurm()
        found = {name: os.environ.get(name) for name in wanted}
        assert found == (dict.fromkeys(wanted) if left_out else wanted)
    monkeypatch.setattr(os, "environ", step | {"WORLD_SIZE": "2", "RANK": "0"})  # torchrun, started by srun
    ranks.join_slurm()
    assert os.environ["RANK"] == "0"
