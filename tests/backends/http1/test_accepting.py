"""The addresses of a listener: both families, or the one that the machine has."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from backends.http1 import accepting


@pytest.fixture
async def addresses():
    made = accepting.Addresses(asyncio.Protocol)
    yield made
    made.close()


async def test_on_a_machine_without_ipv6_every_address_means_those_of_ipv4(addresses, monkeypatch):
    bound = accepting._bound

    def without_ipv6(family, port):
        if family is socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return bound(family, port)

    monkeypatch.setattr(accepting, "_bound", without_ipv6)
    port = await addresses.open("0.0.0.0", 0)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    with pytest.raises(OSError, match="not supported"):
        await addresses.open("::", 0)


async def test_a_port_that_is_in_use_in_one_family_only_is_not_chosen(addresses, monkeypatch):
    bound, refused = accepting._bound, []

    def in_use_at_first(family, port):
        if family is socket.AF_INET6 and len(refused) < 2:
            refused.append(port)
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return bound(family, port)

    monkeypatch.setattr(accepting, "_bound", in_use_at_first)
    assert await addresses.open("0.0.0.0", 0) > 0
    assert len(refused) == 2
    refused.clear()
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match="in use"):
        await addresses.open("0.0.0.0", port)
