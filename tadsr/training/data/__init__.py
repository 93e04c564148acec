"""Photographs to train on: from folders, lists and streams, degraded on the fly."""

from tadsr.image_files import find_images as find_photos
from tadsr.training.data.opening import TrainingData, open_data
from tadsr.training.data.restored import Restorer, load_restorer
from tadsr.training.data.samples import Batch, upsample_lq
from tadsr.training.training_config import DataConfig, RestoredConfig
