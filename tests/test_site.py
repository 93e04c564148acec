"""The documentation's site builds without a warning, loads nothing, and has all public names."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PUBLIC = (
    "tadsr",
    "tadsr.degradation",
    "tadsr.kernels",
    "tadsr.training",
)
"""Packages all of whose names are public."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


def html_of(site: Path, pattern: str = "**/*.html") -> dict[Path, str]:
    pages = {page: page.read_text(encoding="utf-8") for page in site.glob(pattern)}
    assert pages
    return pages


def test_pages_load_nothing_from_elsewhere(site):
    loading = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*"
        r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload)[^>]*href=[\"']?(?:https?:)?//[^>]*"
    )
    for page, text in html_of(site).items():
        assert not loading.findall(text), page
        # Maths and diagrams would need scripts of other servers.
        assert 'class="mermaid"' not in text, page
        assert 'class="arithmatex"' not in text, page
        # With it the theme's script asks GitHub for the repository's stars.
        assert "data-md-component=source" not in text.replace('"', ""), page


def test_the_reference_has_every_public_name(site):
    text = "".join(html_of(site, "api/*.html").values())
    documented = {
        identifier.rsplit(".")[-1] for identifier in re.findall(r'id="(tadsr\.\S+)"', text)
    }
    for package in PUBLIC:
        names = set(importlib.import_module(package).__all__) - {"__version__"}
        assert names <= documented, f"{package}: {sorted(names - documented)} are not in docs/api"
