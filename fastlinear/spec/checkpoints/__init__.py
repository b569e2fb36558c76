"""What the tensors of a quantized linear layer stand for, as other packages' checkpoints have them, in plain torch: a
file a package.

Each scheme takes the tensors of one layer by the names they have there, and gives its weight [N, K]; what does not go
together shows in `shape`, which says so with ValueError before anything is unpacked. W = scale * (q - zero) becomes
scale * number + offset: numbers are counted from the middle of the codes, and there is an offset only where a zero
point is another than that; it is in fp32, which holds it exactly.
"""

from __future__ import annotations

from fastlinear.spec.checkpoints import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, mxfp4
from fastlinear.spec.checkpoints.scheme import Config, Mixture, Scheme

# By the `quant_method` of a folder's quantization_config.
SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "gptq": gptq.SCHEMES,
    "awq": awq.SCHEMES,
    "compressed-tensors": compressed_tensors.SCHEMES,
    "fp8": fp8.SCHEMES,
    "bitsandbytes": bitsandbytes.SCHEMES,
    "hqq": hqq.SCHEMES,
    "mxfp4": (),  # its linear layers are floats
    "auto-round": (*gptq.SCHEMES, *awq.SCHEMES),
}
# Of AutoRound, which packs as others do, the packings and whose they are.
_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
MIXTURES: dict[str, Mixture] = {"mxfp4": mxfp4.MIXTURE, "fp8": fp8.MIXTURE}


def schemes_of(method: str, config: Config) -> tuple[Scheme, ...]:
    """Those of a method in SCHEMES; ValueError where the config tells a variant that is not read."""
    if method == "compressed-tensors":
        compressed_tensors.check_format(config)
    if method != "auto-round":
        return SCHEMES[method]
    packing = config.get("packing_format")
    if packing not in _PACKINGS:
        raise ValueError(f"its packing_format is {packing!r}, and read are {', '.join(_PACKINGS)}")
    return SCHEMES[_PACKINGS[packing]]
