"""Images: which files are rows (`find`), and what the network sees of each (`read`).

Needs Pillow and numpy only, so that drawing a picture beside its maps never pays for torch.
"""

from bbx.images.decoders import Decoders, DecodeSettings, cell_dtype, decode_one
from bbx.images.find import find_images
from bbx.images.read import MAX_PIXELS, prepare, read_image
from bbx.images.rows import ImageList
from bbx.images.source import digest_file

__all__ = [
    "MAX_PIXELS",
    "DecodeSettings",
    "Decoders",
    "ImageList",
    "cell_dtype",
    "decode_one",
    "digest_file",
    "find_images",
    "prepare",
    "read_image",
]
