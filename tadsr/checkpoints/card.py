"""The model card that a published model carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tadsr.version import __version__

_CARD = """---
library_name: tadsr
pipeline_tag: image-to-image
license: {license_id}
{license_name}tags:
- super-resolution
- image-restoration
- tadsr
---

# {title}

A student for real-world image super-resolution in one diffusion step, in the native format of
[tadsr](https://arxiv.org/abs/2508.16557). Written by tadsr {version}.

```python
from PIL import Image
from tadsr import TADSRPipeline

pipe = TADSRPipeline.from_pretrained("{repo_id}")
pipe(Image.open("photo.jpg")).save("photo_x4.png")
```

`timestep=1` stays faithful to the photo, `timestep=900` makes it vivid.

| | |
|---|---|
{facts}
"""
_UNSTATED = "not stated: the weights' origin decides, ask their owner"
# What the hub knows by an identifier; anything else is "other" with a name.
_HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "openrail++")


def model_card(
    repo_id: str, *, num_parameters: Mapping[str, int], prompts: str, metadata: Mapping[str, Any]
) -> str:
    """Write a model card from what is known of a model."""
    licence = str(metadata.get("license") or _UNSTATED)
    is_known = licence in _HUB_LICENCES
    facts = {
        "licence": licence,
        **{name: f"{count / 1e6:.2f} M parameters" for name, count in num_parameters.items()},
        "prompts": prompts,
        **{name: str(value) for name, value in metadata.items() if name != "license"},
    }
    return _CARD.format(
        license_id=licence if is_known else "other",
        # As JSON, which is YAML too: a licence's text may hold any character.
        license_name="" if is_known else f"license_name: {json.dumps(licence)}\n",
        title=repo_id.rpartition("/")[2],
        version=__version__,
        repo_id=repo_id,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    )
