"""The Space, started on this machine against the stand-in Hub, and used in a browser as a visitor does.

Needs an environment with Gradio and Selenium, and Chromium with its driver: docs/hub.md, section A Space, makes it.
"""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageDraw
from stand_in_hub import StandInHub

from modeling_msee.hub.push import SPACE_FILES, push_checkpoint, push_space
from modeling_msee.inference.network import load_model
from modeling_msee.inference.predict import load_segmenter
from modeling_msee.inference.segment import segment
from modeling_msee.inference.sources import collect_sources


pytest_plugins = ["training_fixtures"]

pytest.importorskip("gradio", reason="needs the space extra (gradio), in an environment of its own: docs/hub.md")
pytest.importorskip("selenium", reason="needs selenium: docs/hub.md")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver: docs/hub.md"),
]
SECONDS = 240
WORDS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,1000"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=127.0.0.1"),
)
LOADED = """
    const images = [...document.querySelectorAll('.base-image, .mask')];
    return images.every(image => image.complete && image.naturalWidth);
"""
# A picture of the page as PNG, in its own size.
PIXELS = """
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [arguments[0].naturalWidth, arguments[0].naturalHeight];
    canvas.getContext('2d').drawImage(arguments[0], 0, 0);
    return canvas.toDataURL('image/png').split(',')[1];
"""


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint; `MSEE_SPACE_CHECKPOINT` names another one, whose pictures are worth looking at."""
    given = os.environ.get("MSEE_SPACE_CHECKPOINT")
    return Path(shutil.copytree(given or trained, tmp_path / "boats"))


@pytest.fixture
def address(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Space as the Hub would run it: its own files, the model by name and with the code of its repository."""
    with StandInHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        push_checkpoint(checkpoint, "alice/boats", token=hub.write_token)
        push_space("alice/boats", token=hub.write_token)
        folder = tmp_path / "space"
        folder.mkdir()
        for name in SPACE_FILES:
            (folder / name).write_bytes(hub.files("space", "alice/boats")[name])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, **hub.environment(hub.read_token, tmp_path / "home")}
        environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "0"}
        environment.pop("PYTHONPATH", None)
        with (tmp_path / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                _wait_for(port, process, tmp_path / "log.txt")
                assert any(path.endswith("/modeling_msee.py") for _, path in hub.requests)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.kill()
                process.wait()


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """Headless Chromium that reaches nothing but this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in WORDS:
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A red triangle on green; `MSEE_SPACE_IMAGE` names another picture."""
    path = tmp_path / "photo.png"
    if "MSEE_SPACE_IMAGE" in os.environ:
        given = Image.open(os.environ["MSEE_SPACE_IMAGE"]).convert("RGB")
        given.thumbnail((640, 640))  # the app takes no larger one, and the expected masks are of the same size
        given.save(path)
        return path
    image = Image.new("RGB", (120, 90), (60, 140, 70))
    ImageDraw.Draw(image).polygon([(30, 75), (60, 15), (90, 75)], fill=(200, 40, 40))
    image.save(path)
    return path


def overlays(page: webdriver.Chrome, label: str) -> dict[str, np.ndarray]:
    """Opacity in [0, 1] (H, W) of each class's picture over the image, by its name in the legend."""
    [box] = [box for box in page.find_elements(By.CSS_SELECTOR, ".block") if is_overlay(box, label)]
    base = box.find_element(By.CSS_SELECTOR, ".base-image")
    found = {}
    legend = box.find_elements(By.CSS_SELECTOR, ".legend-item")
    for item, mask in zip(legend, box.find_elements(By.CSS_SELECTOR, ".mask"), strict=True):
        assert mask.rect == base.rect, "a class lies beside the image, not on it"
        png = base64.b64decode(page.execute_script(PIXELS, mask))
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)
        strongest = picture.reshape(-1, 4)[picture[..., 3].argmax()]
        colour = [int(value) for value in re.findall(r"\d+", item.value_of_css_property("background-color"))[:3]]
        np.testing.assert_allclose(strongest[:3], colour, atol=2, err_msg=item.text)  # the canvas rounds
        found[item.text] = picture[..., 3] / 255
    return found


def is_overlay(box: WebElement, label: str) -> bool:
    return bool(box.find_elements(By.CSS_SELECTOR, ".base-image")) and box.text.startswith(label)


def expected_maps(checkpoint: Path, pixel_values: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Eq. 1, written out: (K - 1, H, W) in [0, 1]."""
    model, _ = load_model(str(checkpoint))
    with torch.inference_mode():
        features = model.encode(pixel_values[None]).features[0]
        maps = torch.einsum("cd,dhw->chw", model.classifier.weight.flatten(1), features).clamp(min=0)
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # no positive value: a zero map
        return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear")[0].numpy()


def test_visitor_uploads_an_image(
    checkpoint: Path, address: str, browser: webdriver.Chrome, photo: Path, tmp_path: Path
) -> None:
    browser.get(address)
    wait = WebDriverWait(browser, SECONDS)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    assert browser.find_element(By.TAG_NAME, "h1").text == "alice/boats"
    button = next(button for button in browser.find_elements(By.TAG_NAME, "button") if button.text == "Segment")
    button.click()
    wait.until(lambda page: "Upload an image first." in page.find_element(By.TAG_NAME, "body").text)
    browser.find_element(By.CSS_SELECTOR, ".toast-close").click()

    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(photo))
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".image-container img, .image-frame img"))
    button.click()
    wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, ".base-image")) == 2)
    wait.until(lambda page: page.execute_script(LOADED))
    target = Path(os.environ.get("MSEE_SPACE_SCREENSHOT", tmp_path / "screenshot.png"))
    assert browser.save_screenshot(str(target))

    # What `msee predict` finds in the same file is what the page shows, under the same names.
    segmenter = load_segmenter(checkpoint)
    [expected] = segment(segmenter, collect_sources([photo]), 1)
    names = segmenter.class_names
    shown = overlays(browser, "Segmentation")
    assert shown.keys() == {names[value] for value in np.unique(expected.segmentation) if value > 0}
    for name, opacity in shown.items():
        # Two processes may round a tie differently: one pixel in a thousand.
        assert np.mean((opacity > 0) == (expected.segmentation == names.index(name))) > 0.999, name

    likely = expected.probabilities >= min(0.5, expected.probabilities.max())
    maps = expected_maps(checkpoint, expected.pixel_values, expected.segmentation.shape)
    shown = overlays(browser, "Class activation maps")
    assert shown.keys() == {names[index + 1] for index in likely.nonzero()[0]}
    for name, opacity in shown.items():
        np.testing.assert_allclose(opacity, maps[names.index(name) - 1], atol=2 / 255, err_msg=name)

    page = browser.find_element(By.TAG_NAME, "body").text
    for index in np.argsort(-expected.probabilities)[:5]:
        found = re.search(rf"^{re.escape(names[index + 1])}\s+(\d+)%$", page, flags=re.MULTILINE)
        assert found and abs(int(found[1]) - 100 * expected.probabilities[index]) <= 0.51, page
