"""What a task of a Slurm step becomes: a rank that all others agree with."""

from collections.abc import Callable, Iterator

import pytest

from ecdit_ds.slurm.ranks import VISIBLE_DEVICES, first_host, rank_environment, tasks_by_node

RefusalOf = Callable[[Callable[[], object]], str]
Environment = dict[str, str]

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu-[003,007]",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "99",
    "SLURM_NODELIST": "elsewhere[1-9]",
    "SLURM_TASKS_PER_NODE": "9(x9)",
}
"""The last of four tasks; the job is larger than the step."""


def tasks_of_step(counts: list[int], told: str, **more: str) -> Iterator[Environment]:
    """Yield what srun tells each task of a step that has so many on each node."""
    rank = 0
    for node, count in enumerate(counts):
        for local in range(count):
            yield TASK | {
                "SLURM_PROCID": str(rank),
                "SLURM_NODEID": str(node),
                "SLURM_LOCALID": str(local),
                "SLURM_STEP_NUM_TASKS": str(sum(counts)),
                "SLURM_STEP_TASKS_PER_NODE": told,
                "SLURM_STEP_NODELIST": f"n[1-{len(counts)}]",
                **more,
            }
            rank += 1


def test_a_task_is_the_rank_that_its_step_says_and_not_its_job() -> None:
    assert rank_environment(TASK) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu-003",
        "MASTER_PORT": rank_environment(TASK)["MASTER_PORT"],
    }


