"""The inference path as an exported program or ONNX file for images of any size, checked against the model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..data.files import whole_file
from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .network import InferencePath
from .onnx_file import METADATA_KEY, description, onnx_segmenter


TOLERANCE = 1e-4  # largest absolute difference of a score from the model's
TRACED_GRID = (5, 7)  # patches; any will do, as long as it is not square
LARGEST_GRID = 1024  # patches a side


Run = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of the exported scores from the model's, for a batch (B, 3, H, W)."""

    shape: tuple[int, ...]
    value: float


def export(
    model: MSEEForWeaklySupervisedSegmentation, processor: MSEEImageProcessor, output: Path
) -> list[Difference]:
    """Write the inference path: `pixel_values` (B, 3, H, W) -> `logits` (B, K, h, w), `class_logits` (B, K - 1).

    B, H and W are dynamic; H and W are whole patches, at least two. The file carries class names and processor
    settings (metadata `msee`), so that `msee predict` needs nothing else. It appears once it has been checked against
    the model at several sizes.

    Args:
        output: `.onnx` for ONNX, `.pt2` for `torch.export.load`.

    Returns:
        the differences found by the check.

    Raises:
        ValueError: another suffix, or a difference above 1e-4.
        ImportError: packages of the extra `onnx` are missing.
    """
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{output}: expected a file name that ends in .onnx or .pt2, got {output.suffix!r}.")
    path = InferencePath(copy.deepcopy(model).cpu().float().eval())
    settings = description(tuple(model.config.label_names), processor)
    with whole_file(output) as partial:
        run = _save_onnx(path, settings, partial) if output.suffix == ".onnx" else _save_pt2(path, settings, partial)
        differences = [_difference(run, path, pixel_values) for pixel_values in _check_inputs(path.model)]
        for difference in differences:
            if not difference.value <= TOLERANCE:
                raise ValueError(
                    f"{output} was not written: for pixel_values {difference.shape} the exported scores differ from "
                    f"the model's by {difference.value:.2g}, at most {TOLERANCE:.0e} is expected. Try another "
                    "release of torch or onnxruntime."
                )
    return differences


def exported_program(path: InferencePath) -> ExportedProgram:
    """The program of the inference path for any batch and any size in whole patches; changes nothing in `path`."""
    path = copy.deepcopy(path)
    _interpolate_always(path.model)
    patch_size = path.model.config.patch_size
    pixel_values = torch.zeros(2, 3, *(side * patch_size for side in TRACED_GRID))
    rows, columns = (Dim(name, min=2, max=LARGEST_GRID) for name in ("rows", "columns"))
    sizes = {0: Dim.DYNAMIC, 2: patch_size * rows, 3: patch_size * columns}
    with torch.no_grad():
        return torch.export.export(path, (pixel_values,), dynamic_shapes={"pixel_values": sizes})


def _interpolate_always(model: MSEEForWeaklySupervisedSegmentation) -> None:
    """Make the position embedding of an encoder, where it has one, follow the size of every image.

    The library returns the embedding as it is for images of the size of pre-training. That test would be traced: the
    program would refuse this one size. Interpolating there as well changes nothing, because it gives the embedding
    itself.
    """
    encoder = model.config.encoder_config
    if encoder.model_type == "dinov3_vit":  # rotary: computed from the size of the image
        return
    side = encoder.image_size // encoder.patch_size
    # As the library does for each encoder.
    antialias = encoder.model_type == "dinov2_with_registers"
    embeddings = model.backbone.embeddings

    def interpolate(tokens: Tensor, height: int, width: int) -> Tensor:  # (B, n, D) -> (1, prefix + hw, D)
        prefix, grid = embeddings.position_embeddings.tensor_split([-side * side], dim=1)
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        size = (height // encoder.patch_size, width // encoder.patch_size)
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=antialias)
        return torch.cat((prefix, grid.flatten(2).transpose(1, 2)), dim=1)

    embeddings.interpolate_pos_encoding = interpolate


def _save_onnx(path: InferencePath, settings: str, output: Path) -> Run:
    """Write an ONNX file and load it."""
    try:
        import onnxscript  # noqa: F401  what torch.onnx translates with
    except ImportError as error:
        raise ImportError('ONNX export needs onnx and onnxscript: pip install "msee[onnx]"') from error
    program = torch.onnx.export(
        exported_program(path),
        input_names=["pixel_values"],
        output_names=["logits", "class_logits"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo=True and no file name
    program.model.metadata_props[METADATA_KEY] = settings
    program.save(output, external_data=False)
    segmenter = onnx_segmenter(output)

    def run(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        scores = segmenter.scores(pixel_values)
        return scores.logits, scores.class_logits

    return run


def _save_pt2(path: InferencePath, settings: str, output: Path) -> Run:
    """Write a program for `torch.export.load` and load it."""
    torch.export.save(exported_program(path), output, extra_files={METADATA_KEY: settings})
    return torch.export.load(output).module()


def _check_inputs(model: MSEEForWeaklySupervisedSegmentation) -> Iterator[Tensor]:
    """Noise of other sizes than the traced one: smaller, larger, of pre-training, several images at once."""
    encoder = model.config.encoder_config
    side = encoder.image_size // encoder.patch_size
    generator = torch.Generator().manual_seed(0)
    for batch, rows, columns in ((1, 2, 3), (1, side, side), (3, 9, 4), (1, 12, 17)):
        size = (rows * encoder.patch_size, columns * encoder.patch_size)
        yield torch.randn(batch, 3, *size, generator=generator)


@torch.no_grad()
def _difference(run: Run, path: InferencePath, pixel_values: Tensor) -> Difference:
    pairs = zip(run(pixel_values), path(pixel_values), strict=True)
    return Difference(tuple(pixel_values.shape), max(float((got - expected).abs().max()) for got, expected in pairs))
