"""VOC colours, overlays and palette PNG files."""

import numpy as np
import pytest
from PIL import Image

from modeling_msee.inference.masks import colorize, overlay, save_palette_png, voc_palette


def test_voc_palette():
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0)}
    published |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    for value, colour in published.items():
        assert tuple(palette[value]) == colour
    assert len(np.unique(palette, axis=0)) == 256
    assert np.array_equal(voc_palette(21), palette[:21])
    with pytest.raises(ValueError, match="1 to 256"):
        voc_palette(257)


def test_colorize_and_its_errors():
    segmentation = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    assert colorize(segmentation, voc_palette()).tolist() == [
        [[0, 0, 0], [128, 0, 0]],
        [[0, 128, 0], [224, 224, 192]],
    ]
    with pytest.raises(ValueError, match="colours 0 to 20, the label map holds 0 to 255"):
        colorize(segmentation, voc_palette(21))
    with pytest.raises(ValueError, match="integer label map"):
        colorize(segmentation.astype(float), voc_palette())


def test_palette_png_keeps_the_values(tmp_path):
    segmentation = np.array([[0, 1, 20], [2, 255, 7]])
    save_palette_png(segmentation, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), segmentation)
        assert np.array_equal(np.asarray(picture.convert("RGB")), colorize(segmentation, voc_palette()))
    with pytest.raises(ValueError, match="holds 0 to 300"):
        save_palette_png(np.array([[0, 300]]), tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()


def test_overlay_tints_everything_but_background():
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    result = overlay(image, np.array([[0, 1, 255]]), alpha=0.5)
    assert result.tolist() == [[[100, 100, 100], [114, 50, 50], [162, 162, 146]]]
    assert (image == 100).all()
    with pytest.raises(ValueError, match=r"segmentation must have the image's size \(1, 3\), got \(3, 1\)"):
        overlay(image, np.zeros((3, 1), int))