@pytest.mark.parametrize(
    ("counts", "told"),
    [([1], "1"), ([8], "8"), ([8] * 64, "8(x64)"), ([2, 2, 1], "2(x2),1"), ([1, 3, 3, 2], "1,3(x2),2")],
)
def test_ranks_are_numbered_without_gaps_and_agree_on_where_to_meet(counts: list[int], told: str) -> None:
    ranks = [rank_environment(task) for task in tasks_of_step(counts, told)]
    assert [int(rank["RANK"]) for rank in ranks] == list(range(sum(counts)))
    assert {rank["WORLD_SIZE"] for rank in ranks} == {str(sum(counts))}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1
    places = [(int(rank["LOCAL_RANK"]), int(rank["LOCAL_SIZE"])) for rank in ranks]
    assert places == [(local, count) for count in counts for local in range(count)]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-64]", "n1"),
        ("gpu-[003,007-009],login[1-2]", "gpu-003"),
        ("a[1-2]b[03-04]", "a1b03"),
        ("rack2-gpu[0099-0101].site.org", "rack2-gpu0099.site.org"),
        ("login,gpu[1-2]", "login"),
        ("a_b,c", "a_b"),
        ("10.0.0.7,10.0.0.8", "10.0.0.7"),
    ],
)
def test_ranks_meet_on_the_steps_first_node(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
    assert rank_environment(TASK | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == host


def test_counts_of_tasks_are_spelled_out() -> None:
    assert tasks_by_node("2(x2),1,12(x3)") == [2, 2, 1, 12, 12, 12]


def test_tasks_of_an_array_are_their_own_jobs() -> None:
    """As Slurm has it: tasks of array 11 are jobs 12 and, the last of all, 11."""
    ports = {
        rank_environment(TASK | {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": task})[
            "MASTER_PORT"
        ]
        for job, task in (("12", "0"), ("13", "1"), ("11", "2"))
    }
    assert len(ports) == 3


@pytest.mark.parametrize(
    ("devices", "local_rank"),
    [("0", "0"), ("5", "0"), ("GPU-8f2c", "0"), ("0,1", "1"), ("", "1"), ("GPU-8f2c,GPU-11aa", "1")],
)
def test_the_one_gpu_of_a_task_is_number_0_to_it(devices: str, local_rank: str) -> None:
    assert rank_environment(TASK | {"CUDA_VISIBLE_DEVICES": devices})["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("told", "local_rank"),
    [
        ({"ROCR_VISIBLE_DEVICES": "3"}, "0"),
        ({"HIP_VISIBLE_DEVICES": "3"}, "0"),
        ({"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1"}, "0"),
        ({"ROCR_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "0"),
        ({"ROCR_VISIBLE_DEVICES": "0,1"}, "1"),
        ({"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "0,1"}, "1"),
    ],
)
def test_a_gpu_of_amd_is_understood_as_one_of_nvidia(told: dict[str, str], local_rank: str) -> None:
    assert rank_environment(TASK | told)["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize("told", [{}, {"CUDA_VISIBLE_DEVICES": "2"}, {"ROCR_VISIBLE_DEVICES": "0,1"}])
def test_a_rehearsing_rank_sees_no_gpu_whatever_slurm_gave_it(told: dict[str, str]) -> None:
    rank = rank_environment(TASK | told | {"ECDIT_REHEARSAL": "1"})
    assert (rank["CUDA_VISIBLE_DEVICES"], rank["HIP_VISIBLE_DEVICES"]) == ("", "-1")
    assert not set(VISIBLE_DEVICES) & rank_environment(TASK | told).keys()


def test_a_site_overrules_where_ranks_meet() -> None:
    site = TASK | {"ECDIT_MASTER_ADDR": "10.1.2.3", "ECDIT_MASTER_PORT": "23456", "SLURM_STEP_NODELIST": "?"}
    rank = rank_environment(site)
    assert (rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("10.1.2.3", "23456")


def test_a_sites_empty_variables_overrule_nothing() -> None:
    site = TASK | {"ECDIT_MASTER_ADDR": "", "ECDIT_MASTER_PORT": "", "SLURM_RESTART_COUNT": ""}
    assert rank_environment(site) == rank_environment(TASK)


def test_ports_differ_between_steps_lives_and_neighbouring_jobs_and_no_system_hands_them_out() -> None:
    def port(job: int, life: int, step: int) -> int:
        told = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(life), "SLURM_STEP_ID": str(step)}
        return int(rank_environment(TASK | told)["MASTER_PORT"])

    # A life has three steps at most: the recipe's check, the nodes' check, and training.
    ports = [port(job, life, step) for job in range(4711, 4721) for life in range(5) for step in range(3)]
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port(job, 7, 2) < 32768 for job in (1, 99, 12345, 2**31 - 1, 67_000_000))


@pytest.mark.parametrize("name", sorted(set(TASK) - {"SLURM_NTASKS", "SLURM_NODELIST", "SLURM_TASKS_PER_NODE"}))
def test_a_task_that_srun_did_not_start_is_refused(name: str, refusal_of: RefusalOf) -> None:
    told = {key: value for key, value in TASK.items() if key != name}
    message = refusal_of(lambda: rank_environment(told))
    assert name in message and "srun" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "three"),
        ("SLURM_PROCID", "4"),  # of four
        ("SLURM_LOCALID", "-1"),
        ("SLURM_LOCALID", "2"),
        ("SLURM_NODEID", "2"),
        ("SLURM_NODEID", ""),
        ("SLURM_JOB_ID", "12_3"),
        ("SLURM_STEP_ID", "batch"),
        ("SLURM_STEP_NUM_TASKS", "4(x2)"),
        ("SLURM_STEP_NUM_TASKS", "0"),
        ("SLURM_RESTART_COUNT", "often"),
        ("SLURM_STEP_TASKS_PER_NODE", ""),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2),"),
        ("SLURM_STEP_TASKS_PER_NODE", "two"),
        ("SLURM_STEP_NODELIST", ""),
        ("SLURM_STEP_NODELIST", "[1-2"),
        ("SLURM_STEP_NODELIST", "(null)"),
        ("SLURM_STEP_NODELIST", "gpu-[a-b]"),
        ("ECDIT_MASTER_PORT", "http"),
        ("ECDIT_MASTER_PORT", "0"),
        ("ECDIT_MASTER_PORT", "65536"),
    ],
)
def test_a_variable_that_cannot_be_is_named_with_its_value(name: str, value: str, refusal_of: RefusalOf) -> None:
    message = refusal_of(lambda: rank_environment(TASK | {name: value}))
    assert name in message or "SLURM_PROCID" in message  # of no task
    assert value in message
