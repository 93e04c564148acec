"""Callers are told of progress a few times a second, however small the pieces are."""

import time
from itertools import pairwise

from PIL import Image

from tadsr import TADSRPipeline, TileSpec
from tadsr.onestep.tasks import share_of
from tadsr.progress import INTERVAL_S, paced


def test_shares_are_told_now_and_then_and_the_end_always():
    now, told = 0.0, []
    tell = paced(lambda share: told.append((now, share)), clock=lambda: now)
    for number in range(1, 1001):
        now += INTERVAL_S / 10
        tell(number / 1000)
    assert told[0][1] == 0.001
    assert told[-1][1] == 1
    assert 90 <= len(told) <= 102


def test_a_slow_listener_is_left_time():
    now, told = 0.0, 0

    def listen(share):
        nonlocal now, told
        now, told = now + 9, told + 1

    tell = paced(listen, clock=lambda: now)
    for _ in range(100):
        now += INTERVAL_S / 10
        tell(0.5)
    assert told <= 11


def test_images_of_a_list_share_the_whole():
    told = []
    for number in range(2):
        share_of(told.append, number, 2)(0.5)
    assert told == [0.25, 0.75]
    assert share_of(None, 0, 1) is None


def test_a_photo_in_hundreds_of_pieces_is_told_at_intervals():
    times = []
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    options = {"process_size": 0, "tiling": TileSpec(band_bytes=2**18)}
    photo = Image.new("RGB", (90, 60), "teal")
    pipe(photo, 300, **options, progress=lambda share: times.append(time.monotonic()))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(gap >= INTERVAL_S for gap in gaps[:-1])  # the end is told whenever it comes
