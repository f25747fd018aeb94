"""Who is who, and the roll within one process; jobs of several are in tests/multi_process."""

import json
import socket
import threading
import time

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.parallel.config import HostsConfig, MeshConfig
from mlp_memory.parallel.hosts import Hosts, joined
from mlp_memory.parallel.places import Place, expand_nodes, find_place

WAITS = HostsConfig(start_timeout=20.0, heartbeat_timeout=20.0)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in ("COORDINATOR", "PROCESSES", "PROCESS"):
        monkeypatch.delenv(f"MLP_MEMORY_{name}", raising=False)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_slurm_node_list_is_expanded():
    assert expand_nodes("node[001-003,7],b,c2-[9-10]") == [
        "node001",
        "node002",
        "node003",
        "node7",
        "b",
        "c2-9",
        "c2-10",
    ]
    assert expand_nodes("") == []


def test_a_process_without_a_cluster_is_alone(monkeypatch):
    assert find_place(1.0) is None
    monkeypatch.setenv("MLP_MEMORY_PROCESSES", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a[1-4]")
    assert find_place(1.0) is None
    with joined(WAITS) as hosts:
        assert (hosts.index, hosts.count, hosts.agree({"a": 1})) == (0, 1, {"a": 1})


def test_the_number_of_a_pod_of_an_indexed_job_is_taken(monkeypatch):
    monkeypatch.setenv("MLP_MEMORY_COORDINATOR", "train-0.pods:8476")
    monkeypatch.setenv("MLP_MEMORY_PROCESSES", "4")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert find_place(1.0) == Place("train-0.pods:8476", 4, 3)
    monkeypatch.setenv("MLP_MEMORY_PROCESS", "2")
    assert find_place(1.0).index == 2


def test_slurm_tells_a_process_its_place_and_where_the_others_are(monkeypatch):
    slurm = {"NTASKS": "4", "PROCID": "2", "LOCALID": "0", "JOB_ID": "5", "STEP_NODELIST": "n[08-09]"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = find_place(1.0)
    assert (place.count, place.index, place.local_device_ids) == (4, 2, [0])
    assert place.address.startswith("n08:")
    assert place.names == {0: "n08", 1: "n08", 2: "n09", 3: "n09"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PROCESSES": "two"}, "whole numbers"),
        ({"PROCESS": ""}, "whole numbers"),
        ({"PROCESS": "2"}, "give 0 to 1"),
        ({"COORDINATOR": "host"}, "give host:port"),
    ],
)
def test_variables_that_do_not_fit_together_are_one_line(monkeypatch, changes, words):
    for name, value in {"COORDINATOR": "a:1", "PROCESSES": "2", "PROCESS": "0", **changes}.items():
        monkeypatch.setenv(f"MLP_MEMORY_{name}", value)
    with pytest.raises(UserError, match=words):
        find_place(1.0)


def test_all_processes_get_the_value_of_process_0_and_part_in_peace(port):
    found = {}

    def work(index: int) -> None:
        hosts = Hosts(Place(f"127.0.0.1:{port}", 3, index), WAITS)
        hosts.call_roll()
        found[index] = [hosts.agree(n if index == 0 else None) for n in range(5)]
        hosts.leave()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {index: [0, 1, 2, 3, 4] for index in range(3)}


def test_what_process_0_says_in_one_breath_with_the_roll_is_heard(port):
    with socket.create_server(("127.0.0.1", port)) as server:
        hosts = Hosts(Place(f"127.0.0.1:{port}", 2, 1), WAITS)
        roll = threading.Thread(target=hosts.call_roll)
        roll.start()
        zero = server.accept()[0]
        messages = [{"names": [[0, "a"], [1, "b"]], "port": 1}, {"agree": "distill"}, {"left": 0}]
        zero.sendall("".join(json.dumps(message) + "\n" for message in messages).encode())
        roll.join(60)
        assert hosts.agree() == "distill"
        hosts.leave()
        zero.close()


def test_a_number_that_is_taken_and_another_count_are_refused_by_process_0(port):
    zero = Hosts(Place(f"127.0.0.1:{port}", 3, 0), HostsConfig(start_timeout=5.0))
    errors = []

    def call() -> None:
        with pytest.raises(UserError) as error:
            zero.call_roll()
        errors.append(str(error.value))

    roll = threading.Thread(target=call)
    roll.start()
    with pytest.raises(UserError, match="process 0 was told of 3 processes, process 1 of 2"):
        Hosts(Place(f"127.0.0.1:{port}", 2, 1), WAITS).call_roll()
    first = socket.create_connection(("127.0.0.1", port))
    first.sendall(b'{"process": 1, "count": 3, "host": "a"}\n')
    while 1 not in zero._wires:
        time.sleep(0.01)
    with pytest.raises(UserError, match="there is a process 1 already, on host a"):
        Hosts(Place(f"127.0.0.1:{port}", 3, 1), WAITS).call_roll()
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'5\n{"process": []}\n')
    roll.join(60)
    first.close()
    assert errors[0].startswith("1 of 3 processes did not come within hosts.start_timeout = 5 s: process 2;")


def test_a_port_that_is_taken_is_one_line(port):
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=f"process 0 cannot listen at port {port}"),
    ):
        Hosts(Place(f"127.0.0.1:{port}", 2, 0), WAITS).call_roll()


@pytest.mark.parametrize(
    ("fsdp", "tensor", "devices", "sizes"), [(2, 2, 8, (1, 2, 2, 2)), (4, 2, 4, (1, 4, 1, 1))]
)
def test_one_process_keeps_the_model_parts_of_the_mesh_if_its_devices_allow(fsdp, tensor, devices, sizes):
    mesh = MeshConfig(data=3, fsdp=fsdp, tensor=tensor, slice=2)
    assert mesh.of_one_process(devices).sizes(devices) == sizes
