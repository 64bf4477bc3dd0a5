"""Dense-CRF post-processing with pydensecrf, one image at a time or in worker processes."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from queue import SimpleQueue
from types import ModuleType, TracebackType

import numpy as np


_SMALLEST_PROBABILITY = 1e-5


@dataclass(frozen=True)
class CRFParameters:
    """Settings of the mean-field inference; defaults as in ToCo's public evaluation of VOC and COCO.

    `gaussian_*` is the smoothness term over positions (pixels), `bilateral_*` the term over positions and
    colours (0–255); the weights are Potts compatibilities. DeepLab-v2 (ResNet-101) uses 3, 1, 4, 67, 3.
    """

    iterations: int = 10
    gaussian_weight: float = 1
    gaussian_xy: float = 1
    bilateral_weight: float = 4
    bilateral_xy: float = 121
    bilateral_rgb: float = 5


TOCO_CRF = CRFParameters()


def _pydensecrf() -> ModuleType:
    """The pydensecrf module, imported when first needed: it is an optional, compiled dependency."""
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise ImportError('the dense CRF needs pydensecrf: pip install "msee[crf]"') from error
    return pydensecrf.densecrf


def _check(image: np.ndarray, probabilities: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"expected probabilities (C, H, W) of image size {image.shape[:2]}, got {probabilities.shape}"
        )
    # min and max carry a nan through, and a comparison with nan is False
    if not (probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-4):
        raise ValueError(
            f"probabilities must lie in [0, 1], got [{probabilities.min()}, {probabilities.max()}]; apply softmax"
        )


def _taking_part(probabilities: np.ndarray) -> np.ndarray:
    """Ascending channels of the background and of every class that is the arg-max somewhere."""
    return np.union1d([0], probabilities.argmax(axis=0))


def _infer(image: np.ndarray, probabilities: np.ndarray, parameters: CRFParameters) -> np.ndarray:
    """Mean-field marginals float32 (C, H, W) over exactly the given channels."""
    densecrf = _pydensecrf()
    classes, height, width = probabilities.shape
    if classes == 1:
        return np.ones((1, height, width), dtype=np.float32)
    unary = -np.log(np.clip(probabilities, _SMALLEST_PROBABILITY, 1))
    field = densecrf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1), dtype=np.float32))
    field.addPairwiseGaussian(sxy=parameters.gaussian_xy, compat=parameters.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=parameters.bilateral_xy,
        srgb=parameters.bilateral_rgb,
        rgbim=np.require(image, np.uint8, ["C_CONTIGUOUS", "WRITEABLE"]),  # pydensecrf takes no other
        compat=parameters.bilateral_weight,
    )
    return np.asarray(field.inference(parameters.iterations), dtype=np.float32).reshape(probabilities.shape)


def dense_crf(image: np.ndarray, probabilities: np.ndarray, parameters: CRFParameters = TOCO_CRF) -> np.ndarray:
    """Refine class probabilities along the edges of the image (Krähenbühl & Koltun, NIPS 2011).

    `image` is uint8 (H, W, 3), `probabilities` float (C, H, W) in [0, 1], channel 0 background. Returns
    float32 (C, H, W) that sums to 1 over the classes. Only the background and the classes that win somewhere
    in the arg-max take part, which is several times faster; the others get 0. Raises ValueError for another
    shape, dtype or range, ImportError when pydensecrf is missing.
    """
    image, probabilities = np.asarray(image), np.asarray(probabilities)
    _check(image, probabilities)
    channels = _taking_part(probabilities)
    refined = np.zeros(probabilities.shape, dtype=np.float32)
    refined[channels] = _infer(image, probabilities[channels], parameters)
    return refined


def _serve() -> None:
    """A worker: answer requests on standard input by ("labels", array) or ("error", traceback) to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not garble the answers
    while True:
        try:
            image, probabilities, channels, parameters = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            winner = _infer(image, probabilities, CRFParameters(*parameters)).argmax(axis=0)
            answer = ("labels", channels[winner].astype(np.uint8))
        except Exception:
            answer = ("error", traceback.format_exc())
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _start_worker() -> "subprocess.Popen[bytes]":
    """Run this file in a fresh interpreter with the import path of this one.

    Not `multiprocessing`: its spawned children import the main script and this package, hence torch, which
    costs seconds and most of a gigabyte each and none of which the CRF needs.
    """
    code = f"import runpy, sys; sys.path[:] = {sys.path!r}; runpy.run_path({__file__!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the processes are the parallelism
    )


class CRFPool:
    """Dense CRF in worker processes (pydensecrf holds the GIL), with a bounded number of images in flight.

    Use as a context manager: leaving it waits for what was submitted, or drops what has not begun when
    leaving with an exception, and ends the workers.
    """

    def __init__(self, workers: int, parameters: CRFParameters = TOCO_CRF):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        _pydensecrf()  # fail here, not in the workers
        self.parameters = parameters
        self.limit = 2 * workers
        self._free = threading.BoundedSemaphore(self.limit)
        self._workers = [_start_worker() for _ in range(workers)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers)  # each thread waits for one worker

    def __enter__(self) -> "CRFPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        for worker in self._workers:
            worker.communicate()  # closes its input, which ends it

    def _run(self, image: np.ndarray, probabilities: np.ndarray, channels: np.ndarray) -> np.ndarray:
        worker = self._idle.get()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            request = (image, probabilities, channels, astuple(self.parameters))
            pickle.dump(request, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
            kind, answer = pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(
                f"a CRF worker process ended with exit code {worker.wait()}; if memory is short, use fewer"
            ) from error
        finally:
            self._idle.put(worker)
        if kind == "error":
            raise RuntimeError(f"the dense CRF failed in a worker process:\n{answer}")
        return answer

    def submit(self, image: np.ndarray, probabilities: np.ndarray) -> "Future[np.ndarray]":
        """Start one image; the future gives labels uint8 (H, W), the arg-max of `dense_crf`.

        Blocks while 2 × workers images are unfinished. Only the channels that take part travel to the worker.
        Raises ValueError as `dense_crf` does, and for more than 255 classes.
        """
        image, probabilities = np.asarray(image), np.asarray(probabilities)
        _check(image, probabilities)
        if len(probabilities) > 255:
            raise ValueError(f"labels are uint8 and 255 means ignored: expected C <= 255, got {len(probabilities)}")
        channels = _taking_part(probabilities)
        self._free.acquire()
        try:
            future = self._threads.submit(self._run, image, probabilities[channels], channels)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return future

    def map(self, items: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        """Labels uint8 (H, W) of (image, probabilities) pairs, in order, as they become ready.

        Takes at most 2 × workers items from `items` ahead of the result it is to yield next.
        """
        pending: deque[Future[np.ndarray]] = deque()
        for image, probabilities in items:
            pending.append(self.submit(image, probabilities))
            if len(pending) == self.limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


if __name__ == "__main__":  # in a worker process
    _serve()
