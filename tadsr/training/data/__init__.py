"""Photographs to train on: from folders, lists and streams, degraded on the fly."""

from tadsr.training.data.batch import Batch, upsample_lq
from tadsr.training.data.data_config import DataConfig
from tadsr.training.data.opening import TrainingData, open_data
from tadsr.training.data.photos import find_photos

__all__ = [
    "Batch",
    "DataConfig",
    "TrainingData",
    "find_photos",
    "open_data",
    "upsample_lq",
]
