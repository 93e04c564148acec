"""What a type checker knows of the public names; checked by mypy, never run."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import tadsr
from tadsr import ArrayImage, TADSRPipeline

pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
assert_type(pipe, TADSRPipeline)
assert_type(pipe.to("cpu"), TADSRPipeline)
photo: Image.Image = Image.new("RGB", (8, 8))
pixels = np.zeros((8, 8, 3), np.uint8)
scan = ArrayImage(pixels)

assert_type(pipe(photo, 200), Image.Image)
assert_type(pipe(scan, timestep=200, scale=2), ArrayImage)
assert_type(pipe(photo), Image.Image)
assert_type(pipe(photo, None), Image.Image)
assert_type(pipe(pixels, color_fix="wavelet"), np.ndarray)
assert_type(pipe(pixels, color_fix=None), np.ndarray)
assert_type(pipe(Tensor()), Tensor)
assert_type(pipe.sweep(photo, [1, 900]), list[Any])
assert_type(pipe([photo, photo], [1, 900]), list[Image.Image])
assert_type(pipe([Tensor()]), list[Tensor])
assert_type(pipe(scan, output_type="pil"), Image.Image)
assert_type(pipe(photo, output_type="np"), np.ndarray)
assert_type(pipe(photo, output_type="pt"), Tensor)
assert_type(pipe(Tensor(), output_type="pt"), Tensor)
assert_type(pipe([scan], output_type="pil"), list[Image.Image])
assert_type(pipe((photo, photo), [1, 900], output_type="np"), list[np.ndarray])
assert_type(pipe([photo], output_type="pt"), list[Tensor])
assert_type(pipe([Tensor()], output_type="pil"), list[Image.Image])
assert_type(pipe(Tensor(), output_type="pil"), Any)  # a list if it is a batch
assert_type(pipe(photo, return_dict=False), Any)
assert_type(tadsr.read_image("photo.jpg"), Image.Image | ArrayImage)
pipe(photo, colour_fix="adain")  # type: ignore[call-overload]
