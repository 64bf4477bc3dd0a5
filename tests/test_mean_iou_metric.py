"""The evaluate.Metric: streaming, exact across processes, loadable from its folder without a network."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from modeling_msee.evaluation.confusion import confusion_matrix, scores


pytest.importorskip("evaluate")
from modeling_msee.evaluation.mean_iou.mean_iou import MeanIoU


REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "modeling_msee" / "evaluation" / "mean_iou"

# Process p of 2 adds its maps and computes three times without a pause; in the last round process 1 has none.
TWO_PROCESSES = """
import json, sys
import evaluate, numpy as np
folder, cache, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
metric = evaluate.load(
    folder, num_classes=4, num_process=2, process_id=rank, experiment_id="test", cache_dir=cache
)
results = []
for round in range(3):
    if not (round == 2 and rank == 1):
        rng = np.random.default_rng([round, rank])
        for _ in range(3 + rank):
            maps = rng.integers(0, 4, size=(2, 9, 7 + rank))
            metric.add_batch(predictions=maps[:1], references=maps[1:])
    results.append(metric.compute())
print(json.dumps(results))
"""


def expected_of_round(round_index: int, ranks: list[int]) -> dict:
    total = np.zeros((4, 4), dtype=np.int64)
    for rank in ranks:
        rng = np.random.default_rng([round_index, rank])
        for _ in range(3 + rank):
            maps = rng.integers(0, 4, size=(2, 9, 7 + rank))
            total += confusion_matrix(maps[0], maps[1], 4)
    return dict(scores(total))


def test_two_processes_load_from_the_folder_offline_and_agree_exactly(tmp_path):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(FOLDER), str(tmp_path / "cache"), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(output) for output, _ in outputs)
    assert second == [None, None, None]
    assert first == [expected_of_round(0, [0, 1]), expected_of_round(1, [0, 1]), expected_of_round(2, [0])]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_add_add_batch_and_compute_count_alike(tmp_path):
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 3, size=(2, 5, 6, 4))
    references[0, 0, 0] = 255
    expected = scores(confusion_matrix(predictions, references, 3))
    one, batch, whole = (MeanIoU(num_classes=3, cache_dir=str(tmp_path)) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        one.add(prediction=prediction, reference=reference)
    batch.add_batch(predictions=predictions[:2], references=references[:2])
    batch.add_batch(predictions=predictions[2:].tolist(), references=references[2:].tolist())
    assert one.compute() == batch.compute() == expected
    assert whole.compute(predictions=predictions, references=references) == expected
    assert expected["pixels"] == 5 * 6 * 4 - 1


def test_keeps_the_matrix_only_and_starts_again_after_compute(tmp_path):
    metric = MeanIoU(num_classes=3, cache_dir=str(tmp_path))
    before = set(vars(metric))
    for _ in range(50):
        metric.add(prediction=np.ones((40, 40), int), reference=np.ones((40, 40), int))
    assert set(vars(metric)) == before
    assert metric.matrix.shape == (3, 3) and metric.matrix.sum() == 50 * 1600
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert metric.compute()["pixels"] == 50 * 1600
    metric.add(prediction=np.zeros((1, 2), int), reference=np.ones((1, 2), int))
    assert metric.compute()["pixels"] == 2


def test_a_bad_batch_leaves_the_count_alone(tmp_path):
    metric = MeanIoU(num_classes=3, cache_dir=str(tmp_path))
    good, bad = np.zeros((2, 2), int), np.full((2, 2), 7)
    with pytest.raises(ValueError, match="got 7"):
        metric.add_batch(predictions=[good, good], references=[good, bad])
    assert metric.matrix.sum() == 0
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric.add_batch(predictions=[good, good], references=[good])
    with pytest.raises(ValueError, match="no pixel was counted"):
        metric.compute()
    with pytest.raises(ValueError, match="together"):
        metric.compute(predictions=[good])


def run_ranks(tmp_path, rounds: int, ranks: int, delay: dict[int, float]) -> list[list]:
    """`ranks` metrics in threads; in round r rank p counts 10^p·(r+1) pixels of class 0."""
    results: list[list] = [[] for _ in range(ranks)]

    def work(rank: int) -> None:
        metric = MeanIoU(num_classes=2, num_process=ranks, process_id=rank, cache_dir=str(tmp_path), timeout=20)
        threading.Event().wait(delay.get(rank, 0))
        for index in range(rounds):
            zeros = np.zeros(10**rank * (index + 1), int)
            metric.add(prediction=zeros, reference=zeros)
            results[rank].append(metric.compute())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_rounds_back_to_back_never_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[MeanIoU.__module__], "_POLL_SECONDS", 0)
    results = run_ranks(tmp_path, rounds=150, ranks=4, delay={})
    assert [result["pixels"] for result in results[0]] == [1111 * (index + 1) for index in range(150)]
    assert results[1] == results[2] == results[3] == [None] * 150


def test_files_of_a_run_that_died_are_not_counted(tmp_path):
    folder = Path(MeanIoU(num_classes=2, cache_dir=str(tmp_path)).data_dir)
    (folder / "default_experiment-2-request").write_text("dead")
    with (folder / "default_experiment-2-dead-1.npy").open("wb") as file:
        np.save(file, np.full((2, 2), 1000))
    results = run_ranks(tmp_path, rounds=2, ranks=2, delay={0: 0.3})  # rank 1 meets the dead request first
    assert [result["pixels"] for result in results[0]] == [11, 22]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("rank", "message"), [(0, "process 1 delivered no"), (1, "process 0 did not collect")])
def test_a_missing_process_times_out_and_loses_nothing(tmp_path, rank, message):
    metric = MeanIoU(num_classes=2, num_process=2, process_id=rank, cache_dir=str(tmp_path), timeout=0.1)
    metric.add(prediction=np.zeros(3, int), reference=np.zeros(3, int))
    with pytest.raises(TimeoutError, match=message):
        metric.compute()
    assert metric.matrix[0, 0] == 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
