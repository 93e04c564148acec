import os
import threading

import pytest
from PIL import Image

from tadsr.demo.actions import Models
from tadsr.images import limits
from tadsr.kernels import backends
from tadsr.locks import Lock
from tadsr.onestep import graphs

LIFTED = 2**40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    "hold",
    [
        lambda: limits.pillow_opens(LIFTED),
        lambda: backends._probing,
        lambda: graphs._recording,
        lambda: Models([], str)._lock,
    ],
    ids=["Pillow's limit", "kernels are tried", "graphs are recorded", "models are loaded"],
)
def test_a_forked_process_waits_for_no_thread_of_its_parent(hold):
    own, is_held, may_end = Image.MAX_IMAGE_PIXELS, threading.Event(), threading.Event()
    context = hold()
    lock = context if isinstance(context, Lock) else limits._lifting

    def keep():
        with context:
            is_held.set()
            may_end.wait()

    thread = threading.Thread(target=keep)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        is_free = lock.acquire(timeout=20)
        os._exit(0 if is_free and own == Image.MAX_IMAGE_PIXELS else 1)
    status = os.waitpid(child, 0)[1]
    may_end.set()
    thread.join()
    assert status == 0
