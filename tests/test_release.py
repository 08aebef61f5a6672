"""The version stands in one place, `sidecar/__init__.py`; what must repeat it is the same everywhere."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version

from real_parts import ROOT

from sidecar import __version__

#: An image of the sidecar with its version, in the manifests, the examples and the documents.
_IMAGE = re.compile(r"vlm-sidecar:(\d[\w.]*)")


def test_the_installed_package_has_the_version_of_the_code():
    assert version("vlm-sidecar") == __version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_every_image_that_a_file_names_has_the_version_of_the_code():
    folders = (ROOT / "k8s", ROOT / "examples", ROOT / "docs", ROOT / "tests")
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".yaml", ".md", ".py")]
    named = {(file.name, found) for file in files for found in _IMAGE.findall(file.read_text())}
    assert len(named) >= 5
    assert {found.removesuffix("-local") for _, found in named} == {__version__}
    assert f'version="{__version__}"' in (ROOT / "Dockerfile").read_text()


def test_make_builds_the_image_of_this_version():
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "--no-print-directory", "image"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert f"--tag vlm-sidecar:{__version__} " in printed


def test_the_changelog_is_ordered_by_release_and_begins_with_this_version():
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == __version__
    numbers = [tuple(int(part) for part in section.split(".")) for section in sections]
    assert numbers == sorted(set(numbers), reverse=True)
