"""The rehearsal at a site of another shape, where no node may ask Slurm for another life.

Cards have kinds, memory is counted, and Slurm kills five seconds after it said so. It requeues by itself after exit
code 42, and for a more urgent job. Nodes of one kind have no `scontrol`; that of the others answers all but a requeue,
which it refuses in the site's own words.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ecdit_ds.errors import ExitCode
from tests.helpers.slurm_jobs import STEPS, Job, Submitter, check_equal
from tools.local_slurm import LocalSlurm, why_not

SETTINGS = {
    "KillWait": "5",
    "JobRequeue": "0",
    "RequeueExit": "42",
    "SelectTypeParameters": "CR_Core_Memory",
    "MpiDefault": "pmi2",
    "EnforcePartLimits": "ALL",
}
NODES = ("gpu-r07c[01-02]", "vis-[9-10]")
CARDS = ("h100:2", "l40s:4")
NAMES = ["gpu-r07c01", "gpu-r07c02", "vis-9", "vis-10"]
PARTITIONS = f"""\
PartitionName=Rechnen.Std Nodes={NODES[0]} Default=YES MaxTime=30 PriorityTier=2 PreemptMode=REQUEUE GraceTime=10
PartitionName=Vorrang Nodes={NODES[0]} MaxTime=10 PriorityTier=7 PreemptMode=OFF
PartitionName=Bilder Nodes={NODES[1]} MaxTime=30 PriorityTier=2 PreemptMode=OFF
"""
REFUSAL = "Auftr\xe4ge d\xfcrfen hier nicht neu eingereiht werden (Benutzungsordnung, \xa7 7)."
"""In an encoding that the site has kept; so is the comment."""
COMMENT = "Requeue=1 Restarts=9 JobState=CANCELLED Reason=TimeLimit TimeLimit=00:00:01 r\udce9p\udce9tition"


class Site(LocalSlurm):
    """Two kinds of nodes that find other programs than the one who submits."""

    @property
    def node_names(self) -> list[str]:
        return NAMES

    def _write_files(self) -> None:
        super()._write_files()
        conf = self.folder / "slurm.conf"
        ours = [line for line in conf.read_text().splitlines() if not line.startswith(("NodeName=", "PartitionName="))]
        told = dict(line.split("=", 1) for line in ours if "=" in line)
        host, port = told["SlurmctldHost"].partition("(")[0], int(told["SlurmctldPort"])
        for index, (names, cards) in enumerate(zip(NODES, CARDS, strict=True)):
            first = port + 1 + 2 * index
            ours.append(
                f"NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{first + 1}] CPUs=8 "
                f"RealMemory=4000 Gres=gpu:{cards}"
            )
        conf.write_text("\n".join([*ours, f"TaskProlog={self.folder}/prolog", PARTITIONS]))
        (self.folder / "gres.conf").write_text(
            f"NodeName={NODES[0]} Name=gpu Type=h100 File={self.folder}/dev/gpu[0-1]\n"
            f"NodeName={NODES[1]} Name=gpu Type=l40s File={self.folder}/dev/gpu[0-3]\n"
        )
        self._write_programs()

    def _write_programs(self) -> None:
        without, refusing = self.folder / "without", self.folder / "refusing"
        without.mkdir()
        refusing.mkdir()
        for program in Path("/usr/bin").iterdir():
            if program.name != "scontrol":
                (without / program.name).symlink_to(program)
        script = f"#!/bin/sh\n[ $1 != requeue ] || {{ echo '{REFUSAL}' >&2; exit 1; }}\nexec /usr/bin/scontrol \"$@\"\n"
        (refusing / "scontrol").write_text(script, encoding="latin-1")
        (refusing / "scontrol").chmod(0o755)
        # What it prints is set for batch scripts and tasks of steps alike.
        (self.folder / "prolog").write_text(
            f"#!/bin/sh\ncase $SLURMD_NODENAME in gpu*) path={without};; *) path={refusing}:{without};; esac\n"
            "echo export PATH=$path\n"
        )
        (self.folder / "prolog").chmod(0o755)


@pytest.fixture(scope="module")
def site() -> Iterator[LocalSlurm]:
    """Start that site's Slurm, and leave nothing of it."""
    if reason := why_not():
        pytest.skip(f"no Slurm here: {reason}")
    with Site(nodes=len(NAMES), gpus=4, settings=SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def submit_there(site: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Submitter:
    """Return what `submit` is, for this site."""
    return Submitter(site, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def limited(submit_there: Submitter) -> Job:
    """Submit a job to one node whose scontrol refuses; its first life is too slow for its time limit."""
    slow_once = submit_there.root / "slow_once.sh"
    slow_once.write_text('#!/bin/bash\n[ -z "$SLURM_RESTART_COUNT" ] || unset ECDIT_FAULTS\nexec "$@"\n')
    slow_once.chmod(0o755)
    return submit_there(
        "KEY=VALUE",
        "--job-name=KEY=VALUE",
        "--comment",
        COMMENT,
        "--partition=Bilder",
        "--gres=gpu:l40s:2",
        "--ntasks-per-node=2",
        "--time=2",
        "--signal=USR1@60",
        nodes=1,
        faults="delay=2.5@step",
        environment={"ECDIT_WRAPPER": str(slow_once)},
    )


@pytest.fixture(scope="module")
def refused(site: LocalSlurm, limited: Job, uninterrupted: Path) -> Job:
    """Return that job after its first life; from where it was submitted, it gets time enough for a slow machine."""
    limited.wait_until(lambda: bool(limited.ends()), "its first life's end")
    site.ask("scontrol", "update", f"JobId={limited.number}", "TimeLimit=20")
    return limited


@pytest.fixture(scope="module")
def blind(submit_there: Submitter, refused: Job) -> Job:
    """Submit a job to nodes without scontrol, with its checks, beside the other one."""
    name = "50%j of a %4t run %%%"
    job = submit_there(
        name,
        f"--job-name={name}",
        f"--output={submit_there.root}/%x-%j.log",
        "--comment",
        COMMENT,
        "--gpus-per-node=h100:2",
        "--time=20",
        environment={"ECDIT_PREFLIGHT": "1"},
    )
    return replace(job, log=submit_there.root / f"{name}-{job.number}.log")


def test_a_preempted_rehearsal_on_nodes_without_scontrol_ends_as_the_uninterrupted_run(
    site: LocalSlurm, blind: Job, uninterrupted: Path
) -> None:
    blind.wait_for_step(7)
    ranks = [process.environ() for process in blind.ranks()]
    assert [(rank["SLURM_STEP_GPUS"], rank["CUDA_VISIBLE_DEVICES"]) for rank in ranks] == [("0,1", "")] * 2
    urgent = ["--partition=Vorrang", "--nodes=2", "--exclusive", "--gpus-per-node=h100:2", "--time=1"]
    site.ask("sbatch", *urgent, "--output=/dev/null", "--wrap=sleep 1")
    assert blind.wait() == "COMPLETED", blind.text
    assert [(end["code"], end["is_again"]) for end in blind.ends()] == [
        (ExitCode.CHECKPOINTED, True),
        (ExitCode.DONE, False),
    ]
    missing = f"scontrol show job {blind.number}: No such file or directory"
    told = [line.split(maxsplit=2)[2] for line in blind.text.splitlines() if "scontrol" in line]
    assert told == [
        f"the time limit is not known here ({missing}); going on without",
        f"not requeued: {missing}; unless Slurm does after exit code 42, submit anew: it goes on from the newest "
        "checkpoint",
        f"the time limit is not known here ({missing}); going on without",
    ]
    assert "all checks passed" in blind.text and "waiting for Slurm" not in blind.text
    check_equal(blind, uninterrupted)


def test_a_rehearsal_refused_a_requeue_in_a_sites_own_words_goes_on_after_its_limit_and_ends_as_the_uninterrupted_run(
    refused: Job, uninterrupted: Path
) -> None:
    assert refused.wait() == "COMPLETED", refused.text
    *saved, last = refused.ends()
    assert saved and {(end["code"], end["is_again"]) for end in saved} == {(ExitCode.CHECKPOINTED, True)}, refused.text
    assert (last["code"], last["step"]) == (ExitCode.DONE, STEPS)
    assert len(saved) == refused.restarts
    told = [line.split(maxsplit=2)[2] for line in refused.text.splitlines() if "scontrol" in line]
    refusal = REFUSAL.encode("latin-1").decode(errors="backslashreplace")
    assert told == len(saved) * [
        f"left to Slurm, which requeues after exit code 42 (RequeueExit): scontrol requeue {refused.number}: {refusal}"
    ]
    assert refused.text.count("not requeued") == refused.text.count("not requeued: training is done") == 1
    assert "is not known" not in refused.text and "Traceback" not in refused.text
    check_equal(refused, uninterrupted)
