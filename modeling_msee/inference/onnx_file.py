"""Exported ONNX files: what they carry beside the graph, and running them."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..image_processing_msee import MSEEImageProcessor
from .network import NetworkScores, Segmenter


METADATA_KEY = "msee"  # of the graph's metadata: JSON with class_names and processor


def _onnxruntime() -> ModuleType:
    """The onnxruntime module, imported when first needed: it is an optional dependency."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('running an ONNX file needs onnxruntime: pip install "msee[onnx]"') from error
    return onnxruntime


def description(class_names: tuple[str, ...], processor: MSEEImageProcessor) -> str:
    """The JSON that an exported file carries: everything that prediction needs beside the graph."""
    return json.dumps({"class_names": class_names, "processor": processor.to_dict()})


def onnx_segmenter(path: str | Path) -> Segmenter:
    """The segmenter of a file that `msee export` wrote, run by onnxruntime on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file, or `msee export` did not write it.
        ImportError: onnxruntime is missing.
    """
    onnxruntime = _onnxruntime()
    state = onnxruntime.capi.onnxruntime_pybind11_state  # where its exceptions are
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an ONNX file that `msee export` wrote; there is no such file.")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except (state.Fail, state.InvalidGraph, state.InvalidProtobuf) as error:
        raise ValueError(f"{path}: expected an ONNX file, onnxruntime cannot load it: {error}") from error
    stored = session.get_modelmeta().custom_metadata_map
    if METADATA_KEY not in stored:
        raise ValueError(
            f"{path}: expected class names and processor settings in the metadata {METADATA_KEY!r}, found "
            f"{', '.join(stored) or 'none'}. Write the file with `msee export`."
        )
    settings: dict[str, Any] = json.loads(stored[METADATA_KEY])

    def scores(pixel_values: Tensor) -> NetworkScores:
        logits, class_logits = session.run(None, {"pixel_values": pixel_values.numpy()})
        return NetworkScores(torch.from_numpy(logits), torch.from_numpy(class_logits))

    return Segmenter(tuple(settings["class_names"]), MSEEImageProcessor.from_dict(settings["processor"]), scores)
