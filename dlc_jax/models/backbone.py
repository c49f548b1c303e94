"""The part of an encoder that turns images into tokens: what it offers, and which there are.

A backbone is a linen module with these attributes and methods; `vit.ViT` is one.

    image, width, depth     side in pixels it was made for; width of a token; number of blocks
    summary                 tokens that describe the whole image, and from which codes are made
    stride                  pixels on a side of the image behind one patch token
    __call__(images, *, masked=None, kept=None)
                            {"cls" [b d], "registers" [b r d], "patches" [b n d]}, where class
                            token and registers are the `summary`. `masked` [b n] are patches to
                            hide, `kept` the rows whose residuals drop path computes
                            (`drop_path.drop_subsets`)
    normalize(x)            the final norm, which heads share
    flops(image=None, drop_path=0.0)
                            model FLOPs of a forward pass of one image
    layer(name, shape)      layers between a parameter and the heads, for layer-wise decay: one
                            number, or one for each layer of a stacked parameter
    rules                   how its parameters are split, see `stage.Stage.rules`

To add one: its module, and a line below.
"""

from dlc_jax.models.vit import ViT

BACKBONES = {"vit": ViT}
