"""The HTTP service, over a socket."""

import base64
import http.client
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn
from PIL import Image
from typer.testing import CliRunner

from tadsr.cli import app
from tadsr.demo.actions import DemoLimits, Models
from tadsr.demo.service import LOOKING_SECONDS, Service

LIMITS = DemoLimits(max_upload_bytes=20_000, max_output_pixels=20_000)


@pytest.fixture(scope="module")
def released():
    """Say when the model "held" is loaded."""
    return threading.Event()


@pytest.fixture(scope="module")
def given_up():
    """Say when the model "slow" is loaded: when a client has lost patience."""
    return threading.Event()


@pytest.fixture(scope="module")
def address(pipe, released, given_up):
    pipe.metadata = {**pipe.metadata, "default_process_size": 0}
    waited_for = {"held": released, "slow": given_up}

    def load(name):
        assert name not in waited_for or waited_for[name].wait(100)
        return pipe

    models = Models(["tiny", *waited_for], load)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(Service(models, LIMITS, max_waiting=2).app(), log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def photo():
    file = io.BytesIO()
    Image.linear_gradient("L").resize((12, 8)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def post(url, photo, *, name="file", filename="photo.png", accept="*/*", patience_s=300, **values):
    """Send a form as curl does; return status and body."""
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'
        for k, v in values.items()
    ]
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
    body = "".join(parts).encode() + head.encode() + photo + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b", "Accept": accept}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, body, headers), timeout=patience_s
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def get(url):
    with urllib.request.urlopen(url, timeout=300) as answer:
        return answer.read().decode()


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def expected(pipe, photo):
    return np.asarray(pipe(Image.open(io.BytesIO(photo)), 300, scale=2))


def test_a_photo_comes_back_as_the_library_restores_it(address, photo, expected):
    status, png = post(f"{address}/api/upscale?timestep=300", photo, scale=2)
    assert status == 200
    assert np.array_equal(pixels(png), expected)


@pytest.mark.parametrize(
    ("method", "path", "kind", "status"),
    [
        ("POST", "/api/upscale?timestep=300&scale=2", "image/png", 200),
        ("POST", "/api/upscale?timestep=300&scale=2", "application/octet-stream", 200),
        ("POST", "/api/upscale", "application/x-www-form-urlencoded", 415),  # curl --data-binary
        ("PUT", "/api/upscale", "image/png", 405),
        ("POST", "/upscale", "image/png", 404),
    ],
)
def test_a_photo_may_be_the_body(address, photo, expected, method, path, kind, status):
    client = http.client.HTTPConnection(urlsplit(address).netloc, timeout=300)
    client.request(method, path, photo, {"Content-Type": kind})
    answer = client.getresponse()
    body = answer.read()
    assert answer.status == status
    if status == 200:
        assert np.array_equal(pixels(body), expected)
    else:
        message = json.loads(body)["error"]["message"]
        assert ("curl -F file=" if status == 415 else "GET / lists") in message


def test_openais_clients_are_answered(address, photo, expected):
    edit = partial(post, f"{address}/v1/images/edits", photo, name="image", filename="blob")
    values = {"model": "tiny", "timestep": 300, "scale": 2, "response_format": "b64_json"}
    status, body = edit(**values, n=1, size="auto", user="me")
    assert status == 200
    encoded = json.loads(body)["data"][0]["b64_json"]
    assert np.array_equal(pixels(base64.b64decode(encoded)), expected)
    assert json.loads(get(f"{address}/v1/models"))["data"][0]["id"] == "tiny"
    for wrong in ({"n": 2}, {"size": "1024x1024"}, {"response_format": "url"}, {"sizes": "auto"}):
        status, body = edit(**wrong)
        assert status == 400
        assert f"{next(iter(wrong))} must be " in json.loads(body)["error"]["message"]


def test_progress_comes_as_events(address, photo, expected):
    url = f"{address}/api/upscale"
    _, body = post(url, photo, accept="text/event-stream", timestep=300, scale=2)
    *others, last = body.decode().strip().split("\n\n")
    assert last.startswith("event: result\n")
    encoded = json.loads(last.split("data: ")[1])["b64_json"]
    assert np.array_equal(pixels(base64.b64decode(encoded)), expected)
    shares = [json.loads(event.split("data: ")[1])["share"] for event in others]
    assert shares[-1] == 1
    _, body = post(url, b"no photo", accept="text/event-stream")
    assert b"event: error\n" in body


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_guides_commands(address, photo, tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    commands = re.findall("^curl .*", guide, re.MULTILINE)
    assert len(commands) == 6
    (tmp_path / "photo.jpg").write_bytes(photo)
    for command in commands:
        words = command.replace("http://localhost:7000", address).replace("tadsr-tiny", "tiny")
        answer = subprocess.run([*shlex.split(words), "-f"], cwd=tmp_path, capture_output=True)
        assert answer.returncode == 0, command
        kinds = (b"# TYPE", b"event: result", b'"b64_json"')
        assert "-o" in command or any(kind in answer.stdout for kind in kinds), command
    sizes = {path.name: pixels(path.read_bytes()).shape[:2] for path in tmp_path.glob("*.png")}
    assert sizes == {"photo_x4.png": (32, 48), "photo_x2.png": (16, 24)}


@pytest.mark.parametrize(
    ("status", "message", "request_"),
    [
        (422, "timestep must be", {"timestep": 1000}),
        (422, "timestep must be a number", {"timestep": "vivid"}),
        (422, "color_fix must be one of", {"color_fix": "adian"}),
        (422, "timestp must be one of timestep", {"timestp": 3}),
        (422, "model must be one of tiny", {"model": "/etc"}),
        (422, "prompt must have at most", {"prompt": "a" * 2001}),
        (422, "at most 0.02 megapixels", {"scale": 16}),
        (422, "the form must have a photo", {"name": "other"}),
        (422, "photo must be", {"filename": "../../notes.txt"}),
        (422, "photo must be", {"filename": "notes.t\0xt"}),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(address, photo, status, message, request_):
    found, body = post(f"{address}/api/upscale", photo, **request_)
    assert (found, message in json.loads(body)["error"]["message"]) == (status, True), body
    assert b"Traceback" not in body
    assert b"/tmp" not in body


def test_large_bodies_are_refused_before_they_are_read(address):
    assert post(f"{address}/api/upscale", bytes(200_000))[0] == 413


def test_no_chunks_get_past_the_length_that_was_said(address):
    client = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    headers = {"Content-Length": "5", "Transfer-Encoding": "chunked"}
    client.request("POST", "/api/upscale", iter([b"--b--"]), headers, encode_chunked=True)
    assert client.getresponse().status == 411


def test_a_client_that_goes_while_it_sends_is_no_error_of_the_server(address, caplog):
    def refused():
        return get(f"{address}/metrics").split("\ntadsr_refused_total ")[1].split()[0]

    before, place = refused(), urlsplit(address)
    with socket.create_connection((place.hostname, place.port)) as client:
        client.sendall(
            b"POST /api/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
    deadline = time.monotonic() + 100
    while refused() == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not caplog.records


def test_a_photo_whose_client_has_gone_is_not_computed(address, photo, given_up):
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(post, f"{address}/api/upscale?model=slow", photo)
        while "tadsr_waiting 1\n" not in get(f"{address}/metrics"):
            assert not first.done()
        with pytest.raises(OSError, match="timed out"):
            post(f"{address}/api/upscale", photo, patience_s=0.2)
        time.sleep(3 * LOOKING_SECONDS)  # it is noticed meanwhile
        given_up.set()
        assert first.result()[0] == 200
    deadline = time.monotonic() + 100
    while "tadsr_cancelled_total 1\n" not in get(f"{address}/metrics"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_queue_is_bounded_and_counted(address, photo, released):
    def count(name):
        return int(get(f"{address}/metrics").split(f"\ntadsr_{name} ")[1].split()[0])

    before, url = count("refused_total"), f"{address}/api/upscale?timestep=1&model=held"
    with ThreadPoolExecutor(8) as clients:
        accepts = ["*/*", "text/event-stream"] * 4
        answers = clients.map(lambda accept: post(url, photo, accept=accept)[0], accepts)
        deadline = time.monotonic() + 100
        while count("refused_total") < before + 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert count("waiting") == 2
        assert json.loads(get(f"{address}/health"))["status"] == "ok"
        released.set()
        assert sorted(answers) == [200] * 2 + [503] * 6
    assert count("waiting") == 0


def test_to_be_told_to_stop_twice_leaves_no_photo():
    service = Service(Models(["tiny"], str), LIMITS)
    folder = Path(service._folder.name)
    (folder / "photo.png").touch()
    assert [service.stop(), service.stop()] == [False, True]
    service.discard_photos()
    assert not folder.exists()


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded(command):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        result = CliRunner().invoke(app, [command, "--port", port, "--model", "tadsr-tiny"])
    assert result.exit_code == 2
    assert f"127.0.0.1:{port} cannot be listened on" in " ".join(result.output.split())
