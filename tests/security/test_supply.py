"""The installed and shipped packages are those of the lock file, byte by byte, and the SBOM lists all of them."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib

import pytest
from packaging import tags
from packaging.utils import parse_wheel_filename
from real_parts import ROOT

LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
PACKAGES = {package["name"]: package for package in LOCK["package"]}
SHIPPED = PACKAGES["vlm-sidecar"]


def closure(names):
    """Return these packages and all their dependencies."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [needed["name"] for needed in PACKAGES[name].get("dependencies", [])]
    return found


def test_everything_comes_from_one_index_and_every_file_has_its_hash():
    assert len(PACKAGES) > 20
    for name, package in PACKAGES.items():
        if package is SHIPPED:
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}, name
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files, name
        assert all(file["hash"].startswith("sha256:") and len(file["hash"]) == 71 for file in files), name


def test_the_sbom_lists_exactly_the_shipped_packages(tmp_path):
    file = tmp_path / "sbom.json"
    subprocess.run(["make", "--no-print-directory", "sbom", f"SBOM={file}"], cwd=ROOT, check=True, timeout=120)
    components = json.loads(file.read_text())["components"]
    shipped = closure(needed["name"] for needed in SHIPPED["dependencies"])
    assert {(one["name"], one["version"]) for one in components} == {
        (name, PACKAGES[name]["version"]) for name in shipped
    }
    assert all(file["hashes"] for one in components for file in one["externalReferences"])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_package_of_the_image_has_a_wheel_for_both_machines(machine):
    """The image has Python 3.11 and Debian's glibc, 2.36 or newer, and nothing that compiles."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "ARG PYTHON=python:3.11-slim" in dockerfile
    [extras] = re.findall(r'^ARG EXTRAS="(.*)"$', dockerfile, re.MULTILINE)
    names = [needed["name"] for needed in SHIPPED["dependencies"]]
    for extra in extras.replace("--extra", "").split():
        names += [needed["name"] for needed in SHIPPED["optional-dependencies"][extra]]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(36, 16, -1)] + [f"manylinux2014_{machine}"]
    fitting = {*tags.cpython_tags((3, 11), platforms=platforms), *tags.compatible_tags((3, 11), platforms=platforms)}
    for name in closure(names):
        [package] = [one for one in LOCK["package"] if one["name"] == name]  # one version
        wheels = [parse_wheel_filename(wheel["url"].rpartition("/")[2])[3] for wheel in package["wheels"]]
        assert any(wheel & fitting for wheel in wheels), name
