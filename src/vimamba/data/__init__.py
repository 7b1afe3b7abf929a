"""Images with their classes: where they come from, how they are decoded, how they become tensors."""

from vimamba.data.decode import DecodeError, decode_image
from vimamba.data.sources import ImageData, open_data
from vimamba.data.transforms import AugmentOptions, Preprocessing

__all__ = ["AugmentOptions", "DecodeError", "ImageData", "Preprocessing", "decode_image", "open_data"]
