"""What the tests of this room share: a profile, a PNG's chunk, and ways through the library."""

import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from tadsr.images import decode_image, encode_image

SRGB_ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(mode="RGB", width=24, height=16, seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    bands = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(bands[..., 0] if channels == 1 else bands)


def png_chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def round_trip(image, output_type=None):
    decoded = decode_image(image)
    return encode_image(decoded.rgb, decoded.alpha, decoded, output_type)


def enlarged(image):
    """Double an image's sides."""
    decoded = decode_image(image)
    rgb = decoded.rgb.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return encode_image(rgb, decoded.alpha, decoded)
