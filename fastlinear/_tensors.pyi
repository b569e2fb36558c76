import torch

FORMATS: dict[torch.dtype, str]  # of floating x, biases, parameters
SCALES: dict[torch.dtype, str]  # of scales and offsets of weights in groups
SUPER: int  # k that share the upper level of scales of two
PACKED: dict[str, torch.dtype]  # of weights, by the names of their formats, but for those in groups
GROUPED: dict[str, torch.dtype]  # of codes of weights in groups, likewise
