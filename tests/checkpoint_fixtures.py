"""A tiny checkpoint with random weights for the classes of the generated shapes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datasets_scripts.shapes import CLASS_NAMES
from modeling_msee import MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee.configuration_msee import label_fields


@pytest.fixture(scope="session")
def shapes_model(
    tiny_model: Callable[..., MSEEForWeaklySupervisedSegmentation],
) -> MSEEForWeaklySupervisedSegmentation:
    return tiny_model("dinov2", **label_fields(["background", *CLASS_NAMES])).eval()


@pytest.fixture(scope="session")
def checkpoint(shapes_model: MSEEForWeaklySupervisedSegmentation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    shapes_model.save_pretrained(folder)
    MSEEImageProcessor(patch_size=8).save_pretrained(folder)
    return folder
