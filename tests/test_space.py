"""The Space, started on this machine against the stand-in Hub, and used in a browser as a visitor does.

Needs `pip install gradio selenium` and Chromium with its driver (Debian: chromium, chromium-driver).
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image, ImageDraw
from stand_in_hub import StandInHub

from modeling_msee import MSEEConfig
from modeling_msee.hub.push import SPACE_FILES, push_checkpoint, push_space


pytest_plugins = ["training_fixtures"]

pytest.importorskip("gradio", reason="needs gradio")
selenium = pytest.importorskip("selenium", reason="needs selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver"),
]
SECONDS = 240


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint; `MSEE_SPACE_CHECKPOINT` names another one, whose pictures are worth looking at."""
    given = os.environ.get("MSEE_SPACE_CHECKPOINT")
    return Path(shutil.copytree(given or trained, tmp_path / "boats"))


@pytest.fixture
def address(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Space as the Hub would run it: its own files, the model by name, no package."""
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
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1000"):
        options.add_argument(word)
    options.add_argument("--proxy-server=http://127.0.0.1:9")
    options.add_argument("--proxy-bypass-list=127.0.0.1")
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A red triangle on green; `MSEE_SPACE_IMAGE` names another picture."""
    path = tmp_path / "photo.png"
    if "MSEE_SPACE_IMAGE" in os.environ:
        Image.open(os.environ["MSEE_SPACE_IMAGE"]).save(path)
        return path
    image = Image.new("RGB", (120, 90), (60, 140, 70))
    ImageDraw.Draw(image).polygon([(30, 75), (60, 15), (90, 75)], fill=(200, 40, 40))
    image.save(path)
    return path


def test_visitor_uploads_an_image(
    checkpoint: Path, address: str, browser: webdriver.Chrome, photo: Path, tmp_path: Path
) -> None:
    browser.get(address)
    wait = WebDriverWait(browser, SECONDS)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    heading = browser.find_element(By.TAG_NAME, "h1").text
    assert heading == "alice/boats"
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(photo))
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".image-container img, .image-frame img"))
    next(button for button in browser.find_elements(By.TAG_NAME, "button") if button.text == "Segment").click()

    # The two overlays: the image, and on it one picture per class, each with its name in the legend.
    wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, ".base-image")) == 2)
    loaded = "return [...document.querySelectorAll('.base-image, .mask')].every(i => i.complete && i.naturalWidth)"
    wait.until(lambda page: page.execute_script(loaded))
    target = Path(os.environ.get("MSEE_SPACE_SCREENSHOT", tmp_path / "screenshot.png"))
    browser.save_screenshot(str(target))
    names = set(MSEEConfig.from_pretrained(checkpoint).label_names[1:])
    legend = {item.text for item in browser.find_elements(By.CSS_SELECTOR, ".legend-item")}
    assert legend and legend <= names
    page = browser.find_element(By.TAG_NAME, "body").text
    assert len([name for name in names if re.search(rf"^{name}$", page, flags=re.MULTILINE)]) >= 5  # with their scores
    with Image.open(target) as picture:
        assert len(set(picture.convert("RGB").tobytes()[::3])) > 20
