"""The source of people's own images, of whatever kind the place they are in is."""

import numpy as np

from dlc_jax.data.decoder import check_crop, check_image, decode_image
from dlc_jax.data.files import open_files
from dlc_jax.errors import UserError


class Images:
    """Images of a folder, an archive, IDX, Parquet or .npz files, ArrayRecord shards or TFDS, by
    name; see `files.scan`.

    Record i is {"image": uint8 [y, x, 3] or bytes, "index": i}, and if the images are in classes
    also "label", int, and "factors", int32 [1]. An image that cannot be used (damaged, far too
    large, too thin; see `decoder.decode_image`) raises; `sources.source` wraps this in `Resilient`,
    which puts another in its place.

    Args:
      split: "train", "validation" or "test".
      path: the place.
      image: side of the images in pixels, None for images as they are, or "encoded" for the bytes
        of the files, which `transforms.MultiCrop` decodes itself.
      crop: how they get there: "center" scales the short side and crops the center as ADM does,
        "stretch" scales both sides.
      validation: share held out where no folders say the split; see `listing.choose_rows`.
      limit: how many images may be unusable before the run stops.
      cache: folder for indexes and conversions; `~/.cache/dlc_jax` if None.
      cache_gb: the most that one conversion may take there, in 10^9 bytes.
      field: image column of Parquet, image feature of TFDS, array of .npz.

    Attributes:
      names: relative names.
      classes: names of the classes; [] if there are not at least two.

    Raises:
      UserError: for a place that is None, cannot be read, or has no images of this split.
    """

    def __init__(
        self,
        *,
        split,
        path,
        image,
        crop="center",
        validation=0.1,
        limit=100,
        cache=None,
        cache_gb=20.0,
        field="image",
    ):
        check_crop(crop)
        check_image(image)
        if path is None:
            raise UserError(
                "no images: say where they are, --config.data.path=PATH (a folder, an archive, …; "
                "see docs/data.md)"
            )
        self.image, self.crop, self.limit = image, crop, limit
        self._files = open_files(
            path, split=split, validation=validation, cache=cache, cache_gb=cache_gb, field=field
        )
        self.names = self._files.names
        self.classes = self._files.classes if len(self._files.classes) > 1 else []

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        data = self._files.read(index)
        if self.image != "encoded":
            data = decode_image(data, image=self.image, crop=self.crop)
        record = {"image": data, "index": index}
        if self.classes:
            label = self._files.label(index)
            record |= {"label": label, "factors": np.array([label], np.int32)}
        return record

    def content(self):
        """What the images are, wherever they lie: JSON."""
        return {"count": len(self), "content": self._files.digest()}
