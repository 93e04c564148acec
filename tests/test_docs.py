"""What the README and the pages of docs/ tell a reader to type works as written.

The blocks of a page run in their order, Python in one namespace and commands in this process, in a
folder with small photos. A block behind `<!-- not run: REASON -->` is checked without being run.
"""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from tadsr import TADSRPipeline
from tadsr.cli import app
from tadsr.images import ArrayImage, read_frames, read_image, write_frames, write_image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUM_NOT_RUN = 33
"""Blocks that cannot run offline on a CPU in seconds."""

SHELL, PYTHON, DATA = ("sh", "bash"), ("python",), ("text", "json", "yaml", "toml")
"""Languages of blocks; "py" and "console" would be neither run nor checked, and are refused."""
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run:(.*?)-->")
OWN_TOOLS = {"mypy", "pytest", "ruff", "mkdocs"}
"""Programs of the extras `test` and `docs`; the linters' and tests' own runs prove them."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    reason: str | None
    """Why it is not run; None if it is."""


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        # Comments that stand directly above the fence, one a line.
        above = re.search(r"(?:^<!--.*-->\n)*\Z", text[: match.start()], re.MULTILINE)[0]
        mark = MARK.search(above)
        yield Block(match[1], match[2], None if mark is None else mark[1].strip())


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, those behind && apart."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def crop(path: Path) -> Image.Image:
    """A part of the example photo, small, or the pages would take minutes."""
    with Image.open(ROOT / "examples" / "photos" / "lighthouse.jpg") as image:
        photo = image.crop((150, 60, 178, 80))
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path)
    return photo


def write_lora(path: Path, unet: UNet2DConditionModel) -> None:
    """A LoRA for the small model, as diffusers writes it."""
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "extra")
    layers = get_peft_model_state_dict(unet, adapter_name="extra")
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=layers, weight_name=path.name
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base_dir, adapter_file) -> Path:
    """What a reader has: photos, and models where the pages say."""
    folder = tmp_path_factory.mktemp("reader")
    photo = crop(folder / "photo.jpg")
    for name in ("panorama.png", "originals/one.png"):
        crop(folder / name)
    for name in ("examples/photos/lighthouse.jpg", "photos/holiday/one.jpg"):
        crop(folder / name)
    scan = np.asarray(photo).astype(np.uint16) * 257
    write_image(ArrayImage(scan), folder / "scan16.tif")
    frames = [Image.new("RGB", (8, 6), color) for color in ("orange", "teal")]
    write_frames(frames, folder / "clip.gif", durations_ms=(100, 200))
    Image.linear_gradient("L").resize((4, 3)).save(folder / "mask.png")
    (folder / "regions.json").write_text('{"default": 3}')
    # The published layout and what training exports, small.
    shutil.copytree(base_dir, folder / "sd21-base")
    shutil.copytree(base_dir, folder / "weights" / "TADSR")
    for place in ("weights", "weights/TADSR"):
        shutil.copy(adapter_file, folder / place)
    shutil.copytree(ROOT / "tadsr" / "weights" / "tadsr-tiny", folder / "runs" / "mine" / "model")
    unet = UNet2DConditionModel.from_pretrained(folder / "sd21-base" / "unet")
    write_lora(folder / "foliage.safetensors", unet)
    return folder


@pytest.fixture
def reader(prepared, unenlarged, loaded_once, tmp_path, monkeypatch) -> Path:
    """A reader's folder, where small photos are not enlarged before they are restored."""
    folder = tmp_path / "reader"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


def run_command(words: list[str]) -> None:
    if words[0] == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return
    assert words[0] == "tadsr", f"only tadsr and python are run, not {words}; mark the block"
    is_sized = words[1] in ("upscale", "sweep", "evaluate") and words[-1] != "--help"
    result = CliRunner().invoke(app, words[1:] + ["--process-size", "0"] * is_sized)
    assert result.exit_code == 0, (words, result.output)


