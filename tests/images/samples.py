"""What the tests of this room share: a profile, a PNG's chunk, and ways through the library."""

import struct
import zlib

from PIL import ImageCms

from tadsr.images import decode_image, encode_image

SRGB_ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


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
