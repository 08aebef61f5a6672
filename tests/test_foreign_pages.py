"""Requests that a browser sends for a web page of another site are refused, and everything else works."""

from __future__ import annotations

import socket

import pytest
from multidict import CIMultiDict
from running import CHAT

from sidecar.foreign_pages import ForeignPages

PAGES = ForeignPages(["cams.example.com"])


def refused(*, navigable=False, own_page=False, any_host=False, **headers):
    """Whether a request with these headers is refused. `_` in a name is `-`."""
    given = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return PAGES.refusal(given, navigable=navigable, own_page=own_page, any_host=any_host) is not None


@pytest.mark.parametrize(
    "host",
    [
        "", "127.0.0.1:8100", "10.4.0.9", "[::1]:9464", "[fd00::7]", "localhost", "localhost:8100", "a.localhost",
        "sidecar-0:8100", "sidecar.cameras.svc:8100", "sidecar.cameras.svc.cluster.local", "nas.local", "NAS.Local.",
        "host.docker.internal:8100", "cams.example.com", "CAMS.example.com:8100", socket.gethostname(),
    ],
)  # fmt: skip
def test_a_browser_may_use_a_local_name_or_an_allowed_one(host):
    assert not host or not refused(Host=host, Origin=f"http://{host.lower()}", own_page=True)
    assert not refused(Host=host, Sec_Fetch_Site="same-origin", own_page=True)
    assert not refused(Host=host, own_page=True)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8100", "127.0.0.1.evil.example", "localhost.evil.example", "evilsvc.example",
        "x.svc.evil", "cams.example.com.evil.example", "notcams.example.com", "local.evil.example:80", "1.2.3",
        "127.0.0.1@evil.example",
    ],
)  # fmt: skip
def test_another_name_is_refused_for_a_browser_and_for_the_pages_that_rebinding_could_read(host):
    assert refused(Host=host, Origin=f"http://{host}")
    assert refused(Host=host, Sec_Fetch_Site="same-origin")
    assert refused(Host=host, own_page=True)
    assert refused(
        Host=host, Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document", navigable=True
    )
    assert not refused(Host=host)  # no browser: curl, an SDK by a Service's name
    assert not refused(Host=host, Origin=f"http://{host}", any_host=True)


@pytest.mark.parametrize(
    ("origin", "is_ours"),
    [
        ("http://localhost:8100", True),
        ("https://localhost:8100", True),  # the scheme is not compared
        ("http://LOCALHOST:8100", True),
        ("http://localhost:9464", False),
        ("http://localhost", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
        ("localhost:8100", False),
        ("http://localhost:8100.evil.example", False),
    ],
)
def test_an_origin_must_have_the_host_and_port_of_the_request(origin, is_ours):
    assert refused(Host="localhost:8100", Origin=origin) is not is_ours


def test_the_default_port_of_a_scheme_may_be_left_out():
    assert not refused(Host="nas.local:80", Origin="http://nas.local")
    assert not refused(Host="nas.local", Origin="https://nas.local")
    assert not refused(Host="nas.local:443", Origin="https://nas.local")
    assert refused(Host="nas.local:443", Origin="http://nas.local")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_may_only_link_to_the_live_page(site):
    link = {
        "Sec_Fetch_Site": site,
        "Sec_Fetch_Mode": "navigate",
        "Sec_Fetch_Dest": "document",
        "Host": "localhost:9464",
    }
    assert not refused(**link, navigable=True, own_page=True)
    assert refused(**link)
    assert refused(**{**link, "Sec_Fetch_Dest": "iframe"}, navigable=True)
    assert refused(**{**link, "Sec_Fetch_Mode": "no-cors"}, navigable=True)
    assert refused(Host="localhost:9464", Sec_Fetch_Site=site)


def test_what_node_sends_is_no_mark_of_a_web_page():
    assert not refused(Host="gateway.example.com", Sec_Fetch_Mode="cors")


@pytest.mark.parametrize(
    ("path", "shape"), [(CHAT, "error"), ("/api/inference/describe", "detail"), ("/v1/models", "error")]
)
async def test_the_data_listener_answers_403_in_the_shape_of_the_api_and_sends_nothing(serving, provider, path, shape):
    url, simulated = await provider()
    sidecar = await serving(dashscope_url=url)
    method = "GET" if path == "/v1/models" else "POST"
    headers = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    async with sidecar.client.request(method, sidecar.url + path, headers=headers, data=b"{}") as response:
        body = await response.json()
        assert (response.status, response.headers["x-should-retry"]) == (403, "false")
    assert "SIDECAR_ALLOWED_HOSTS" in (body["error"]["message"] if shape == "error" else body["detail"])
    assert shape == "detail" or body["error"]["code"] == "forbidden_origin"
    assert not simulated.counts.calls


async def test_the_admin_listener_shows_nothing_under_a_foreign_name_except_probes_and_metrics(serving):
    sidecar = await serving()
    for path in ("/", "/status", "/history", "/events", "/metrics", "/livez", "/readyz", "/startupz"):
        async with sidecar.client.get(sidecar.admin_url + path, headers={"Host": "rebound.example:9464"}) as response:
            open_to_all = path in ("/metrics", "/livez", "/readyz", "/startupz")
            assert response.status == (200 if open_to_all else 403), path
            if not open_to_all:
                assert (await response.text()).startswith("forbidden_origin: ")


async def test_an_allowed_name_opens_the_page(serving):
    sidecar = await serving(allowed_hosts="status.example.com, other.example.com")
    for host, status in (("status.example.com", 200), ("OTHER.example.com:443", 200), ("third.example.com", 403)):
        async with sidecar.client.get(f"{sidecar.admin_url}/status", headers={"Host": host}) as response:
            assert response.status == status
