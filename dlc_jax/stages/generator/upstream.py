"""What a generator reads of the steps before it: images, codes, latents, and the encoder."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from dlc_jax import checkpoint, parallel, recipe
from dlc_jax.data import latents
from dlc_jax.data.codes import CodeStore, WithCodes
from dlc_jax.data.sources import DataSet
from dlc_jax.errors import UserError
from dlc_jax.networks import Networks
from dlc_jax.networks.autoencoder import AutoencoderNetwork


class Upstream:
    """The steps before a generator, opened when they are asked for.

    Attributes:
      data: the images.
      teacher: (frozen, images uint8 [b, y, x, 3]) -> the encoder's patches [b, m, d], or None where
        none are aligned.
      teacher_flops: model FLOPs of that, of one image.
      frozen_spec: shapes of the encoder's parameters.
    """

    def __init__(self, config, workdir: Path, step: str, section):
        self._config, self._workdir, self._step, self._section = config, workdir, step, section
        self.data = DataSet(**config.data)
        self.teacher, self.teacher_flops, self.frozen_spec = None, 0.0, {}
        if section.objective.align:
            if not section.codes:
                raise UserError(
                    f"{step}.objective.align={section.objective.align} needs the encoder of a "
                    f"codes step, and {step}.codes is ''"
                )
            network, width = self._encoder, section.model.align_width
            if network.model.backbone.width != width:
                raise UserError(
                    f"{step}.model.align_width={width}, but patches of {network.step} have width "
                    f"{network.model.backbone.width}; set both alike"
                )
            self.teacher = _teacher(network)
            self.teacher_flops = network.model.backbone.flops(network.size)
            self.frozen_spec = {"encoder": network.shapes}

    def store(self, split: str) -> CodeStore:
        """The store of a split, checked: it has what the model reads, and latents if it draws them.

        Raises:
          UserError: none, other ones, embeddings of another width or latents of another
            autoencoder.
        """
        section, model = self._section, self._section.model
        place = recipe.place(self._config, self._workdir, section.codes)
        found = CodeStore(place / split)
        if model.positions:
            shape = {"positions": model.positions, "values": model.values}
            found = found.checked(**shape, where=self._step)
        if model.embedding:
            found.check_embedding(model.embedding, self._step)
        if section.latents:
            self._autoencoder.check(found)
        return found

    def source(self, split: str, fields):
        """Records with what training reads: of the store alone, where images are not looked at."""
        if not self._section.codes:
            return self.data.source(split)
        store = self.store(split)
        if "image" in fields or "label" in fields:
            identity = self.data.identity(split)
            return WithCodes(self.data.source(split), store, identity=identity)
        store.check_source(self.data.identity(split))
        return store

    def transform(self):
        """What the loader makes of a record: a view, and its latent drawn anew in every epoch."""
        section = self._section
        if not section.latents:
            flips = section.codes and self._config[section.codes].flip
            return latents.view if flips else None
        network = self._autoencoder
        if not section.normalize:
            return latents.Drawn(scaling=network.scaling)
        found = network.normalizer(self.store("train"), section.process.deviation)
        return latents.Drawn(scaling=network.scaling, **found._asdict())

    def load_frozen(self, mesh):
        """The encoder's average, where patches are aligned."""
        if not self.frozen_spec:
            return {}
        how = {"rules": self._section.model.rules, "strict": False}
        shardings = parallel.shardings(self.frozen_spec, mesh, **how)
        abstract = parallel.abstract(self.frozen_spec, shardings)
        trained = recipe.trained(self._config, self._workdir, self._encoder.step)
        loaded = checkpoint.load_params(trained / "checkpoints", abstract["encoder"])
        return {"encoder": loaded}

    @functools.cached_property
    def _autoencoder(self):
        name = self._config[self._section.codes].autoencoder
        return AutoencoderNetwork(self._config, name, parallel.make_mesh())

    @functools.cached_property
    def _encoder(self):
        name = self._config[self._section.codes].encoder
        mesh = parallel.make_mesh()
        networks = Networks(self._config, self._workdir, mesh, batch=parallel.shares(mesh))
        return networks[name]


def _teacher(network):
    def patches(frozen, images):
        if images.shape[1] != network.size:
            shape = (len(images), network.size, network.size, 3)
            images = jax.image.resize(images.astype(jnp.float32), shape, "cubic")
            images = jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)
        return network.patches(frozen["encoder"], images)

    return patches
