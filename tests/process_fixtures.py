"""Runs of train_msee.py in processes of their own, which talk over gloo; ask for them with `pytest_plugins`.

All are forked from one process that has imported everything, so that a run costs little more than its steps.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import psutil
import pytest
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from training_fixtures import ROOT, train_msee


FSDP_RECIPE = ROOT / "configuration" / "accelerate" / "fsdp.yaml"

Start = Callable[..., "Run"]


def _rank(rank: int, count: int, port: int, cache: Path, log: Path, words: Sequence[str], fsdp: bool) -> None:
    """One process of a run; all write to one log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    datasets.config.HF_DATASETS_CACHE = cache
    # The loader's workers start as they do in any other process.
    multiprocessing.set_start_method(None, force=True)
    if fsdp:
        _shard_on_the_cpu(count)
    train_msee.main(list(words))


def _shard_on_the_cpu(count: int) -> None:
    """What `accelerate launch` makes of the recipe, and the one thing that it lacks on the CPU.

    It shards for several processes of any kind but MULTI_CPU, so these pass for MULTI_GPU.
    """
    words = ["--config_file", str(FSDP_RECIPE), "--num_processes", str(count), "--mixed_precision", "no", "script"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    launched = prepare_multi_gpu_env(arguments)
    os.environ |= {name: launched[name] for name in launched if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    prepare = PartialState.__init__

    def pass_for_gpus(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pass_for_gpus


class Run:
    """A run of train_msee.py in one or more processes."""

    def __init__(self, processes: list[BaseProcess], log: Path):
        self.processes = processes
        self.log = log

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def send(self, number: int) -> None:
        """To the processes and their data workers, as schedulers and `timeout` do."""
        ranks = [psutil.Process(process.pid) for process in self.processes]
        for process in [*ranks, *(worker for rank in ranks for worker in rank.children())]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker may have left since
                process.send_signal(number)

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 600
        while not path.exists():
            assert all(process.is_alive() for process in self.processes), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def wait(self, code: int = 0) -> str:
        """What all processes wrote, once they have ended with this exit code."""
        deadline = time.monotonic() + 600
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
            assert process.exitcode == code, self.text
        return self.text


@pytest.fixture(scope="session")
def start(dataset_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start(output, *words, processes=1, fsdp=False)`: train_msee.py with these words, in so many processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["process_fixtures"])
    logs, runs = tmp_path_factory.mktemp("logs"), []
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
        for name, value in (("PYTHONPATH", path), ("OMP_NUM_THREADS", "1"), ("ACCELERATE_USE_CPU", "true")):
            patch.setenv(name, value)

        def start_run(output: Path, *words: object, processes: int = 1, fsdp: bool = False) -> Run:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            log, words = logs / f"{len(runs)}.txt", (*words, "--output_dir", output)
            arguments = (processes, port, dataset_cache, log, [str(word) for word in words], fsdp)
            ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(processes)]
            for process in ranks:
                process.start()
            runs.append(Run(ranks, log))
            return runs[-1]

        yield start_run
        for run in runs:
            for process in run.processes:
                process.kill()
