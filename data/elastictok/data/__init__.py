"""Folders of pictures and clips to packed uint8 blocks. NumPy in, NumPy out: no jax, no models."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.data", "beartype.beartype")

from elastictok.data._beam import build_with_beam
from elastictok.data._build import Built, Progress, build
from elastictok.data._built import INDEX, BuiltDataset, Records
from elastictok.data._cache import Cache
from elastictok.data._clip import MAX_BYTES
from elastictok.data._crop import (
    AbstractCrop,
    CentreCrop,
    RandomCrop,
    Window,
    WorkingSize,
    aspect_buckets,
)
from elastictok.data._dataset import (
    BatchIterator,
    Component,
    PackedDataset,
    load_clips,
    load_folders,
)
from elastictok.data._document import AbstractExcerpt, RandomStretch, WholeClip
from elastictok.data._errors import MediaError, MediaWarning
from elastictok.data._find import CLIPS, PICTURES, Media, find_media
from elastictok.data._media import MediaReader, read_media
from elastictok.data._picture import MAX_PIXELS
from elastictok.data._prepare import MAX_RECORD_BYTES, Encoding, Listed, make_record
from elastictok.data._record import Record
from elastictok.data._report import Damaged, Report, Skipped, Used
from elastictok.data._show import contact_sheet, describe_data
from elastictok.data._source import (
    AbstractItem,
    AbstractLibrary,
    AbstractSource,
    Chain,
    ClipSource,
    Files,
    MemorySource,
    PictureSource,
    Request,
)
from elastictok.data._stored import Blob, Stored
from elastictok.data._tokenize import Encoder, Tokenized, tokenize
from elastictok.data._tokens import TOKEN_INDEX, TokenDataset, TokenRecord, load_tokens
from elastictok.data._types import Batch, Clip, Geometry
from elastictok.data._write import write_clip, write_picture

__all__ = [
    "CLIPS",
    "INDEX",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_RECORD_BYTES",
    "PICTURES",
    "TOKEN_INDEX",
    "AbstractCrop",
    "AbstractExcerpt",
    "AbstractItem",
    "AbstractLibrary",
    "AbstractSource",
    "Batch",
    "BatchIterator",
    "Blob",
    "Built",
    "BuiltDataset",
    "Cache",
    "CentreCrop",
    "Chain",
    "Clip",
    "ClipSource",
    "Component",
    "Damaged",
    "Encoder",
    "Encoding",
    "Files",
    "Geometry",
    "Listed",
    "Media",
    "MediaError",
    "MediaReader",
    "MediaWarning",
    "MemorySource",
    "PackedDataset",
    "PictureSource",
    "Progress",
    "RandomCrop",
    "RandomStretch",
    "Record",
    "Records",
    "Report",
    "Request",
    "Skipped",
    "Stored",
    "TokenDataset",
    "TokenRecord",
    "Tokenized",
    "Used",
    "WholeClip",
    "Window",
    "WorkingSize",
    "aspect_buckets",
    "build",
    "build_with_beam",
    "contact_sheet",
    "describe_data",
    "find_media",
    "load_clips",
    "load_folders",
    "load_tokens",
    "make_record",
    "read_media",
    "tokenize",
    "write_clip",
    "write_picture",
]
