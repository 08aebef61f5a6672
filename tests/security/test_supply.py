"""The installed and shipped packages are those of the lock file, byte by byte, and the SBOM lists all of them."""

from __future__ import annotations

import json
import subprocess
import tomllib

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
