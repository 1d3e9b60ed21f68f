"""Images: which files are rows (`find`), and what the network sees of each (`read`).

Needs Pillow and numpy only, so that drawing a picture beside its maps never pays for torch.
"""

from bbx.images.find import find_images
from bbx.images.read import prepare, read_image
from bbx.images.rows import ImageList

__all__ = ["ImageList", "find_images", "prepare", "read_image"]