SLOW = {"docs/onnx.md"}
"""The exporter takes half a minute; nothing smaller than `tadsr-tiny` has a name to type."""
PAGES_WITH_CODE = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in SLOW))
    for page in PAGES
    if any(b.language not in DATA and b.reason is None for b in blocks_of(page))
]


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_the_code_of_a_page_runs(page, reader):
    if page.name == "training.md":  # crops of 128 px need a photo that is larger
        with Image.open(ROOT / "examples" / "photos" / "lighthouse.jpg") as photo:
            photo.crop((0, 0, 144, 136)).save("examples/photos/lighthouse.jpg")
    namespace: dict = {}
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        if block.language in PYTHON:
            exec(compile(block.text, name_of(page), "exec"), namespace)
        elif block.language in SHELL:
            for words in commands_of(block):
                run_command(words)
    WHAT_COMES_OUT.get(name_of(page), lambda: None)()


def check_readme():
    assert Image.open("lighthouse_x4.png").size == (112, 80)
    assert Image.open("photo_x4.png").size == (112, 80)
    assert Path("sharp.webp").is_file()
    assert Path("sharp/holiday/one.jpg").is_file()
    assert isinstance(read_image("sharp.png"), ArrayImage)
    assert len(read_frames("clip_x4.png")) == 2


def check_formats():
    assert read_image("sharp.png").pixels.dtype == np.uint16
    assert read_frames("clip.webp").durations_ms == (100, 200)


def check_tiling():
    for name in ("large.png", "large.tif", "huge.tif", "sharp/holiday/one.png"):
        assert Image.open(name).size == (112, 80)


def check_weights():
    published = torch.load("published/tadsr.pkl", weights_only=True)
    assert published


def check_training():
    assert Image.open("first_x4.png").size == (112, 80)
    TADSRPipeline.from_pretrained("runs/python/checkpoints/step_00000002")


def check_onnx():
    with Image.open("photo.jpg") as photo:
        expected = TADSRPipeline.from_pretrained("tadsr-tiny")(photo, 500, process_size=0)
    for name in ("onnx_x4.png", "openvino_x4.png"):
        difference = np.asarray(Image.open(name), np.int16) - np.asarray(expected, np.int16)
        assert abs(difference).max() <= 1, name


WHAT_COMES_OUT = {
    "README.md": check_readme,
    "docs/formats.md": check_formats,
    "docs/tiling.md": check_tiling,
    "docs/training.md": check_training,
    "docs/onnx.md": check_onnx,
    "docs/weights.md": check_weights,
}


def test_every_block_is_known_and_every_mark_has_a_reason():
    num_not_run = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = list(blocks_of(page))
        known = {*PYTHON, *SHELL, *DATA}
        assert {block.language for block in found} <= known, f"{name_of(page)}: not in {known}"
        assert text.count("```") == 2 * len(found), f"{name_of(page)}: a fence is not closed"
        reasons = [block.reason for block in found if block.reason is not None]
        # The contributing page shows a mark in a block of text.
        shown = sum(block.text.count("<!-- not run:") for block in found)
        assert text.count("<!-- not run:") - shown == len(reasons), (
            f"{name_of(page)}: a mark must stand directly above its block"
        )
        assert all(len(reason.split()) >= 2 for reason in reasons), f"{name_of(page)}: say why"
        num_not_run += len(reasons)
    assert num_not_run == NUM_NOT_RUN


MARKED = [
    pytest.param(block, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks_of(page))
    if block.reason is not None
]


@pytest.mark.parametrize("block", MARKED)
def test_a_block_that_is_not_run_names_what_exists(block):
    if block.language in PYTHON:
        check_python(block.text)
    else:
        for words in commands_of(block):
            check_command(words)


def check_python(text: str) -> None:
    """Imports and keyword arguments of a block exist; `pipe` is a pipeline."""
    tree = ast.parse(text)
    names: dict = {"pipe": TADSRPipeline}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = resolve(call.func, names)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            given = {keyword.arg for keyword in call.keywords} - {None}
            assert given <= {p.name for p in parameters}, ast.unparse(call)


