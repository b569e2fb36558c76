"""torch.compile(model, backend="fastlinear"): Dynamo's graph on fast linear layers, without a compiler.

capture reads the graph, patterns say what may become of its nodes, rewrite does it, operators are what then runs.
"""

from fastlinear.graph.backend import backend

__all__ = ["backend"]
