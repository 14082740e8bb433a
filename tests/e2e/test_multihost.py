"""Two processes with two devices each as one replica: the real command, a real client, and what a death does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from engine.config import EngineOptions
from engine.errors import InvalidParam
from server.config import ServerOptions
from server.run import serve
from tests.e2e.serving import COMMAND, ROOT, START_S, flags
from tests.model.models import expected
from tests.ports import free_ports

TINY = ROOT / "tests" / "fixtures" / "models" / "llama"  # two KV heads: each on two of the four devices
SHARDING = "mesh: {tensor: fill}\nrules:\n- kv_heads: {axes: tensor, replicate: true}\n- vocab: tensor\n"
OPTIONS = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 256}
ENDS_S = 10.0


@dataclass
class Pair:
    leader: subprocess.Popen[bytes]
    follower: subprocess.Popen[bytes]
    logs: dict[str, Path]

    @property
    def url(self) -> str:
        found = re.search(r"listening on (http://\S+),", self.logs["leader"].read_text())
        assert found, self.said()
        return found[1]

    def said(self) -> str:
        return "\n".join(f"{name}: {log.read_text()}" for name, log in self.logs.items())


@contextmanager
def started(
    folder: Path, wait: bool = True, slurm: bool = False, port: int | None = None, **changes: object
) -> Iterator[Pair]:
    """Both processes, ready to serve. slurm: they are told nothing but SLURM's variables. changes: of the follower's
    options."""
    (folder / "four.yaml").write_text(SHARDING)
    port = free_ports(2) if port is None else port
    shared = {"sharding": folder / "four.yaml", "coordinator": f"127.0.0.1:{port}", "num_processes": 2} | OPTIONS
    command = [*COMMAND, "serve", str(TINY), "--skip-tokenizer-init", "--multihost", "--port", "0"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    logs = {name: folder / f"{name}.log" for name in ("leader", "follower")}
    processes = []
    for index, (log, options) in enumerate(zip(logs.values(), (shared, shared | changes), strict=True)):
        words = [*command, *flags(**options, process_id=index)]
        if slurm:
            asked = {name: value for name, value in options.items() if name not in ("coordinator", "num_processes")}
            words, environment = [*command, *flags(**asked)], environment | slurm_variables(port, index)
        with log.open("wb") as file:
            processes.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file))
    pair = Pair(processes[0], processes[1], logs)
    try:
        if wait:
            until(lambda: "ready: llama" in logs["leader"].read_text(), pair)
        yield pair
    finally:
        for process in processes:
            process.kill()
            process.wait()


def slurm_variables(port: int, index: int) -> dict[str, str]:
    """Of a step of two processes, which JAX's coordinator serves at about that port."""
    place = {"SLURM_PROCID": str(index), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    return place | {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1"}


def until(holds: Callable[[], bool], pair: Pair) -> None:
    deadline_s = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < deadline_s and pair.leader.poll() is None and pair.follower.poll() is None, (
            pair.said()
        )
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("slurm", [False, True], ids=["flags", "slurm"])
def test_tokens_are_transformers_and_a_signal_ends_both(slurm: bool, tmp_path: Path) -> None:
    with started(tmp_path, slurm=slurm) as pair:
        client = openai.OpenAI(base_url=pair.url + "/v1", api_key="none", max_retries=0)
        for case in expected("llama"):
            answer = client.completions.create(
                model="llama", prompt=case.prompt, max_tokens=40, temperature=0, extra_body={"return_token_ids": True}
            )
            assert answer.choices[0].model_dump()["token_ids"] == case.greedy[:40]
        pair.follower.send_signal(signal.SIGTERM)  # as Kubernetes does, to all: the leader says when it is over
        pair.leader.send_signal(signal.SIGTERM)
        assert (pair.leader.wait(ENDS_S), pair.follower.wait(ENDS_S)) == (0, 0), pair.said()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_who_is_left_alone_ends_in_seconds(victim: str, tmp_path: Path) -> None:
    with started(tmp_path) as pair:
        dies, stays = (pair.leader, pair.follower) if victim == "leader" else (pair.follower, pair.leader)
        dies.kill()
        assert stays.wait(ENDS_S) == 1, pair.said()
        assert f"process {int(victim == 'follower')} is gone" in pair.said()


def test_processes_that_differ_are_told_apart(tmp_path: Path) -> None:
    with started(tmp_path, wait=False, max_num_seqs=3) as pair:
        assert (pair.leader.wait(START_S), pair.follower.wait(ENDS_S)) == (1, 1), pair.said()
        assert "process 1 is configured otherwise: max_num_seqs is 2 here and 3 there" in pair.said()


def test_a_port_that_jax_cannot_have_is_named(tmp_path: Path) -> None:
    port = free_ports(2)
    with socket.create_server(("127.0.0.1", port + 1)), started(tmp_path, wait=False, port=port) as pair:
        assert (pair.leader.wait(START_S), pair.follower.wait(ENDS_S)) == (1, 1), pair.said()
        assert f"error: cannot listen on port {port + 1} for JAX's coordinator" in pair.said()


def test_flags_of_several_processes_need_multihost() -> None:
    with pytest.raises(InvalidParam, match="process_id: is for multihost"):
        serve(EngineOptions(), ServerOptions(process_id=1))


@pytest.mark.slow
def test_no_cluster_is_said_with_what_was_looked_for() -> None:
    command = [*COMMAND, "serve", str(TINY), "--multihost", "--join-timeout-s", "5"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1
    for looked_for in ("LWS_LEADER_ADDRESS", "SLURM", "a TPU slice"):
        assert looked_for in done.stderr, done.stderr
