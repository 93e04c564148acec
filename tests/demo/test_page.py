"""The demo in a browser, as a visitor uses it.

`pip install '.[demo,test]' selenium`, Chromium and its driver; `pytest -m demo`.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.images import ArrayImage, read_image, write_image

pytestmark = pytest.mark.demo
PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "lighthouse.jpg"
SECONDS = int(os.environ.get("DEMO_SECONDS", 120))
CHROMIUM = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1400,1100"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tadsr", "demo", "--port", str(port), "--max-upload", "1MB"]
    # Where a user is, whose package lies elsewhere.
    server = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("elsewhere"))
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


@contextmanager
def visiting(address, folder):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (*CHROMIUM.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    downloads = folder / "downloads"
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    # Named, as selenium asks the network for one otherwise.
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.get(address)
        yield Page(driver, downloads)
    finally:
        driver.quit()


@pytest.fixture
def browser(address, tmp_path):
    with visiting(address, tmp_path) as page:
        yield page


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

    def choose(self, path):
        (field,) = self.all("#photo input[type=file]")
        field.send_keys(str(path))

    def upload(self, path):
        self.choose(path)
        self.wait(lambda: self.all("#photo img"))

    def told(self, words):
        """Wait for a message with these words and return it."""
        return self.wait(
            lambda: next((t.text for t in self.all(".toast-body") if words in t.text), None)
        )

    def asked(self):
        """Return the hosts that the page has asked so far."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {
            urlsplit(e["request"]["url"]).hostname for e in sent if e["documentURL"][:4] == "http"
        }

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

    def resize(self, width, height):
        screen = {"width": width, "height": height, "mobile": width < 700, "deviceScaleFactor": 1}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def is_in_sight(self, selector):
        """Tell whether the window comes to show the first 40 px of an element."""
        script = "const top = arguments[0].getBoundingClientRect().top;"
        script += "return 0 <= top && top + 40 <= window.innerHeight"
        (element,) = self.all(selector)
        return self.wait(lambda: self.driver.execute_script(script, element))

    def result(self):
        sources = [image.get_attribute("src") for image in self.all("#pair img")]
        return sources[-1] if sources else None

    def show(self, element):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        time.sleep(2)  # the page moves smoothly

    def paint(self):
        """Paint a stroke into the left half."""
        from selenium.webdriver import ActionChains

        (opener,) = [b for b in self.all("button") if "Paint timesteps" in b.text]
        self.show(opener)
        opener.click()
        canvas = self.wait(lambda: self.all("#painting canvas"))[0]
        self.show(canvas)
        width = canvas.size["width"]
        stroke = ActionChains(self.driver).move_to_element_with_offset(canvas, -width // 4, -30)
        stroke.click_and_hold()
        for _ in range(6):
            stroke.move_by_offset(0, 10)
        stroke.release().perform()
        time.sleep(1)

    def save(self, name, selector):
        """Save a picture of a part of the page, or of what the window shows of it."""
        if selector == "body":
            self.driver.execute_script("window.scrollTo(0, 0)")
        time.sleep(1)
        is_whole = selector in ("body", "window")
        part = self.driver if is_whole else self.all(selector)[0]
        png = part.get_screenshot_as_png() if is_whole else part.screenshot_as_png
        folder = Path(os.environ.get("DEMO_PICTURES", self.downloads.parent))
        with Image.open(io.BytesIO(png)) as image:
            image = image.convert("RGB")
            image.thumbnail((1000, 1000))
            image.save(folder / name, quality=88)

    def download(self):
        known = set(self.downloads.glob("*.png"))
        self.all("#download")[0].click()
        self.wait(lambda: set(self.downloads.glob("*.png")) - known)
        (path,) = set(self.downloads.glob("*.png")) - known
        image = read_image(path)
        return image.pixels if isinstance(image, ArrayImage) else np.asarray(image)


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
    browser.upload(photo)
    browser.set_timestep(900)
    browser.run()
    plain = browser.download().astype(int)
    browser.paint()
    browser.run()
    change = abs(browser.download().astype(int) - plain).mean(axis=(0, 2))
    # The stroke is in the left half.
    assert change[:120].max() > 0
    assert change[160:].max() == 0


def test_a_whole_photo_is_painted_on_and_restored_in_a_minute(browser):
    browser.all("#example")[0].click()
    browser.wait(lambda: browser.all("#photo img"))
    browser.paint()
    begin = time.monotonic()
    browser.run()
    seconds = time.monotonic() - begin
    # A page that is busy with each message of progress takes ten times the library's time.
    pipe, begin = TADSRPipeline.from_pretrained("tadsr-tiny"), time.monotonic()
    with Image.open(PHOTO) as image:
        for timestep in (1, 500):
            pipe(image, timestep)
    assert seconds < max(60, 3 * (time.monotonic() - begin))
    assert "384×256 to 1536×1024 px" in browser.all("#summary")[0].text


@pytest.mark.parametrize("shown", ["", "s left"])
def test_what_takes_too_long_is_stopped_whether_it_has_begun_or_not(browser, shown):
    browser.upload(PHOTO)
    browser.all("#run")[0].click()
    browser.wait(lambda: shown in browser.driver.page_source)
    browser.all("#stop")[0].click()
    assert browser.told("stopped")
    assert browser.result() is None


@pytest.mark.parametrize("screen", [(390, 844), (1366, 640)], ids=["phone", "laptop"])
def test_the_button_and_then_the_result_are_in_sight(browser, photo, screen):
    browser.resize(*screen)
    browser.upload(photo)
    browser.run()
    assert browser.is_in_sight("#pair")
    browser.paint()
    browser.driver.execute_script("window.scrollTo(0, 0)")
    assert browser.is_in_sight("#run")
    browser.run()
    assert browser.is_in_sight("#pair")


def test_a_result_goes_with_its_photo(browser, photo):
    browser.upload(photo)
    browser.run()
    (button,) = browser.all("#photo button[aria-label='Remove Image']")
    button.click()
    browser.wait(lambda: browser.result() is None)
    browser.wait(lambda: not browser.all("#download")[0].is_enabled())


def test_the_pictures_of_the_documentation(browser):
    """Saves them where DEMO_PICTURES says, docs/images for those of the guide."""
    browser.resize(1400, 820)
    browser.upload(PHOTO)
    browser.run()
    browser.save("demo.jpg", "body")
    browser.paint()
    browser.save("demo_painting.jpg", "#painting")


def test_16_bits_are_kept_of_what_no_browser_shows(browser, tmp_path):
    pixels = np.linspace(0, 65535, 24 * 32 * 3).astype(np.uint16).reshape(24, 32, 3)
    write_image(ArrayImage(pixels), tmp_path / "scan.tif")
    browser.upload(tmp_path / "scan.tif")
    assert "tif" in browser.told("restored all the same")
    browser.set_timestep(300)
    browser.run()
    result = browser.download()
    assert result.dtype == np.uint16
    expected = TADSRPipeline.from_pretrained("tadsr-tiny")(read_image(tmp_path / "scan.tif"), 300)
    assert np.array_equal(result, expected.pixels)


def test_errors_are_sentences(browser, tmp_path):
    browser.all("#run")[0].click()
    assert browser.told("upload one")
    (tmp_path / "notes.png").write_text("no photo")
    browser.upload(tmp_path / "notes.png")
    assert browser.told("notes.png")
    assert "Traceback" not in browser.driver.page_source
    assert "preprocess" not in browser.driver.page_source


def test_a_file_above_max_upload_is_refused_in_a_sentence(browser, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    browser.choose(tmp_path / "large.png")
    assert "large.png" in browser.told("maximum allowed size")
    assert not browser.all("#photo img")


def test_nobody_else_is_asked_for_anything(browser, photo):
    browser.upload(photo)
    browser.run()
    assert browser.asked() - {None} == {"127.0.0.1"}


def test_visitors_wait_for_each_other_and_get_their_own(address, browser, photo, tmp_path):
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    (tmp_path / "other").mkdir()
    with visiting(address, tmp_path / "other") as other, Image.open(photo) as image:
        visitors = {1: browser, 900: other}
        for timestep, page in visitors.items():
            page.upload(photo)
            page.set_timestep(timestep)
        for page in visitors.values():
            page.all("#run")[0].click()
        for timestep, page in visitors.items():
            page.wait(page.result)
            assert np.array_equal(page.download(), pipe(image, timestep)), timestep


def test_a_sweep_is_shown(browser, photo):
    browser.upload(photo)
    (tab,) = [b for b in browser.all("button[role=tab]") if b.text == "Sweep"]
    tab.click()
    (button,) = browser.wait(lambda: browser.all("#sweep"))
    browser.wait(button.is_displayed)
    button.click()
    assert browser.wait(lambda: browser.all("#sheet img"))


def asked_over_http(address, photo):
    """Return what the server answers to a request of a program."""
    data = [photo, "tadsr-tiny", 500, 1, None, 1, "", "adain", "auto"]
    call = f"{address}/gradio_api/call/restore"
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"data": data}).encode()
    with urllib.request.urlopen(urllib.request.Request(call, body, headers)) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=SECONDS) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_no_other_file_of_the_server_can_be_named(address, photo, tmp_path, meta):
    answers = {
        asked_over_http(address, {"path": str(path)} | meta)
        for path in (photo, tmp_path / "absent.png", "/etc/passwd")
    }
    (answer,) = answers
    assert "event: error" in answer
    assert str(tmp_path) not in answer
