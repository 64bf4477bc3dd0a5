"""Data workers under the SIGTERM of a whole job."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import pytest


if sys.platform != "linux":
    pytest.skip("on other systems the workers are PyTorch's own", allow_module_level=True)

from accelerate.data_loader import DataLoaderAdapter

from modeling_msee.training.workers import PatientContext, with_patient_workers


def echo(connection: Connection) -> None:
    while True:
        connection.send(connection.recv())


def test_worker_stays_when_others_send_sigterm_and_leaves_when_its_parent_does() -> None:
    here, there = multiprocessing.Pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    worker = PatientContext().Process(target=echo, args=(there,), daemon=True)
    worker.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    for count in range(3):  # the first may come before the worker has begun
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        here.send(count)
        assert here.poll(60), "the worker has gone"
        assert here.recv() == count
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def leave_while_a_signal_waits() -> None:
    """End with a worker that cannot take a second SIGTERM yet: another's, which says nothing to it, is waiting."""
    worker = PatientContext().Process(target=time.sleep, args=(300,), daemon=True)
    worker.start()
    os.kill(worker.pid, signal.SIGSTOP)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {worker.pid}"])


def test_parent_that_leaves_does_not_wait_for_ever() -> None:
    parent = multiprocessing.get_context("fork").Process(target=leave_while_a_signal_waits)
    parent.start()
    parent.join(60)
    ended = parent.exitcode
    parent.kill()
    assert ended == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_workers": 0}, "NoneType"),
        ({"num_workers": 1}, "PatientContext"),
        ({"num_workers": 1, "multiprocessing_context": "spawn"}, "SpawnContext"),
    ],
)
def test_loader_that_was_told_how_to_start_its_workers_keeps_to_it(options: dict, name: str) -> None:
    loader = with_patient_workers(DataLoaderAdapter([1, 2, 3, 4], batch_size=2, **options))
    assert type(loader.base_dataloader.multiprocessing_context).__name__ == name
