"""Every kind of step that a recipe can name. Adding one is a module here and a line below."""

from dlc_jax.stages import codes, encoder, generator, prior, prior_scores, probe, samples
from dlc_jax.stages.prior import distill

STAGES = {
    "encoder": encoder.make,
    "codes": codes.make,
    "probe": probe.make,
    "prior": prior.make,
    "distill": distill.make,
    "prior_scores": prior_scores.make,
    "generator": generator.make,
    "samples": samples.make,
}
