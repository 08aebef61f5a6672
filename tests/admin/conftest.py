"""The browser of the tests of the admin listener."""

from __future__ import annotations

import pytest
from real_parts import real_packages, real_part


@pytest.fixture
async def browser():
    """Chromium, closed afterwards. It finds every name below `.example` at this machine."""
    real_packages("playwright", how_to_get_them="`make .venv/.group-page` installs it")
    from playwright.async_api import async_playwright  # noqa: PLC0415

    async with async_playwright() as driver:
        launched = await driver.chromium.launch(
            executable_path=real_part("chromium"),
            args=["--no-sandbox", "--host-resolver-rules=MAP *.example 127.0.0.1"],
        )
        yield launched
        await launched.close()
