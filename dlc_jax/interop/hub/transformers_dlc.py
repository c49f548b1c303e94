"""The encoder as a model of transformers, which `auto_map` in its config.json names.

    AutoModel.from_pretrained("DIR", subfolder="encoder", trust_remote_code=True)(pixel_values)

gives logits of codes [b, l, v]; without trust_remote_code it is the backbone alone.
"""

from transformers import Dinov2Config, Dinov2WithRegistersConfig, PreTrainedModel

from .modeling_dlc import DLCEncoder


class DLCDinov2Model(PreTrainedModel):
    config_class = Dinov2Config

    def __init__(self, config):
        super().__init__(config)
        made = DLCEncoder({"dlc": config.dlc})
        for name, part in made.named_children():
            self.add_module(name, part)
        if hasattr(made, "sem_bias"):
            self.sem_bias = made.sem_bias
        self.c, self.length, self.values = made.c, made.length, made.values
        self.post_init()

    def _init_weights(self, module):
        pass

    forward, _positions = DLCEncoder.forward, DLCEncoder._positions


class DLCDinov2WithRegistersModel(DLCDinov2Model):
    config_class = Dinov2WithRegistersConfig
