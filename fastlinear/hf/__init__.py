"""The front door for transformers: `from_pretrained(..., quantization_config=FastLinearConfig(...))`, and generation on
recorded graphs by `prepare_generation(model)`.

It also gives transformers' mixtures of experts an implementation: `from_pretrained(...,
experts_implementation="fastlinear")` runs the experts alone on packed weights, without a conversion.

Import it by its name; `import fastlinear` does not import transformers.
"""

import fastlinear._extras as _extras

_extras.need("transformers", "fastlinear.hf")

from fastlinear.hf.generation import prepare_generation  # noqa: E402
from fastlinear.hf.loading import FastLinearConfig  # noqa: E402

__all__ = ["FastLinearConfig", "prepare_generation"]
