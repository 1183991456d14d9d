"""Reading, encoding and storing at the same time: that they overlap, and that nobody can tell from the results."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from exaonepath import ExaonePathPatchEncoderConfig, ExaonePathPatchEncoderModel
from exaonepath.encoders.loading import randomize
from exaonepath.encoders.prepared import PreparedPatchEncoder
from exaonepath.errors import BackendError, DataFileError, OutputError, SettingsError
from exaonepath.files.features import read_features
from exaonepath.slides.features import encoding
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.partial import PartialFile
from exaonepath.slides.features.pipeline import encode_batches
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchReader
from exaonepath.slides.image import SlideImage

PATIENCE = 30  # seconds until a step that should have happened counts as one that never will
ALWAYS = 10**9


class Steps:
    """What the parts of a run wait for; a step that does not come is an error, not a hang."""

    def __init__(self) -> None:
        self._done: dict[tuple[str, int], threading.Event] = {}
        self._lock = threading.Lock()

    def _event(self, name: str, batch: int) -> threading.Event:
        with self._lock:
            return self._done.setdefault((name, batch), threading.Event())

    def reached(self, name: str, batch: int) -> None:
        self._event(name, batch).set()

    def wait_for(self, name: str, batch: int) -> None:
        assert self._event(name, batch).wait(PATIENCE), f"never: {name} batch {batch}"


def test_a_batch_is_read_and_another_stored_while_one_is_encoded(run, encoder, coords, monkeypatch):
    """Each batch's encoding ends only after the batch before is being stored and the batch after is being read, and
    neither of those goes on before the encoding has begun. One after another, this would never end."""
    size, steps = 8, Steps()
    last = (len(coords) - 1) // size
    place = {tuple(xy): i // size for i, xy in enumerate((coords + 16).tolist())}  # the reader leaves out the border
    read_rgb, append, forward = SlideImage.read_rgb, PartialFile.append, type(encoder).forward

    def reading(self, corner, *args):
        batch = place[corner]
        steps.reached("reading", batch)
        if batch:
            steps.wait_for("encoding", batch - 1)
        return read_rgb(self, corner, *args)

    def encoding_(self, x):
        batch = len(self.batches)
        steps.reached("encoding", batch)
        if batch:
            steps.wait_for("storing", batch - 1)
        if batch < last:
            steps.wait_for("reading", batch + 1)
        return forward(self, x)

    def storing(self, block):
        batch = int(block.indices[0]) // size
        steps.reached("storing", batch)
        if batch < last:
            steps.wait_for("encoding", batch + 1)
        append(self, block)

    plain = read_features(run().path)
    encoder.batches.clear()
    monkeypatch.setattr(SlideImage, "read_rgb", reading)
    monkeypatch.setattr(PartialFile, "append", storing)
    monkeypatch.setattr(type(encoder), "forward", encoding_)
    result = run(overwrite=True)
    assert result.n_features == len(coords)
    assert np.array_equal(read_features(result.path).features, plain.features)


def one_after_another(slide, coords, encoder, batch_size):
    """What a run stores, as a loop: [(indices, features)]."""
    module = encoder.eval()
    blocks = []
    for batch in PatchReader(slide, coords, 256, batch_size=batch_size, num_workers=0):
        with torch.inference_mode():
            values = module(encoding.normalise(torch.from_numpy(batch.images), PreprocessingConfig()))
        blocks.append((batch.indices, values.numpy()))
    return blocks


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_file_is_that_of_one_batch_after_another(tmp_path, slide, coords, encoder, bad_reads, workers, batch_size):
    coords = coords[:22]
    bad_reads.update({tuple(coords[i].tolist()): ALWAYS for i in (0, 5, *range(7, 14))})  # 7 to 13: a whole batch of 7
    reader = PatchReader(slide, coords, 256, batch_size=batch_size, num_workers=workers)
    encode = BatchEncoder(encoder.eval(), PreprocessingConfig(), torch.device("cpu"), torch.float32)
    partial = PartialFile(tmp_path / "part", {})
    encode_batches(reader, encode, partial, 0, len(coords))
    found = list(partial.blocks())
    expected = one_after_another(slide, coords, encoder, batch_size)
    partial.close()
    assert len(found) == len(expected) == -(-22 // batch_size)
    for block, (indices, features) in zip(found, expected, strict=True):
        assert np.array_equal(block.indices, indices)
        assert block.features.tobytes() == features.tobytes()
    assert [failure.index for block in found for failure in block.failures] == [0, 5, *range(7, 14)]


def test_progress_is_reported_by_the_caller_s_thread_after_each_stored_batch(run, coords, tmp_path):
    seen = []

    def progress(done, total):
        assert threading.current_thread() is threading.main_thread()
        part = tmp_path / ".out.h5.part"
        seen.append((done, part.stat().st_size))

    run(progress=progress)
    assert [done for done, _ in seen] == [*range(0, len(coords), 8), len(coords)]
    sizes = [size for _, size in seen]
    assert all(before < after for before, after in pairwise(sizes))
    # The batch after the reported one is not in the file yet: an error in `progress` leaves the same file as ever.
    assert len({b - a for a, b in pairwise(sizes[:-1])}) == 1


class Failing(torch.nn.Module):
    """Fails in the batch with this number, from 0."""

    def __init__(self, encoder, at, error):
        super().__init__()
        self.encoder, self.at, self.error, self.calls = encoder, at, error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at + 1:
            raise self.error
        return self.encoder(x)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("broken"), RuntimeError),
        (torch.OutOfMemoryError("tried to allocate"), BackendError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["error", "memory", "Ctrl-C"],
)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_what_ends_the_encoder_leaves_the_batches_before(run, encoder, at, error, raised):
    before = threading.active_count()
    seen = []
    with pytest.raises(raised):
        run(encoder=Failing(encoder, at, error), progress=lambda done, _: seen.append(done))
    assert threading.active_count() == before
    # Ctrl-C ends the run at once: the last batch is stored, but no longer reported.
    assert seen == [8 * i for i in range(at + 1)] or (
        raised is KeyboardInterrupt and seen == [8 * i for i in range(at)]
    )
    assert run().resumed_from == 8 * at


def test_the_error_of_the_earlier_batch_is_raised(run, encoder, monkeypatch):
    """Batch 1 cannot be stored, and batch 2 cannot be encoded: one after another, batch 2 would not have begun."""
    append, began = PartialFile.append, threading.Event()

    def full(self, block):
        if block.indices[0] == 8:
            began.wait(PATIENCE)
            raise OutputError("the disk is full")
        append(self, block)

    class Broken(Failing):
        def forward(self, x):
            if self.calls == self.at:
                began.set()
            return super().forward(x)

    monkeypatch.setattr(PartialFile, "append", full)
    with pytest.raises(OutputError, match="full"):
        run(encoder=Broken(encoder, 2, RuntimeError("broken")))
    monkeypatch.undo()
    assert run().resumed_from == 8


def test_an_error_of_the_reader_leaves_the_batches_before(run, encoder, coords, monkeypatch):
    read_rgb = SlideImage.read_rgb
    at = tuple((coords[20] + 16).tolist())

    def reading(self, corner, *args):
        if corner == at:
            raise DataFileError("no room")
        return read_rgb(self, corner, *args)

    monkeypatch.setattr(SlideImage, "read_rgb", reading)
    with pytest.raises(DataFileError, match="no room"):
        run()
    monkeypatch.undo()
    assert run().resumed_from == 16


def test_a_width_that_changes_is_an_error(run, encoder):
    class Changing(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return torch.zeros(len(x), 5 if self.calls < 3 else 6)

    with pytest.raises(SettingsError, match="returned 6 numbers a patch, and 5 before"):
        run(encoder=Changing())


def test_two_batches_at_most_are_between_reader_and_file(run, encoder, coords, monkeypatch):
    """A slow disk: the encoder waits, and memory is bounded."""
    append, stored, most = PartialFile.append, [], []

    def slow(self, block):
        time.sleep(0.02)
        append(self, block)
        stored.append(1)

    monkeypatch.setattr(PartialFile, "append", slow)
    encoder.register_forward_hook(lambda *_: most.append(len(encoder.batches) - len(stored)))
    run()
    assert max(most) <= 2


# On a card


def gpu(test):
    """A test that needs a card."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@pytest.fixture
