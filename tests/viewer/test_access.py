"""Who is answered, and what is never reached: token, host, origin, paths, hostile names and numbers."""

from __future__ import annotations

import pytest

from exaonepath.viewer.access import new_token


def test_without_the_token_nothing_is_answered(client):
    token = client.token
    for path in (
        "/",
        "/api/slides",
        "/page/main.js",
        f"/{token[:-1]}/",
        f"/{token}x/api/slides",
        f"/{token.swapcase()}/",
    ):
        status, headers, body = client.raw(path)
        assert status == 403, path
        assert token.encode() not in body
        assert "default-src 'self'" in headers["content-security-policy"]
    assert client.raw(f"/{'x' * 5000}/")[0] == 403
    assert client.raw(f"/{token}/")[0] == 200
    assert client.raw(f"//{token}/")[0] in (200, 403)


def test_tokens_are_long_and_differ():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 32


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost.evil.example", "", "0.0.0.0"],
)
def test_a_foreign_host_name_is_refused(client, host):
    """DNS rebinding: a page of evil.example whose name is resolved to 127.0.0.1."""
    assert client.raw(f"/{client.token}/", host=host.format(port=client.port))[0] == 403


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "[::1]", "localhost:9"]
)
def test_this_machine_is_answered_whatever_port_is_forwarded(client, host):
    assert client.raw(f"/{client.token}/", host=host.format(port=client.port))[0] == 200


def test_requests_of_other_pages_are_refused(client):
    path = f"/{client.token}/api/slides"
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{client.port + 1}"):
        assert client.raw(path, origin=origin)[0] == 403
    assert client.raw(path, origin=f"http://127.0.0.1:{client.port}")[0] == 200


def test_every_answer_forbids_what_the_page_does_not_need(client):
    for path in ("", "page/style.css", "api/slides", "nothing"):
        _, headers, _ = client.get(path)
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "page/../app.py",
        "page/%2e%2e/app.py",
        "page/..%2fapp.py",
        "page/..%5capp.py",
        "page//etc/passwd",
        "page/%2fetc%2fpasswd",
        "page/vendor/../../app.py",
        "page/main.js%00.css",
        "page/main.js/",
        "page/",
        "page/MAIN.JS",
        "page/.",
        "../page/main.js",
        "page/vendor",
        "page/main.py",
        "%2e%2e/%2e%2e/etc/passwd",
        "page/%ff%fe",
    ],
)
def test_paths_do_not_escape(client, path):
    status, _, body = client.raw(f"/{client.token}/{path}")
    assert status == 404, (path, body[:80])


@pytest.mark.parametrize(
    "key",
    [
        "",
        "0",
        "..",
        "%2e%2e",
        "0" * 16,
        "../slides",
        "second",
        "x" * 3000,
        "%00",
        "%F0%9F%94%AC",
        "A" * 16,
        "%2fetc%2fpasswd",
    ],
)
def test_hostile_ids_are_not_found(client, key):
    for path in (f"api/slides/{key}", f"api/slides/{key}/coords", f"api/slides/{key}/regions", f"thumbnails/{key}.jpg"):
        if path not in ("api/slides/", "api/slides/.."):
            assert client.raw(f"/{client.token}/{path}")[0] == 404, path
    assert client.raw(f"/{client.token}/pixels/{key}/0/tiles/9/0_0.jpg")[0] == 404


NUMBERS = [
    "-1",
    "+1",
    "1.0",
    "1e1",
    "",
    "%20",
    "0x1",
    "٣",
    "%D9%A3",
    "²",
    "%C2%B2",
    "99999999999999999999",
    "4294967296",
    "1_0",
    "nan",
    "NaN",
    "a",
]


@pytest.mark.parametrize("number", NUMBERS)
def test_hostile_tile_numbers_are_not_found(client, number):
    slide = client.slide()
    base = f"/{client.token}/pixels/{slide['key']}/{slide['slide']['fingerprint']}"
    number = number if number.isascii() else "".join(f"%{byte:02X}" for byte in number.encode())
    for path in (
        f"tiles/{number}/0_0.jpg",
        f"tiles/12/{number}_0.jpg",
        f"tiles/12/0_{number}.jpg",
        f"patches/{number}_0_256_64.jpg",
        f"patches/0_0_{number}_64.jpg",
        f"patches/0_0_256_{number}.jpg",
    ):
        assert client.raw(f"{base}/{path}")[0] == 404, path


@pytest.mark.parametrize("place", ["13/0_0", "12/9_0", "12/0_12", "11/5_0", "0/1_0", "500/0_0"])
def test_tiles_outside_the_slide_are_not_found(client, place):
    slide = client.slide()
    assert client.get(f"pixels/{slide['key']}/{slide['slide']['fingerprint']}/tiles/{place}.jpg")[0] == 404


@pytest.mark.parametrize("patch", ["-1", "99999", "1.5", "", "NaN", "%D9%A3", None])
def test_hostile_patch_numbers_are_not_found(client, patch):
    slide = client.slide()
    query = f"v={slide['version']}" + ("" if patch is None else f"&patch={patch}")
    for name in ("similarity", "similar", "attention"):
        assert client.raw(f"/{client.token}/api/slides/{slide['key']}/{name}?{query}")[0] == 404


@pytest.mark.parametrize(
    "query", [{"k": 1}, {"k": 13}, {"k": "x"}, {"vectors": "other"}, {"vectors": "../x"}, {"k": 10**12}]
)
def test_hostile_settings_are_not_found(client, query):
    slide = client.slide()
    assert client.get(f"api/slides/{slide['key']}/clusters", v=slide["version"], **query)[0] == 404


def test_other_methods_are_refused(client):
    for method in ("POST", "DELETE", "PUT", "PATCH"):
        assert client.raw(f"/{client.token}/api/slides", method, b"")[0] == 405
    assert client.raw(f"/{client.token}/api/slides/{client.slide()['key']}/regions", "DELETE")[0] == 405
