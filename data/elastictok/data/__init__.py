"""Folders of pictures and clips to packed uint8 blocks. NumPy in, NumPy out: no jax, no models."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.data", "beartype.beartype")

from elastictok.data._cache import Cache
from elastictok.data._clip import MAX_BYTES
from elastictok.data._crop import AbstractCrop, CentreCrop, RandomCrop, Window, WorkingSize
from elastictok.data._dataset import BatchIterator, PackedDataset, load_clips, load_folders
from elastictok.data._errors import MediaError, MediaWarning
from elastictok.data._find import CLIPS, PICTURES, Media, find_media
from elastictok.data._media import MediaReader, read_media
from elastictok.data._picture import MAX_PIXELS
from elastictok.data._report import Damaged, Report, Skipped
from elastictok.data._source import (
    AbstractItem,
    AbstractSource,
    ClipFiles,
    MemorySource,
    PictureFiles,
    Request,
)
from elastictok.data._types import Batch, Clip, Geometry
from elastictok.data._write import write_clip, write_picture

__all__ = [
    "CLIPS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "PICTURES",
    "AbstractCrop",
    "AbstractItem",
    "AbstractSource",
    "Batch",
    "BatchIterator",
    "Cache",
    "CentreCrop",
    "Clip",
    "ClipFiles",
    "Damaged",
    "Geometry",
    "Media",
    "MediaError",
    "MediaReader",
    "MediaWarning",
    "MemorySource",
    "PackedDataset",
    "PictureFiles",
    "RandomCrop",
    "Report",
    "Request",
    "Skipped",
    "Window",
    "WorkingSize",
    "find_media",
    "load_clips",
    "load_folders",
    "read_media",
    "write_clip",
    "write_picture",
]