def on_gpu(tmp_path, slide, coords, encoder):
    """`on_gpu(name, module=encoder)`: features of the first 60 patches in batches of 8, through the pipeline."""

    def encode(name, module=encoder, dtype=torch.float32, patches=60, **options):
        encode = BatchEncoder(module.eval(), PreprocessingConfig(), torch.device("cuda"), dtype, **options)
        assert encode.page_locked
        reader = PatchReader(slide, coords[:patches], 256, batch_size=8, num_workers=3, page_locked=True)
        partial = PartialFile(tmp_path / name, {})
        try:
            encode_batches(reader, encode, partial, 0, patches)
            return np.concatenate([block.features for block in partial.blocks()])
        finally:
            partial.close()

    return encode


class Slow(torch.nn.Module):
    """Adds work before and after the encoder, so that copies that are not waited for would show."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        out = self.encoder(x)
        torch.cuda._sleep(20_000_000)
        return out * 1.0


def serially(module, slide, coords, dtype):
    """The same on the card as a plain loop: copy, encode, copy back, one stream."""
    found = []
    for batch in PatchReader(slide, coords, 256, batch_size=8, num_workers=0):
        with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            values = module(encoding.normalise(torch.from_numpy(batch.images).cuda(), PreprocessingConfig()))
            found.append(values.float().cpu().numpy())
        torch.cuda.synchronize()
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slow", [False, True])
@gpu
def test_the_card_gives_the_bits_of_one_batch_after_another(on_gpu, slide, coords, encoder, dtype, slow):
    module = Slow(encoder) if slow else encoder
    found = on_gpu("part", module, dtype)
    assert found.tobytes() == serially(module, slide, coords[:60], dtype).tobytes()
    exact = np.concatenate([values for _, values in one_after_another(slide, coords[:60], encoder.cpu(), 8)])
    assert np.linalg.norm(found - exact) < 3 * 2**-9 * np.linalg.norm(exact)


@pytest.mark.parametrize("error", [RuntimeError("broken"), torch.OutOfMemoryError("full"), KeyboardInterrupt()])
@gpu
def test_what_ends_the_encoder_on_the_card_leaves_the_batches_before(run, encoder, error):
    before = threading.active_count()
    with pytest.raises((RuntimeError, BackendError, KeyboardInterrupt)):
        run(encoder=Failing(Slow(encoder), 3, error), device="cuda")
    assert threading.active_count() == before
    assert run(device="cuda").resumed_from == 24


@gpu
def test_a_batch_that_does_not_fit_on_the_card(run, encoder):
    class Hungry(Failing):
        def forward(self, x):
            if self.calls == 2:
                torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
            return super().forward(x)

    with pytest.raises(BackendError, match=r"a batch of 8 patches does not fit .* smaller batch size"):
        run(encoder=Hungry(encoder, ALWAYS, None), device="cuda")
    assert run(device="cuda").resumed_from == 16


# Compilation


@pytest.fixture
def eager_compiler(monkeypatch):
    """`torch.compile` without a compiler: the graph is recorded and run as it is. Yields the shapes that were seen."""
    shapes, original = [], torch.compile

    def backend(graph, inputs):
        shapes.append([tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and t.ndim == 4])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda module, **options: original(module, backend=backend, **options))
    yield shapes
    torch._dynamo.reset()


def test_one_batch_size_is_compiled(run, encoder, coords, bad_reads, eager_compiler, tmp_path):
    """The last batch and one with an unreadable patch are padded; their padding is not stored."""
    encoder.forward = lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1) @ encoder.mix
    bad_reads[tuple(coords[9].tolist())] = ALWAYS
    expected = read_features(run(out_h5=tmp_path / "plain.h5").path)
    result = run(compile=True)
    stored = read_features(result.path)
    assert eager_compiler == [[(8, 3, 224, 224)]]
    assert stored.attrs["compiled"]
    assert not expected.attrs["compiled"]
    assert np.allclose(stored.features, expected.features, rtol=0, atol=1e-5)
    assert run().reused


def test_a_compiler_that_fails_says_what_to_do(run, encoder, monkeypatch):
    original = torch.compile

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda module, **options: original(module, backend=backend, **options))
    with pytest.raises(BackendError, match="cannot be compiled; run it without compilation"):
        run(compile=True)
    torch._dynamo.reset()


def test_an_encoder_of_many_slides_is_compiled_once(monkeypatch):
    """And again where its weights were changed."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: made.append(module) or module)
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig(img_size=28)).eval()
    config = PreprocessingConfig(resize=28, crop=28)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)

    def encode(dtype=torch.float32):
        return (
            BatchEncoder(model, config, torch.device("cpu"), dtype, batch_size=4, compile=True).start(images).result()
        )

    first = encode()
    assert np.array_equal(encode(), first)
    assert len(made) == 1
    with torch.no_grad():
        model.patch_encoder.backbone.norm.bias += 1
    assert np.allclose(encode(), first + 1, rtol=0, atol=1e-4)
    assert len(made) == 2
    assert encode(torch.bfloat16).dtype == np.float32
    assert len(made) == 3


@gpu
def test_the_compiled_encoder_on_the_card():
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    randomize(model, 0)
    images = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), np.uint8)
    found = {}
    for name, dtype, options in (
        ("exact", torch.float32, {}), ("half", torch.bfloat16, {}), ("compiled", torch.bfloat16, {"compile": True}),
    ):  # fmt: skip
        encode = BatchEncoder(model, PreprocessingConfig(), torch.device("cuda"), dtype, batch_size=8, **options)
        found[name] = encode.start(images).result()
        if options:
            assert np.allclose(encode.start(images[:3]).result(), found[name][:3], rtol=0, atol=1e-5)
    errors = {name: np.linalg.norm(values - found["exact"]) for name, values in found.items()}
    assert errors["compiled"] <= 1.25 * errors["half"]
    assert errors["half"] <= 3e-2 * np.linalg.norm(found["exact"])


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_patch_encoder_on_the_card_gives_the_bits_of_one_batch_after_another(on_gpu, slide, coords, dtype):
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    randomize(model, 0)
    found = on_gpu("part", model, dtype)
    call = model if dtype == torch.float32 else PreparedPatchEncoder(model, dtype)
    assert found.tobytes() == serially(call, slide, coords[:60], torch.float32).tobytes()
