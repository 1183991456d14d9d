"""Results of two slides, made once: the demo's real slide (a synthetic one where it is absent), and a synthetic one."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from stand_in_encoders import stand_in_patch_encoder, stand_in_slide_encoder

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from exaonepath.demo import SLIDE_NAME
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.slides.cohort.inputs import cohort_inputs
from exaonepath.slides.encode import encode_slide
from exaonepath.synthetic import make_slide
from exaonepath.viewer.access import new_token
from exaonepath.viewer.serve import listen, make_server
from exaonepath.viewer.service import Service
from exaonepath.viz.values.library import Library, key_of


@pytest.fixture(scope="session")
def slide_encoder() -> LoadedEncoder:
    return stand_in_slide_encoder()


@pytest.fixture(scope="session")
def encode(slide_encoder):
    """`encode(slide, out, step)`: all stages with encoders that cost nothing."""
    patch_encoder = stand_in_patch_encoder()

    def run(slide: Path, out: Path, step: int, **more) -> None:
        patching = {"step_size": step, "close": 40, "a_t": 0.2, "a_h": 0.2}
        encode_slide(slide, out, patch_encoder, slide_encoder, patching=patching, keep="all", num_workers=0, **more)

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory, encode) -> Path:
    """A folder with `slides/` and the results of them; not to be changed (see `results`)."""
    folder = tmp_path_factory.mktemp("viewer")
    slides = folder / "slides"
    slides.mkdir()
    data = os.environ.get("EXAONEPATH_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
    real = Path(data, "slides", SLIDE_NAME)
    if real.is_file():
        shutil.copyfile(real, slides / SLIDE_NAME)
    else:
        make_slide(slides / SLIDE_NAME, 2220, 2967, fragments=2, holes=True, seed=3)
    make_slide(slides / "second.svs", 1600, 1200, fragments=2, holes=False, seed=4)
    encode(slides / SLIDE_NAME, folder, 224)
    encode(slides / "second.svs", folder, 128)
    return folder


@pytest.fixture
def results(made, tmp_path) -> Path:
    """A copy of the results and slides that a test may change. The results state where the copies of slides are not."""
    return Path(shutil.copytree(made, tmp_path / "results"))


FIRST, SECOND = key_of(Path(SLIDE_NAME).stem), key_of("second")


class Client:
    """Sends requests to a running viewer, as raw as the test wants them."""

    def __init__(self, port: int, token: str, service: Service) -> None:
        self.port, self.token, self.service = port, token, service

    def raw(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
        """(status, headers, body) of a path that is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, path: str, **query):
        """The same for a path behind the token."""
        return self.raw(f"/{self.token}/{path}{'?' + urlencode(query) if query else ''}")

    def json(self, path: str, **query):
        status, _, body = self.get(path, **query)
        assert status == 200, (path, status, body[:300])
        return json.loads(body)

    def put(self, path: str, value, content_type: str = "application/json"):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, _, answer = self.raw(f"/{self.token}/{path}", "PUT", body, content_type=content_type)
        return status, json.loads(answer)

    def slide(self, key: str = FIRST) -> dict:
        """What the server says about a slide."""
        return self.json(f"api/slides/{key}")

    def array(self, name: str, dtype, key: str = FIRST, /, **query):
        """An array of a slide."""
        version = query.pop("v", None) or self.slide(key)["version"]
        status, _, body = self.get(f"api/slides/{key}/{name}", v=version, **query)
        assert status == 200, (name, status, body[:300])
        return np.frombuffer(body, dtype)


@contextmanager
def running(out: Path, slides=None, **options):
    """A viewer of a folder, served by uvicorn in a thread."""
    found = cohort_inputs(slides).slides if slides else ()
    service = Service(Library(out, found), **options)
    token = new_token()
    with listen(0) as server:
        program = make_server(service, token)
        thread = threading.Thread(target=program.run, kwargs={"sockets": [server]}, daemon=True)
        thread.start()
        while not program.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Client(server.getsockname()[1], token, service)
        finally:
            program.should_exit = True
            thread.join(10)
            service.close()


@pytest.fixture(scope="session")
def view():
    """`with view(out, slides) as client`: a running viewer."""
    return running


@pytest.fixture(scope="module")
def client(made):
    """A running viewer of the results that no test changes."""
    with running(made, [made / "slides"]) as client:
        yield client
