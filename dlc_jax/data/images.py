"""The source of people's own images, of whatever kind the place they are in is."""

import numpy as np

from dlc_jax.data.decoder import check_crop, check_image, decode_image
from dlc_jax.data.files import Place
from dlc_jax.errors import UserError


class Images:
    """Images of a folder, an archive, IDX, Parquet or .npz files, ArrayRecord shards or TFDS.

    Record i is {"image": uint8 [y, x, 3] or bytes, "index": i}, and if the images are in classes
    also "label", int, and "factors", int32 [1]. An image that cannot be used (damaged, far too
    large, too thin; see `decoder.decode_image`) raises; `sources.source` wraps this in `Resilient`,
    which puts another in its place.

    Args:
      split: "train", "validation" or "test".
      path: place of the images, see `files.scan`. None is refused.
      image: side of the images in pixels. None leaves them as they are; "encoded" gives the bytes
        of the files, which `transforms.MultiCrop` decodes itself.
      crop: how images get to that size, "center" or "stretch". "center" scales the short side and
        crops the center as ADM does; "stretch" scales both sides.
      validation: share held out where no folders say the split. See `naming.choose_rows`.
      limit: how many images may be unusable before the run stops.
      cache: folder for indexes and conversions, `~/.cache/dlc_jax` if None.
      cache_gb: the most that one conversion may take in the cache, in 10^9 bytes.
      field: image column of Parquet, image feature of TFDS, or array of .npz.
      place: the `files.Place` of these options, if it is open already.

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
        path: str | None = None,
        image: int | str | None = 32,
        crop: str = "center",
        validation: float = 0.1,
        limit: int = 100,
        cache: str | None = None,
        cache_gb: float = 20.0,
        field: str = "image",
        place=None,
    ):
        check_crop(crop)
        check_image(image)
        if path is None:
            raise UserError(
                "no images: say where they are, --config.data.path=PATH (a folder, an archive, …; "
                "see docs/data.md)"
            )
        self.image, self.crop, self.limit = image, crop, limit
        place = place or Place(path, cache=cache, cache_gb=cache_gb, field=field)
        self._files = place.images(split, validation=validation)
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

    def close(self):
        """Closes the files that are open. Reading opens them again."""
        self._files.close()

    def content(self):
        """What the images are, wherever they lie: JSON."""
        return {"count": len(self), "content": self._files.digest()}
