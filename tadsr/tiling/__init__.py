"""Large images in bounded memory: layers computed in bands, with the whole's result."""

from tadsr.tiling.activations import Activation, ComputedActivation, StoredActivation
from tadsr.tiling.autoencoder import decode_in_bands, encode_in_bands
from tadsr.tiling.layers import Bands
from tadsr.tiling.memory import available_bytes, is_out_of_memory, used_bytes
from tadsr.tiling.spec import TileSpec
from tadsr.tiling.storage import BandStorage, PlannedStorage
from tadsr.tiling.unet import check_unet, predict_in_bands

__all__ = [
    "Activation",
    "BandStorage",
    "Bands",
    "ComputedActivation",
    "PlannedStorage",
    "StoredActivation",
    "TileSpec",
    "available_bytes",
    "check_unet",
    "decode_in_bands",
    "encode_in_bands",
    "is_out_of_memory",
    "predict_in_bands",
    "used_bytes",
]
