"""What became of each node of a graph, for the report."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fastlinear.graph.capture import op_of
from fastlinear.graph.work import work_of
from fastlinear.model.rows import NodeReport


class Story:
    """The nodes of a graph as Dynamo made it, in its order."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        calls = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
        self._of = {node: NodeReport(node.name, op_of(node) or str(node.op), work=work_of(node)) for node in calls}
        self.nodes = list(self._of.values())
        self._parts: dict[fx.Node, list[NodeReport]] = {}

    def tell(self, node: fx.Node, outcome: str, why: str, into: fx.Node | None = None) -> None:
        """Notes what became of a node; of all of them where it is a composite that goes on into something else."""
        told = self._of[node]
        told.outcome, told.why = outcome, why
        if into is not None:
            self._parts.setdefault(into, []).append(told)
            if told.work:
                self._of[into].work, told.work = self._of[into].work + told.work, 0
        elif outcome == "fused":
            for part in self._parts.get(node, ()):
                part.why = why

    def row(self, node: fx.Node) -> NodeReport:
        """The report's row of a node, for those who learn only in calls what becomes of it."""
        return self._of[node]

    def add(self, node: fx.Node, parts: Iterable[fx.Node]) -> None:
        """Goes on with the nodes that were put in the place of one."""
        for part in parts:
            self._of[part] = NodeReport(f"{node.name}.{part.name}", op_of(part), work=work_of(part))
            self.nodes.append(self._of[part])

    def rename(self, old: fx.Node, new: fx.Node, why: str) -> None:
        """`new` stands where `old` stood."""
        told = self._of[new] = self._of.pop(old)
        told.why = why
