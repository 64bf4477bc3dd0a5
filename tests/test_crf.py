"""Dense CRF: snaps to edges, leaves absent classes absent, and the pool equals the serial result."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from modeling_msee.evaluation.crf import CRFParameters, CRFPool, dense_crf


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def densecrf():
    return pytest.importorskip("pydensecrf.densecrf", reason="needs the crf extra")


def disc_scene(height=60, width=80, seed=0):
    """A bright disc, its mask, and probabilities (5, H, W) of a blurred, shifted disc of class 2."""
    y, x = np.mgrid[:height, :width]
    mask = (y - 30) ** 2 + (x - 40) ** 2 < 18**2
    noise = np.random.default_rng(seed).integers(0, 8, size=(height, width, 3))
    image = (np.where(mask[..., None], (220, 60, 40), (30, 90, 140)) + noise).astype(np.uint8)
    distance = np.hypot(y - 32, x - 43)
    disc = 1 / (1 + np.exp((distance - 18) / 4))  # soft over ± 8 pixels
    probabilities = np.full((5, height, width), 1e-3, dtype=np.float32)
    probabilities[2] += disc
    probabilities[0] += 1 - disc
    return image, mask, probabilities / probabilities.sum(axis=0)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_blurred_mask_snaps_to_the_edge(densecrf):
    image, mask, probabilities = disc_scene()
    refined = dense_crf(image, probabilities)
    before, after = iou(probabilities.argmax(0) == 2, mask), iou(refined.argmax(0) == 2, mask)
    print(f"IoU {before:.3f} -> {after:.3f}")
    assert before < 0.8
    assert after > 0.97


def test_result_is_a_distribution_over_the_classes_present(densecrf):
    image, _, probabilities = disc_scene()
    refined = dense_crf(image, probabilities)
    assert refined.shape == probabilities.shape and refined.dtype == np.float32
    assert np.abs(refined.sum(axis=0) - 1).max() < 1e-4
    assert (refined[[1, 3, 4]] == 0).all()
    assert refined[2].max() > 0.9


def test_equals_the_library_on_all_classes_when_all_are_present(densecrf):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, size=(20, 24, 3), dtype=np.uint8)
    probabilities = rng.dirichlet(np.ones(3), size=(20, 24)).transpose(2, 0, 1).astype(np.float32)
    parameters = CRFParameters(
        iterations=3, gaussian_weight=2, gaussian_xy=4, bilateral_weight=5, bilateral_xy=6, bilateral_rgb=7
    )
    field = densecrf.DenseCRF2D(24, 20, 3)
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities.clip(1e-5, 1)).reshape(3, -1)))
    field.addPairwiseGaussian(sxy=4, compat=2)
    field.addPairwiseBilateral(sxy=6, srgb=7, rgbim=image, compat=5)
    expected = np.array(field.inference(3)).reshape(3, 20, 24)
    assert np.array_equal(dense_crf(image, probabilities, parameters), expected)


def test_background_takes_part_though_it_wins_nowhere(densecrf):
    image, _, probabilities = disc_scene()
    refined = dense_crf(image, probabilities[[1, 0, 2]])  # channel 0 is tiny everywhere
    assert (refined[0] > 0).any()
    assert refined[1].max() > 0.5 and refined[2].max() > 0.5


def test_one_class_only_stays_so(densecrf):
    image, _, _ = disc_scene()
    certain = np.zeros((3, 60, 80), dtype=np.float32)
    certain[0] = 1
    refined = dense_crf(image, certain)
    assert (refined[0] == 1).all() and (refined[1:] == 0).all()


def test_constant_image_and_hard_probabilities_are_finite(densecrf):
    _, _, probabilities = disc_scene()
    hard = (probabilities == probabilities.max(axis=0)).astype(np.float32)
    refined = dense_crf(np.full((60, 80, 3), 127, dtype=np.uint8), hard)
    assert np.isfinite(refined).all()
    assert set(np.unique(refined.argmax(0))) <= {0, 2}


def test_read_only_strided_and_float64_input(densecrf):
    image, _, probabilities = disc_scene()
    expected = dense_crf(image, probabilities)
    frozen = image.copy()
    frozen.setflags(write=False)
    assert np.array_equal(dense_crf(frozen, probabilities), expected)
    strided = np.asfortranarray(image)
    assert np.allclose(dense_crf(strided, np.asfortranarray(probabilities.astype(np.float64))), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "probabilities", "message"),
    [
        (
            np.zeros((4, 5, 3), np.float32),
            np.ones((2, 4, 5)),
            r"image must be uint8 \(H, W, 3\), got float32",
        ),
        (
            np.zeros((4, 5), np.uint8),
            np.ones((2, 4, 5)),
            r"image must be uint8 \(H, W, 3\), got uint8 \(4, 5\)",
        ),
        (np.zeros((4, 5, 3), np.uint8), np.ones((2, 5, 4)), r"size \(4, 5\), got \(2, 5, 4\)"),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), 3.0), r"must lie in \[0, 1\].*softmax"),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), np.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_bad_input(image, probabilities, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(image, probabilities)


def test_missing_package_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    image, _, probabilities = disc_scene()
    with pytest.raises(ImportError, match=r'pip install "msee\[crf\]"'):
        dense_crf(image, probabilities)
    with pytest.raises(ImportError, match=r'pip install "msee\[crf\]"'):
        CRFPool(workers=1)


def test_the_file_stands_alone_and_imports_pydensecrf_when_used():
    file = REPOSITORY / "modeling_msee" / "evaluation" / "crf.py"
    code = f"import runpy, sys; runpy.run_path({str(file)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"pydensecrf", "torch", "modeling_msee"} & set(loaded)  # the workers run it and stay small


def test_pool_equals_serial_in_order_and_bounds_the_items_in_flight(densecrf):
    scenes = [disc_scene(60, 70 + 3 * index, seed=index) for index in range(9)]
    taken, largest = 0, 0

    def items():
        nonlocal taken
        for image, _, probabilities in scenes:
            taken += 1
            yield image, probabilities

    with CRFPool(workers=2) as pool:
        for done, ((image, _, probabilities), labels) in enumerate(zip(scenes, pool.map(items()), strict=True)):
            largest = max(largest, taken - done)
            assert labels.dtype == np.uint8
            assert np.array_equal(labels, dense_crf(image, probabilities).argmax(0))
    assert taken == 9
    assert largest == 4

    with pytest.raises(ValueError, match="workers must be at least 1"):
        CRFPool(workers=0)


def test_submit_blocks_at_the_limit_and_worker_errors_arrive(densecrf):
    image, _, probabilities = disc_scene()
    with CRFPool(workers=1) as pool:
        assert pool.submit(image, probabilities).result().shape == (60, 80)
        with pytest.raises(ValueError, match="expected C <= 255, got 256"):
            pool.submit(image, np.full((256, 60, 80), 1 / 256, dtype=np.float32))
        held = [pool._free.acquire(blocking=False) for _ in range(2)]  # as two unfinished images would
        assert held == [True, True]
        thread = threading.Thread(target=pool.submit, args=(image, probabilities), daemon=True)
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive()
        pool._free.release()
        thread.join(timeout=10)
        assert not thread.is_alive()
        pool._free.release()
    bad = CRFParameters(bilateral_rgb="wide")  # type: ignore[arg-type]
    with CRFPool(workers=1, parameters=bad) as pool:
        with pytest.raises(RuntimeError, match=r"failed in a worker process:\n(.*\n)*TypeError"):
            pool.submit(image, probabilities).result()
        pool._workers[0].kill()
        with pytest.raises(RuntimeError, match="ended with exit code -9"):
            pool.submit(image, probabilities).result()


def test_leaving_the_pool_ends_its_workers_and_drops_the_queue_on_an_error(densecrf):
    image, _, probabilities = disc_scene()
    with CRFPool(workers=1) as pool:
        waited_for = [pool.submit(image, probabilities) for _ in range(2)]
    assert all(future.done() and not future.cancelled() for future in waited_for)
    assert pool._workers[0].returncode == 0
    with pytest.raises(KeyError), CRFPool(workers=1) as pool:
        dropped = [pool.submit(image, probabilities) for _ in range(2)]
        raise KeyError("leave")
    assert dropped[1].cancelled()
    assert pool._workers[0].returncode == 0
