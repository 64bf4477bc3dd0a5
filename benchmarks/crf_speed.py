"""CPU-seconds that the dense CRF takes for one image of PASCAL VOC's size, by the number of classes present.

python -m benchmarks.crf_speed
"""

import time

import numpy as np

from modeling_msee.evaluation.crf import dense_crf


HEIGHT, WIDTH, CLASSES, REPEATS = 375, 500, 21, 3


def main() -> None:
    print(f"{WIDTH}x{HEIGHT}, {CLASSES} classes, best of {REPEATS}\npresent  CPU-seconds")
    for present in (2, 3, 4, 6, CLASSES):
        image, probabilities = scene(present)
        print(f"{present:7d}  {min(cpu_seconds(image, probabilities) for _ in range(REPEATS)):11.2f}")


def scene(present: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image of vertical stripes, and blurred probabilities of `present` classes, one a stripe."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 230, (present, 3))
    position = np.arange(WIDTH) * present / WIDTH
    image = colours[position.astype(int)][None] + rng.integers(0, 25, (HEIGHT, WIDTH, 3))
    scores = np.full((CLASSES, HEIGHT, WIDTH), -8.0)
    for label in range(present):
        scores[label] = -4 * np.abs(position - label - 0.5) + rng.normal(0, 0.3, (HEIGHT, WIDTH))
    probabilities = np.exp(scores)
    return image.astype(np.uint8), (probabilities / probabilities.sum(axis=0)).astype(np.float32)


def cpu_seconds(image: np.ndarray, probabilities: np.ndarray) -> float:
    start = time.process_time()
    dense_crf(image, probabilities)
    return time.process_time() - start


if __name__ == "__main__":
    main()