def resolve(node: ast.expr, names: dict) -> object | None:
    """What a dotted name stands for; None if it begins with something unknown."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolve(node.value, names)
    # A pipeline has its networks and its tagger only once it is made.
    if owner is TADSRPipeline and node.attr in ("vae", "unet", "tagger"):
        return None
    return None if owner is None else getattr(owner, node.attr)


def check_command(words: list[str]) -> None:
    """The programs, options, files and extras of a command exist."""
    program = Path(words[0]).name
    if program == "tadsr" or (program == "accelerate" and "tadsr" in words):
        parse(words[words.index(words[0] if program == "tadsr" else "tadsr") + 1 :])
    elif program == "python":
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, words
    elif program == "pip":
        check_installation(words)
    elif program == "run":
        assert (ROOT / words[0]).is_file()
    elif program in OWN_TOOLS:
        for path in (word for word in words[1:] if "/" in word):
            assert (ROOT / path).exists(), words
    else:
        assert program in ("python3", "git", "cd"), f"what is {words}?"


def parse(arguments: list[str]) -> None:
    """Parse a command line of tadsr without running it."""
    command = get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)


def check_installation(words: list[str]) -> None:
    for word in words:
        if match := re.search(r"\[(.*)\]", word):
            assert set(match[1].split(",")) <= extras(), words
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()


def test_the_checks_of_blocks_that_are_not_run_find_what_is_wrong():
    check_python("from tadsr.training import TrainingConfig\nTrainingConfig(model='a', steps=3)")
    with pytest.raises(AssertionError, match="num_steps"):
        check_python("from tadsr.training import TrainingConfig\nTrainingConfig(num_steps=3)")
    with pytest.raises(AttributeError):
        check_python("from tadsr.training import Training")
    with pytest.raises(AttributeError):
        check_python("pipe.merge_loras('a')")
    check_command(["tadsr", "upscale", "photo.jpg", "--tagger", "dape"])
    for wrong in (["tadsr", "upscale", "photo.jpg", "--tager", "dape"], ["tadsr", "enlarge", "a"]):
        with pytest.raises((Exception, SystemExit)):
            check_command(wrong)
    with pytest.raises(AssertionError):
        check_command(["pip", "install", "tadsr[everything]"])
    with pytest.raises(AssertionError):
        check_command(["python", "benchmarks/engine.py", "--fast"])


def extras() -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) =", listed, re.MULTILINE))


def test_the_quickstart_lists_every_extra():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == extras()


def test_the_dockerfile_names_what_exists():
    """That it is well written is hadolint's part."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for line in text.splitlines():
        instruction, *words = line.split()
        if instruction == "COPY":
            assert all((ROOT / word).exists() for word in words[:-1]), line
        elif "install" in words:
            check_installation(words)
    for command in re.findall(r"^# docker.* tadsr (\w+ .*)$", text, re.MULTILINE):
        parse(shlex.split(command))


def test_the_first_command_upscales_a_photo_that_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"<!-- first run -->\n```sh\n(.*)\n```", readme)[1]
    photo = shlex.split(first.split("tadsr upscale ")[1])[0]
    assert (ROOT / photo).is_file()


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and the site give a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s", "-", text.strip()) for text in words}


def test_links_lead_to_files_and_headings():
    """Those that `mkdocs build --strict` does not see: outside docs/, and their anchors."""
    outside = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for page in (
        *outside,
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ):
        text = page.read_text(encoding="utf-8")
        for target, _, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(#([^)]*))?\)", text):
            found = page.parent / target if target else page
            assert found.exists(), (page, target)
            assert not anchor or anchor in anchors_of(found), (page, target, anchor)


def test_recipes_that_pages_name_exist():
    from tadsr.training import load_recipe

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    paths = set(re.findall(r"examples/recipes/[\w/.]+\.yaml", text))
    assert len(paths) >= 5
    for path in paths:
        load_recipe(ROOT / path)
