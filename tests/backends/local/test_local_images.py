"""Images: their allowed sources, and the errors for images that are too large, damaged, or not images."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

from __future__ import annotations

import struct
import zlib

import pytest
from aiohttp import web
from local_calls import ask, chat, data_url, picture

from backends.base import Rejected
from backends.local import LocalBackend

FIELD = "messages[0].content[0].image_url.url"


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG whose header names this size, with almost no data after it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
async def test_the_image_formats_of_cameras_and_browsers_are_accepted(serve, kind):
    backend = await serve()
    assert (await ask(backend, chat(images=[data_url(picture(kind=kind))]))).text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64,not base64!", "is not base64"),
        ("data:image/png,abc", "data:image/jpeg;base64"),
        (data_url(b"GIF89a and then nothing"), "is not an image"),
        (data_url(b""), "is not an image"),
        (data_url(picture()[:-100]), "damaged"),
        (data_url(png_that_claims(20_000, 20_000)), "too large"),
        (data_url(png_that_claims(2**31 - 1, 2**31 - 1)), r"is not an image|too large"),
        ("http://169.254.169.254/latest/meta-data", "not allowed"),
        ("https://example.com/a.jpg", "not allowed"),
        ("file:///etc/passwd", "not allowed"),
        ("/etc/passwd", "not allowed"),
        ("http://[broken", r"not a URL|not allowed"),
    ],
)
async def test_an_invalid_image_is_refused_with_the_name_of_its_field(serve, url, expected):
    backend = await serve()
    with pytest.raises(Rejected, match=expected) as caught:
        await ask(backend, chat(images=[url]))
    error = caught.value
    assert (error.status, error.code) == (400, "invalid_request")
    assert error.message.startswith(FIELD)
    assert f'"param":"{FIELD}"'.encode() in error.body
    assert (await ask(backend, chat())).text


async def test_the_pixel_limit_applies_to_all_images_of_a_request_together(serve):
    backend = await serve()
    with pytest.raises(Rejected, match="too large") as caught:
        await ask(backend, chat(images=[data_url(png_that_claims(5000, 5000))] * 2))
    assert caught.value.message.startswith("messages[0].content[1].image_url.url")


async def test_an_image_is_rotated_upright_and_converted_from_every_mode(serve):
    from io import BytesIO

    from PIL import Image

    backend = await serve()
    upright = Image.linear_gradient("L").resize((96, 48)).convert("RGB")
    files = []
    for image, exif in ((upright, None), (upright.rotate(90, expand=True), 6)):
        file = BytesIO()
        tags = Image.Exif()
        if exif:
            tags[0x0112] = exif  # EXIF orientation 6: rotate clockwise to see it upright
        image.save(file, "PNG", exif=tags)
        files.append(file.getvalue())
    first, second = [await ask(backend, chat(images=[data_url(file)])) for file in files]
    assert first.text == second.text
    transparent = BytesIO()
    upright.convert("RGBA").save(transparent, "PNG")
    assert (await ask(backend, chat(images=[data_url(transparent.getvalue())]))).text == first.text


@pytest.fixture
async def camera(aiohttp_server):
    """A server with an image, a redirect and an endless answer."""

    async def frame(_: web.Request) -> web.Response:
        return web.Response(body=picture(), content_type="image/jpeg")

    async def elsewhere(_: web.Request) -> web.Response:
        raise web.HTTPFound("/private/frame.jpg")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1024 * 1024))

    app = web.Application()
    app.router.add_get("/cameras/frame.jpg", frame)
    app.router.add_get("/private/frame.jpg", frame)
    app.router.add_get("/cameras/moved.jpg", elsewhere)
    app.router.add_get("/cameras/endless.jpg", endless)
    return await aiohttp_server(app)


async def test_only_urls_below_an_allowed_url_are_fetched(serve, camera):
    backend = await serve(image_urls=[str(camera.make_url("/cameras"))])
    direct = await ask(backend, chat())
    fetched = await ask(backend, chat(images=[str(camera.make_url("/cameras/frame.jpg"))]))
    assert fetched.text == direct.text
    refused = {
        "/private/frame.jpg": "not allowed",
        "/cameras/../private/frame.jpg": "not allowed",
        "/cameras/%2e%2e/private/frame.jpg": "not allowed",
        "/camerasprivate": "not allowed",
        "/cameras/moved.jpg": "status 302",
        "/cameras/none.jpg": "status 404",
        "/cameras/endless.jpg": "larger than",
    }
    for path, expected in refused.items():
        with pytest.raises(Rejected, match=expected):
            await ask(backend, chat(images=[f"http://{camera.host}:{camera.port}{path}"]))
    with pytest.raises(Rejected, match="not allowed"):
        await ask(backend, chat(images=[f"http://{camera.host}:{camera.port + 1}/cameras/frame.jpg"]))


async def test_an_allowed_host_that_is_unreachable_is_reported(serve, unused_tcp_port):
    backend = await serve(image_urls=[f"http://127.0.0.1:{unused_tcp_port}/"])
    with pytest.raises(Rejected, match="could not be fetched"):
        await ask(backend, chat(images=[f"http://127.0.0.1:{unused_tcp_port}/frame.jpg"]))


async def test_files_are_read_from_an_allowed_folder_but_not_through_links_out_of_it(serve, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "a.jpg").write_bytes(picture())
    (tmp_path / "secret.jpg").write_bytes(picture())
    (frames / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    backend = await serve(image_urls=[frames.as_uri()])
    direct = await ask(backend, chat())
    assert (await ask(backend, chat(images=[(frames / "a.jpg").as_uri()]))).text == direct.text
    for path in ("../secret.jpg", "%2e%2e/secret.jpg", "link.jpg", "none.jpg", ""):
        with pytest.raises(Rejected, match=r"not allowed|no such file"):
            await ask(backend, chat(images=[f"{frames.as_uri()}/{path}"]))


@pytest.mark.parametrize("url", ["ftp://host/", "host/folder", "https:///folder"])
def test_an_invalid_allowed_url_is_refused(url):
    with pytest.raises(ValueError, match="images may be allowed from"):
        LocalBackend("any", image_urls=[url])
