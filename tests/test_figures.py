"""Colours, overlays and figure rows."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("matplotlib")
from modeling_msee.inference.figures import (
    Panel,
    figure_rows,
    heat_overlay,
    region_panel,
)
from modeling_msee.inference.masks import voc_palette


REPOSITORY = Path(__file__).resolve().parents[1]


def grey_image(height=6, width=8, value=100):
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_heat_overlay_goes_from_blue_to_red():
    result = heat_overlay(grey_image(1, 3), np.array([[0.0, 0.25, 1.0]])).astype(int)
    assert result.shape == (1, 3, 3)
    assert result[0, 1, 2] > result[0, 1, 0]
    assert result[0, 2, 0] > result[0, 2, 2]
    for bad in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"map in \[0, 1\]"):
            heat_overlay(grey_image(1, 1), np.array([[bad]]))


def test_region_panel_darkens_the_outside():
    image = np.array([[[200, 100, 0], [200, 100, 0]]], dtype=np.uint8)
    result = region_panel(image, np.array([[True, False]]), (0, 200, 200))
    assert result.tolist() == [[[100, 150, 100], [45, 45, 45]]]
    with pytest.raises(ValueError, match="bool mask, got int64"):
        region_panel(image, np.array([[1, 0]]), (0, 200, 200))


def test_figure_rows_writes_the_panels_and_the_legend(tmp_path):
    red, green = grey_image(40, 80), grey_image(90, 30)
    red[:] = (250, 10, 20)
    green[:] = (10, 240, 30)
    rows = [[Panel("Image", red), Panel("Ground truth", green)]] * 2
    figure_rows(rows, {1: "circle", 3: "a mast"}, tmp_path / "figure.png", "Two examples")
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))

    def box(colour):
        y, x = np.nonzero((picture == colour).all(axis=2))
        return y, x

    y, x = box((250, 10, 20))
    assert np.ptp(x) + 1 == pytest.approx(255, abs=1)
    assert len(y) == pytest.approx(2 * 255 * 128, rel=0.02)  # 80×40 fills the width, aspect 2:1, twice
    y_green, x_green = box((10, 240, 30))
    assert len(y_green) == pytest.approx(2 * 255 * 85, rel=0.02)
    assert x_green.min() > x.max()
    for value, expected in ((1, True), (3, True), (2, False)):
        assert (len(box(tuple(voc_palette()[value]))[0]) > 100) == expected


def test_figure_rows_rejects_rows_that_differ(tmp_path):
    panel = Panel("Image", grey_image())
    with pytest.raises(ValueError, match=r"titles \['Image'\], row 1 has \['CAM'\]"):
        figure_rows([[panel], [Panel("CAM", grey_image())]], {}, tmp_path / "x.png", "t")
    with pytest.raises(ValueError, match="at least one row"):
        figure_rows([], {}, tmp_path / "x.png", "t")
    with pytest.raises(ValueError, match="0 to 255"):
        figure_rows([[panel]], {256: "x"}, tmp_path / "x.png", "t")
    with pytest.raises(ValueError, match="uint8"):
        Panel("Image", grey_image().astype(float))
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_never_imported():
    code = "import modeling_msee.inference.figures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0
