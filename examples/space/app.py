"""A Hugging Face Space: the library's demo with limits for a free machine."""

import torch

from tadsr import TADSRPipeline
from tadsr.demo.actions import DemoLimits, Models
from tadsr.demo.page import build

MODELS = ["tadsr-tiny"]
"""Built-in names and hub ids that visitors choose from."""
LIMITS = DemoLimits(max_upload_bytes=20_000_000, max_output_pixels=12_000_000)


def load(name: str) -> TADSRPipeline:
    """Load a model onto the Space's device."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return TADSRPipeline.from_pretrained(name, torch_dtype=dtype).to(device)


demo = build(Models(MODELS, load), LIMITS)

if __name__ == "__main__":
    demo.launch(max_file_size=LIMITS.max_upload_bytes)
