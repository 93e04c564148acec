"""The demo in a browser, as a visitor uses it.

`pip install '.[demo,test]' selenium`, Chromium and its driver; `pytest -m demo`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tadsr import TADSRPipeline

pytestmark = pytest.mark.demo
PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "lighthouse.jpg"
SECONDS = 120
CHROMIUM = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1400,1100"
)


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tadsr", "demo", "--port", str(port), "--max-upload", "1MB"]
    server = subprocess.Popen(command)
    place = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            assert server.poll() is None, "the demo did not start"
            try:
                urllib.request.urlopen(place, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield place
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser(address, tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (*CHROMIUM.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    downloads = str(tmp_path / "downloads")
    options.add_experimental_option("prefs", {"download.default_directory": downloads})
    driver = webdriver.Chrome(options=options)
    try:
        driver.get(address)
        yield Page(driver, tmp_path / "downloads")
    finally:
        driver.quit()


class Page:
    """What a visitor does."""

    def __init__(self, driver, downloads):
        self.driver = driver
        self.downloads = downloads
        self.wait(lambda: self.all("#run"))

    def all(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, found):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]
        wait = WebDriverWait(self.driver, SECONDS, ignored_exceptions=ignored)
        return wait.until(lambda _: found())

    def upload(self, path):
        (field,) = self.all("#photo input[type=file]")
        field.send_keys(str(path))
        self.wait(lambda: self.all("#photo img"))

    def set_timestep(self, timestep):
        from selenium.webdriver.common.keys import Keys

        (field,) = self.all("#timestep input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(timestep), Keys.TAB)
        (slider,) = self.all("#timestep input[type=range]")
        assert slider.get_attribute("value") == str(timestep)

    def run(self):
        """Press the button and wait for another result."""
        before = self.result()
        self.all("#run")[0].click()
        self.wait(lambda: self.result() not in (before, None))

    def result(self):
        sources = [image.get_attribute("src") for image in self.all("#pair img")]
        return sources[-1] if sources else None

    def download(self):
        known = set(self.downloads.glob("*.png"))
        self.all("#download")[0].click()
        self.wait(lambda: set(self.downloads.glob("*.png")) - known)
        (path,) = set(self.downloads.glob("*.png")) - known
        with Image.open(path) as image:
            return np.asarray(image)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    with Image.open(PHOTO) as image:
        image.crop((120, 60, 180, 100)).save(path)
    return path


def test_upload_run_move_the_slider_and_download(browser, photo):
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    browser.upload(photo)
    results = []
    for timestep in (1, 900):
        browser.set_timestep(timestep)
        browser.run()
        results.append(browser.download())
        with Image.open(photo) as image:
            assert np.array_equal(results[-1], pipe(image, timestep)), timestep
    assert not np.array_equal(*results)
    assert "60×40 to 240×160 px" in browser.all("#summary")[0].text


def test_what_is_painted_has_another_timestep(browser, photo):
    from selenium.webdriver import ActionChains

    browser.upload(photo)
    browser.set_timestep(900)
    browser.run()
    plain = browser.download().astype(int)
    (opener,) = [b for b in browser.all("button") if "Paint timesteps" in b.text]
    opener.click()
    canvas = browser.wait(lambda: browser.all("#painting canvas"))[0]
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(2)  # the page moves smoothly
    width = canvas.size["width"]
    stroke = ActionChains(browser.driver).move_to_element_with_offset(canvas, -width // 4, -30)
    stroke.click_and_hold()
    for _ in range(6):
        stroke.move_by_offset(0, 10)
    stroke.release().perform()
    time.sleep(1)
    browser.run()
    change = abs(browser.download().astype(int) - plain).mean(axis=(0, 2))
    # The stroke is in the left half; colours are kept over the whole, which changes all a little.
    assert change[:120].mean() > 2 * change[120:].mean()


def test_errors_are_sentences(browser, tmp_path):
    browser.all("#run")[0].click()
    toast = browser.wait(lambda: [t for t in browser.all(".toast-body") if "upload" in t.text])
    assert "upload one" in toast[0].text
    assert "Traceback" not in browser.driver.page_source


def test_a_sweep_is_shown(browser, photo):
    browser.upload(photo)
    (tab,) = [b for b in browser.all("button[role=tab]") if b.text == "Sweep"]
    tab.click()
    (button,) = browser.wait(lambda: browser.all("#sweep"))
    browser.wait(button.is_displayed)
    button.click()
    assert browser.wait(lambda: browser.all("img[src*='image.webp'], [data-testid=image] img"))
