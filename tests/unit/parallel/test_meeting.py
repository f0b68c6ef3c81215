"""Where ranks meet, and what becomes of a rank that cannot."""

import json
import socket
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
import torch.distributed as dist

from ecdit_ds.errors import EcditError, RankLostError, TopologyError
from ecdit_ds.parallel.setup import initialize_distributed
from ecdit_ds.slurm import preflight
from ecdit_ds.training import engine
from tests.helpers.forked import in_a_copy


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Yield a port that somebody else listens on; the environment names it as where rank 0 of 1 is to listen."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        told = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (told | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        yield port


@pytest.mark.parametrize("meet", [initialize_distributed, lambda: preflight._meet(5.0)])
def test_a_run_of_one_process_needs_no_port_and_listens_to_this_machine_only(
    meet: Callable[[], object], taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = [name for _, name in socket.if_nameindex() if name != "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", outside[-1] if outside else "none")  # as a site may set it for all jobs

    def command() -> int:
        meet()
        numbers = torch.ones(3)
        dist.all_reduce(numbers, group=dist.new_group([0]))
        parts: list[object] = [None]
        dist.all_gather_object(parts, numbers.tolist())
        heard = [at.laddr for at in psutil.Process().net_connections("inet") if at.status == psutil.CONN_LISTEN]
        print(json.dumps([parts, sorted({at.ip for at in heard if at.port != taken_port})]))
        return 0

    code, said, complaints = in_a_copy(command)
    assert code == 0, complaints
    parts, addresses = json.loads(said.splitlines()[-1])
    assert parts == [[1.0, 1.0, 1.0]]
    assert addresses in ([], ["127.0.0.1"])


@pytest.mark.parametrize(
    ("changes", "kind", "way_out"),
    [
        ({}, TopologyError, "start with deepspeed --master_port N"),
        ({"RANK": "1"}, RankLostError, "rank 0 was to be there, at n1"),
        ({"SLURM_STEP_ID": "2"}, RankLostError, "the job's next life has another, unless ECDIT_MASTER_PORT is set"),
    ],
)
def test_ranks_that_cannot_meet_have_a_user_error_only_where_the_user_can_mend_it(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], kind: type[EcditError], way_out: str
) -> None:
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    for name, value in (told | changes).items():
        monkeypatch.setenv(name, value)

    def refuse(**_: object) -> None:
        raise dist.DistNetworkError("no way\nat all")

    monkeypatch.setattr(engine.deepspeed, "init_distributed", refuse)
    with pytest.raises(kind, match=r"MASTER_PORT 29500: cannot be used \(no way\); ") as refused:
        initialize_distributed()
    assert way_out in str(refused.value)
