"""The folder as a pipeline of diffusers.

    DiffusionPipeline.from_pretrained("DIR", custom_pipeline="DIR", trust_remote_code=True)(count=4)

draws images; its attribute `dlc` is the `DLCPipeline`, with all else that it does.
"""

from pathlib import Path

from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from .modeling_dlc import DLCPipeline


class DLC(DiffusionPipeline):
    def __init__(self):
        super().__init__()
        self._dlc = None

    @property
    def dlc(self):
        if self._dlc is None:
            place = self.config._name_or_path
            if not Path(place).is_dir():  # of a hub
                from huggingface_hub import snapshot_download

                place = snapshot_download(place)
            self._dlc = DLCPipeline.from_pretrained(place)
        return self._dlc

    def __call__(self, count=1, codes=None, seed=0, **how):
        """Images of codes [b, l], or `count` new ones; `how` is as in `DLCPipeline.decode`."""
        if codes is None:
            drawn = self.dlc.sample(count, seed=seed, **how)
        else:
            drawn = self.dlc.decode(codes, seed=seed, **how)
        return ImagePipelineOutput(images=[Image.fromarray(each) for each in drawn.cpu().numpy()])
