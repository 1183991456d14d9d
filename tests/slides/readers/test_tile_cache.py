"""The cache of decoded tiles: bounded, one decoding a tile, and no thread that waits for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from exaonepath.slides.features import reader as patch_reader
from exaonepath.slides.features.reader import PatchReader
from exaonepath.slides.image import SlideImage
from exaonepath.slides.readers.tile_cache import TileCache


def tile(size=100):
    return np.zeros(size, np.uint8)


def test_what_was_not_used_for_longest_is_dropped():
    cache = TileCache(300)
    decoded = []

    def get(key):
        return cache.get(key, lambda: (decoded.append(key), tile())[1])

    for key in "abcabdab":
        get(key)
    assert decoded == list("abcd")
    get("c")  # dropped for d
    assert decoded == list("abcdc")
    assert cache.nbytes == cache.peak == 300


def test_one_tile_is_kept_however_large():
    cache = TileCache(50)
    assert cache.get("a", tile) is cache.get("a", pytest.fail)
    cache.get("b", tile)
    assert cache.nbytes == 100


def test_a_smaller_capacity_holds_at_once():
    cache = TileCache(1000)
    for key in range(10):
        cache.get(key, tile)
    cache.set_capacity(200)
    assert cache.nbytes == 200


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_that_want_one_tile_decode_it_once(threads):
    cache = TileCache(1 << 20)
    together = threading.Barrier(threads)
    calls = []

    def decode():
        calls.append(1)
        time.sleep(0.05)
        return tile()

    def work(_):
        together.wait()
        return cache.get("a", decode)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, range(threads)))
    assert len(calls) == 1
    assert all(one is found[0] for one in found)


def test_an_error_is_raised_in_each_thread_and_not_kept():
    cache = TileCache(1 << 20)
    together = threading.Barrier(4)
    fail = [True]

    def decode():
        time.sleep(0.02)
        if fail[0]:
            raise OSError("broken")
        return tile()

    def work(_):
        together.wait()
        with pytest.raises(OSError, match="broken"):
            cache.get("a", decode)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    fail[0] = False
    assert cache.get("a", decode) is not None


def test_other_tiles_do_not_wait():
    cache = TileCache(1 << 20)
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.get, "slow", lambda: (release.wait(10), tile())[1])
        assert cache.get("fast", tile) is not None
        assert not slow.done()
        release.set()
        slow.result()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_pass_over_patches_decodes_each_tile_once(write, pixels, workers):
    """Also where the patches do not fall together with tiles, and whatever thread reads them."""
    path = write("a.tif", pixels, compression="jpeg", tile=(64, 64))
    coords = np.array([(x, y) for y in range(10, 400, 100) for x in range(10, 580, 100)], np.int32)
    with SlideImage(path) as slide:
        tiles = slide._reader.tiles
        tiles.cache.set_capacity(0)
        before = tiles.cache.decoded
        for _ in PatchReader(slide, coords, 100, num_workers=workers, batch_size=4):
            pass
        # 11 x 9 tiles; the patches lie on columns 0 to 9 (640 of 700 pixels) and rows 0 to 6.
        assert tiles.cache.decoded - before <= 10 * 7
        assert tiles.cache.peak <= patch_reader._CACHE_BYTES


def test_the_cache_of_a_pass_holds_its_rows_of_tiles(write, pixels):
    path = write("a.tif", pixels, compression="jpeg", tile=(64, 64))
    with SlideImage(path) as slide:
        before = slide.cache_bytes
        with slide.tile_cache(64 * 64 * 3 * 11 + 11 * 256):
            for y in (0, 64, 0, 64):
                slide.read_rgb((0, y), 0, (700, 64))
            assert slide._reader.tiles.cache.nbytes <= 64 * 64 * 3 * 11 + 11 * 256
        assert slide.cache_bytes == before
