"""The proxy of the environment, as `requests` and `curl` read its variables."""

from __future__ import annotations

import os

import pytest
from yarl import URL

from backends.http1.proxies import environment_proxy


@pytest.fixture
def proxy_of(monkeypatch):
    """Return a function that gives the proxy for a URL in an environment with only these proxy variables."""

    def proxy_of(url, **environ):
        with monkeypatch.context() as patch:
            for name in list(os.environ):
                if name.lower().endswith("_proxy") or name == "REQUEST_METHOD":
                    patch.delenv(name)
            for name, value in environ.items():
                patch.setenv(name, value)
            found = environment_proxy(URL(url))
            return None if found is None else str(found).rstrip("/")

    return proxy_of


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("https://p.example/v1", {"HTTPS_PROXY": "http://proxy.lan:3128"}, "http://proxy.lan:3128"),
        ("https://p.example/v1", {"HTTPS_PROXY": "proxy.lan:3128"}, "http://proxy.lan:3128"),
        ("http://p.example/v1", {"HTTP_PROXY": "me:pw@proxy.lan:3128"}, "http://me:pw@proxy.lan:3128"),
        ("http://p.example/v1", {"HTTP_PROXY": "10.1.1.1:8080"}, "http://10.1.1.1:8080"),
        ("https://p.example/v1", {"ALL_PROXY": "proxy.lan:1"}, "http://proxy.lan:1"),
        ("https://p.example/v1", {"all_proxy": "http://a.lan:1", "HTTPS_PROXY": "http://b.lan:2"}, "http://b.lan:2"),
        ("https://p.example/v1", {"https_proxy": "http://low.lan:1", "HTTPS_PROXY": "http://up.lan:2"}, "http://low.lan:1"),
        ("https://p.example/v1", {"HTTP_PROXY": "http://proxy.lan:3128"}, None),
        ("https://p.example/v1", {"HTTPS_PROXY": "", "ALL_PROXY": " "}, None),
        ("https://p.example/v1", {}, None),
    ],
)  # fmt: skip
def test_the_variable_that_names_the_proxy(proxy_of, url, environ, expected):
    assert proxy_of(url, **environ) == expected


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("10.20.30.40", "10.20.0.0/16", True),
        ("10.21.30.40", "10.20.0.0/16", False),
        ("10.20.30.40", "192.168.0.0/16, 10.20.30.40/32", True),
        ("[fd00:1::5]", "fd00::/8", True),
        ("[fe80::5]", "fd00::/8", False),
        ("[fd00:1::5]", "[fd00:1::5]:8000", True),
        ("10.20.30.40", "10.20.30.40:8000", True),
        ("10.20.30.40", "10.20.30.40:8001", False),
        ("10.20.30.40", "0.40", False),
        ("vllm.lan", "vllm.lan:8000", True),
        ("vllm.lan", "vllm.lan:9000", False),
        ("vllm.lan", "lan", True),
        ("vllm.lan", ".lan", True),
        ("vllm.lan", "*.lan", True),
        ("vllm.lan", "m.lan", False),
        ("VLLM.lan", "vllm.LAN", True),
        ("vllm.lan", "other.lan   vllm.lan", True),
        ("vllm.lan", "*", True),
        ("vllm.lan", "10.0.0.0/8,,not/a/network", False),
        ("localhost", "", True),
        ("127.9.9.9", "", True),
        ("[::1]", "", True),
    ],
)
def test_no_proxy_takes_networks_ports_and_names_below_a_name(proxy_of, host, no_proxy, direct):
    found = proxy_of(f"http://{host}:8000/v1", http_proxy="http://proxy.lan:3128", no_proxy=no_proxy)
    assert found == (None if direct else "http://proxy.lan:3128")


def test_the_port_of_an_entry_is_compared_with_the_default_port_too(proxy_of):
    proxy = {"HTTPS_PROXY": "http://proxy.lan:3128"}
    assert proxy_of("https://p.example/v1", NO_PROXY="p.example:443", **proxy) is None
    assert proxy_of("https://p.example/v1", NO_PROXY="p.example:80", **proxy) is not None


@pytest.mark.parametrize("value", ["socks5://me:hunter2@10.0.0.1:1080", "http://", "me:hunter2@proxy.lan:port"])
def test_a_proxy_that_cannot_be_used_is_one_line_with_the_variable_and_no_password(proxy_of, value):
    with pytest.raises(ValueError, match=r"^ALL_PROXY: must be an http://") as caught:
        proxy_of("https://p.example/v1", ALL_PROXY=value)
    assert "hunter2" not in str(caught.value)
