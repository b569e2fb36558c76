"""The rewriting of one graph: what is idle goes, composites become one call, products run on packed weights and absorb
what follows them, siblings become one product.

Each change is made only where the graph proves it: what is absorbed has one reader, which is its absorber, and no node
between the two writes to a tensor or changes how later nodes run.
"""

from __future__ import annotations

import bisect
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import fastlinear.graph.attention as attention
import fastlinear.graph.caches as caches
import fastlinear.graph.columns as columns
import fastlinear.graph.layouts as layouts
import fastlinear.graph.letters as letters
import fastlinear.graph.masks as masks
import fastlinear.graph.mixtures as mixtures
import fastlinear.graph.norms as norms
import fastlinear.graph.operators as operators
import fastlinear.graph.parts as parts
import fastlinear.graph.remembered as remembered
import fastlinear.graph.row_blocks as row_blocks
import fastlinear.graph.scores as scores
import fastlinear.graph.tidying as tidying
from fastlinear.graph.capture import Capture, activation_of, changes, parameter_of, same_as
from fastlinear.graph.composites import composites
from fastlinear.graph.expansions import expand
from fastlinear.graph.operators import Operator, Spec
from fastlinear.graph.options import Options
from fastlinear.graph.patterns import ABSORPTIONS, Product, gate_of, is_multiplied, product_at
from fastlinear.graph.story import Story
from fastlinear.layer.frozen import is_frozen
from fastlinear.layer.stack import why_not_frozen_group, why_not_together
from fastlinear.model.running import name_together
from fastlinear.spec.formats import DTYPES, name_of


class Rewriter:
    """One graph on its way. story: what became of each node; mixtures: what runs of experts."""

    def __init__(self, capture: Capture, options: Options, story: Story) -> None:
        self.capture, self.options, self.story = capture, options, story
        self.graph = capture.graph
        self._absorbed: set[fx.Node] = set()  # by some product
        self._moved: dict[fx.Node, fx.Node] = {}  # a node that is gone -> what has its value
        self._made: set[fx.Node] = set()  # nodes that make a tensor of their own: the values of fast products
        self.mixtures: list[operators.Layers] = []
        self._runs: dict[fx.Node, row_blocks.Run] = {}

    def run(self) -> list[operators.Layers]:
        """Rewrites the graph, and returns the fast layers of each product that it then runs."""
        self._expand()
        self._drop_idle()
        letters.spell_out(self.capture, self.story)
        placed = mixtures.place(self.capture, self.options, self.story)
        self.mixtures, self._made = [*placed.values()], {*placed}
        if self.options.fuse:
            tidying.drop_unread(self.graph, self.story)
            self._join_composites()
            scores.join(self.graph, self.story)
            columns.part(self.capture, self.story)
            columns.drop_unread(self.capture, self.story)
        parts.cut(self.capture, self.story)
        self._number()
        taken: list[tuple[Product, Spec, Operator]] = []
        for node in list(self.graph.nodes):
            product = product_at(node)
            if product is not None:
                found = self._take(product)
                if isinstance(found, str):
                    self.story.tell(node, "torch", found)
                else:
                    taken.append(found)
                    self._absorbed.update(found[0].nodes)
        gates = self._gates(taken) if self.options.fuse else []
        together = {id(each) for members in gates for each in members}
        groups = self._siblings([each for each in taken if id(each) not in together]) if self.options.fuse else []
        together |= {id(each) for members in groups for each in members}
        layers = [self._place_gate(*members) for members in gates]
        layers += [self._place_group(members) for members in groups]
        layers += [self._place(*each) for each in taken if id(each) not in together]
        if self.options.fuse:
            tidying.drop_unread(self.graph, self.story)  # the transposes of weights
            self._number()
            norms.absorb(self.graph, self.story, self._is_calm, self._is_fresh)
            caches.absorb(self.graph, self.story, self.options.tune)
            rounds = self.options.products is torch.bfloat16
            attention.absorb(self.graph, self.story, self.options.tune, rounds)
            masks.take_whole(self.graph, self.story)
            tidying.keep_constants(self.capture.module, self.story)
            masks.drop_true(self.capture.module, self.story)
            layouts.settle(self.graph, any(map(changes, self.graph.nodes)))
            remembered.remember(self.capture, self.story)
            self._number()
            row_blocks.join(self.graph, self._runs, self._is_calm)
        self.graph.lint()
        return layers

    def _number(self) -> None:
        self._order = {node: i for i, node in enumerate(self.graph.nodes)}
        self._writes = [i for node, i in self._order.items() if changes(node)]

    def _is_calm(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether no node between the two writes to a tensor or changes a mode."""
        begin = bisect.bisect_right(self._writes, self._order[first])
        return begin == bisect.bisect_left(self._writes, self._order[last])

    def _expand(self) -> None:
        for node in list(self.graph.nodes):
            parts = expand(self.graph, node)
            if isinstance(parts, str):
                self.story.tell(node, "torch", f"it hides linear layers: {parts}")
            elif parts is not None:
                self.story.tell(node, "dropped", "its linear layers and the rest stand in its place")
                self.story.add(node, parts)

    def _drop_idle(self) -> None:
        for node in list(self.graph.nodes):
            same = same_as(node)
            if same is not None:
                self.story.tell(node, "dropped", "it returns its input as it is")
                node.replace_all_uses_with(same)
                self.graph.erase_node(node)

    def _join_composites(self) -> None:
        self._number()
        gone: set[fx.Node] = set()
        for root in reversed(list(self.graph.nodes)):  # so that the longest is found first
            calls = root.op in ("call_function", "call_method") and root not in gone
            for row, match in composites(root) if calls else ():
                inside = {*match.inner, root}
                first = min(inside, key=self._order.__getitem__)
                if all(user in inside for node in match.inner for user in node.users) and self._is_calm(first, root):
                    function, args, keywords = row.call(**match.bound)
                    with self.graph.inserting_before(root):
                        node = self.graph.call_function(function, args, keywords)
                    node.meta = dict(root.meta)
                    self._order[node] = self._order[root]
                    self.story.rename(root, node, f"{row.name}, {len(inside)} nodes in one")
                    for each in match.inner:
                        self.story.tell(each, "fused", f"into {row.name}", node)
                    root.replace_all_uses_with(node)
                    for each in sorted(inside, key=self._order.__getitem__, reverse=True):
                        self.graph.erase_node(each)
                    gone |= inside
                    break

    def _take(self, product: Product) -> tuple[Product, Spec, Operator] | str:
        """The product with all that it absorbs and the layer that is to run it, or why torch runs it."""
        weight, bias = self.capture.values.get(product.weight), None
        if weight is None:
            return "its weight is no parameter of a module"
        if product.bias is not None:
            bias = self.capture.values.get(product.bias)
            if bias is None:
                added = product.with_bias_added()
                if added is None:
                    return "its bias is no parameter of a module"
                product = added
        node = product.nodes[0]
        name, classes = self.capture.name_of(node, product.weight), list(self.capture.classes_of(node))
        form, asked = product.form, self.options.asked
        if (reason := self.options.why_left(name, classes)) is not None:
            return reason
        rounds = form is None and asked.packed not in (None, name_of(weight.dtype))
        if rounds and not self.options.is_included(name, classes):
            what = DTYPES.get(asked.packed or "", asked.packed)
            if name.split(".")[-1] == "lm_head":
                return f"packing an lm_head as {what} is lossy: name it in include to have it"
            if (holder := self.capture.other_holder(node, product.weight)) is not None:
                return (
                    f"packing a weight of {holder}, no linear layer, as {what} is lossy: name it in include to have it"
                )
            if not all(map(is_multiplied, parameter_of(product.weight).users)):
                return f"packing a shared weight as {what} is lossy: name the layer in include to have it"
        if form is None and (reason := asked.why_not(name, weight.shape[0 if product.transposed else 1])) is not None:
            return reason
        if self.options.fuse:
            product = self._absorb(product)
        precision = asked.of(name, weight.dtype) if form is None else form.precision()
        label = self.capture.label_of(node, product.weight)
        spec = Spec(label, product.activation, product.transposed, precision, self.options.tune, asked, form)
        layer = operators.operator_for(spec, weight, bias)
        if (reason := operators.why_not(spec, layer)) is not None:
            return reason
        if self.options.filter_fn is not None and not self.options.filter_fn(layer, name):
            return "it is refused by filter_fn"
        return product, spec, layer

    def _absorb(self, product: Product) -> Product:
        while True:
            users = list(product.root.users)
            for user in users:
                if user in self._absorbed:
                    continue
                takes = (row.take(self.capture, product, user) for row in ABSORPTIONS)
                grown = next((each for each in takes if each is not None), None)
                if grown is None:
                    if activation_of(user) is not None:
                        self.story.tell(user, "torch", "the product before it has steps enough already")
                    continue
                others = [each.name for each in users if each is not user]
                if others:
                    self.story.tell(user, "torch", f"what it reads is read by {', '.join(others)}, too")
                elif not self._is_calm(product.root, grown.root):
                    self.story.tell(user, "torch", "a node between it and its product writes to a tensor")
                else:
                    break
            else:
                return product
            product = grown

    def _gates(self, taken: Sequence[Any]) -> list[tuple[Any, Any]]:
        """The pairs of products whose second is the operand of the first, which makes a gate of both."""
        by_root = {product.root: each for each in taken for product in each[:1]}
        pairs = []
        for outer in taken:
            product = outer[0]
            inner = by_root.get(product.operands[0]) if len(product.operands) == 1 else None
            if inner is not None and gate_of(product, inner[0]) is not None and self._may_be_gate(outer, inner):
                pairs.append((outer, inner))
        return pairs

    def _may_be_gate(self, outer: Any, inner: Any) -> bool:
        keys = {spec._replace(activation=None).key() for _, spec, _ in (outer, inner)}
        products = [product for product, *_ in (outer, inner)]
        first = min((product.nodes[0] for product in products), key=self._order.__getitem__)
        parameters = (p for product in products for p in (product.weight, product.bias) if p is not None)
        alone = len(inner[0].root.users) == 1 and outer[0].weight is not inner[0].weight
        if len(keys) > 1 or not alone:
            return False
        if not self._is_calm(first, outer[0].root) or any(self._order[p] > self._order[first] for p in parameters):
            return False
        layers = [layer for *_, layer in (inner, outer)]
        if any(map(is_frozen, layers)):
            return why_not_frozen_group(layers) is None and layers[0].out_features == layers[1].out_features
        return why_not_together(self._bare(outer, inner), gated=True) is None

    @staticmethod
    def _bare(*members: Any) -> list[Operator]:
        """The layers of products without what they have absorbed."""
        layers = []
        for _, spec, layer in members:
            bias = layer._parameters["bias"]
            layers.append(operators.operator_for(spec._replace(activation=None), layer.weight, bias))
        return layers

    def _place_gate(self, outer: Any, inner: Any) -> operators.Layers:
        gate = gate_of(outer[0], inner[0])
        assert gate is not None
        if is_frozen(outer[2]):
            return self._place_chain(outer, inner)
        through = outer if gate.opens_inner else inner
        members = [inner, outer] if gate.opens_inner else [outer, inner]
        names = [spec.name for _, spec, _ in members]
        spec = members[0][1]._replace(activation=None, name=name_together(names))
        first, last = (operators.product(spec, layer)[0] for _, spec, layer in (inner, outer))
        inside = int(through is inner)  # the place of the inner product's parameters

        def alone(x: Any, *t: Any) -> Any:
            return last(x, t[1 - inside], t[3 - inside], first(x, t[inside], t[2 + inside]))

        function, stacks = operators.gated(spec, self._bare(*members), gate.program, alone)
        what = f"one product of {_named(inner, outer)}, {gate.program.name}"
        self._finish_gate(function, members, outer, inner, what)
        return stacks

    def _place_chain(self, outer: Any, inner: Any) -> operators.Layers:
        """A gate of frozen layers: the outer one reads, tile by tile, what the inner one makes."""
        members = [inner, outer]
        function, groups = operators.frozen_group([(spec, layer) for _, spec, layer in members], chained=True)
        self._finish_gate(function, members, outer, inner, f"one call of {_named(inner, outer)}")
        return groups

    def _finish_gate(self, function: Any, members: Sequence[Any], outer: Any, inner: Any, what: str) -> None:
        products = [product for product, *_ in members]
        args = (self._now(outer[0].x), *(p.weight for p in products), *(p.bias for p in products))
        with self.graph.inserting_before(outer[0].root):
            node = self.graph.call_function(function, args)
        self._runs[node] = self._run(inner[0], [layer for *_, layer in members], ends=False)
        root = outer[0].root
        both = replace(outer[0], nodes=[*inner[0].nodes, *outer[0].nodes])
        self._finish(both, node, what)
        for product in products:
            self.story.tell(product.nodes[0], "fast", what)
        self._moved[root] = node

    def _siblings(self, taken: Sequence[Any]) -> list[list[Any]]:
        """The products that read the same x and are one product better."""
        by_x: dict[Any, list[Any]] = defaultdict(list)
        for each in taken:
            product, spec, _ = each
            key = spec._replace(name="", activation=None).key()
            by_x[product.x, key].append(each)
        return [members for members in by_x.values() if self._may_join(members)]

    def _may_join(self, members: Sequence[Any]) -> bool:
        if len(members) < 2:
            return False
        layers = [layer for *_, layer in members]
        frozen = any(map(is_frozen, layers))
        reason = why_not_frozen_group(layers) if frozen else why_not_together(layers)
        if frozen and any(product.operands for product, *_ in members):
            reason = "one of them has an operand"
        if reason is None and len({id(layer) for layer in layers}) < len(layers):
            reason = "they are one layer, called twice"
        first, last = members[0][0].nodes[0], members[-1][0].root
        if reason is None and not self._is_calm(first, last):
            reason = "a node between them writes to a tensor"
        parameters = (p for product, *_ in members for p in (product.weight, product.bias) if p is not None)
        if reason is None and any(self._order[p] > self._order[first] for p in parameters):
            reason = "a parameter of theirs is fetched between them"
        for product, *_ in members if reason is not None else ():
            self.story.tell(product.root, "fast", f"alone, although it has siblings: {reason}")
        return reason is None

    def _place(self, product: Product, spec: Spec, layer: Operator) -> operators.Layers:
        function, layers = operators.product(spec, layer)
        with self.graph.inserting_before(product.root):
            node = self.graph.call_function(function, self._arguments(product))
        self._runs[node] = self._run(product, [layer], ends=True)
        self._finish(product, node, f"FastLinear {_text(spec)}")
        return layers

    def _run(self, product: Product, layers: Sequence[Operator], ends: bool) -> row_blocks.Run:
        sizes, nbytes = (layers[0].in_features, layers[0].out_features), sum(map(operators.packed_bytes, layers))
        return row_blocks.Run(*sizes, nbytes, 2 * len(layers), ends, self.story.row(product.nodes[0]))

    def _arguments(self, product: Product) -> tuple[Any, ...]:
        return self._now(product.x), product.weight, product.bias, *map(self._now, product.operands)

    def _is_fresh(self, node: fx.Node) -> bool:
        return node in self._made

    def _now(self, node: fx.Node) -> fx.Node:
        return self._moved.get(node, node)

    def _finish(self, product: Product, node: fx.Node, what: str) -> None:
        """Puts `node` in the place of a product."""
        node.meta = dict(product.root.meta)
        self._made.add(node)
        self._moved[product.root] = node
        root, first = product.root, product.nodes[0]
        self.story.tell(first, "fast", what)
        for each in product.nodes[1:]:
            self.story.tell(each, "fused", f"into {first.name}")
        root.replace_all_uses_with(node)
        for each in reversed(product.nodes):
            self.graph.erase_node(each)

    def _place_group(self, members: Sequence[Any]) -> operators.Layers:
        products = [product for product, *_ in members]
        names = [spec.name for _, spec, _ in members]
        spec = members[0][1]._replace(name=name_together(names))
        frozen, what = is_frozen(members[0][2]), _named(*members)
        if frozen:
            function, stacks = operators.frozen_group([(spec, layer) for _, spec, layer in members], chained=False)
        else:
            function, stacks = operators.group(spec, [layer for *_, layer in members])
        args = (self._now(products[0].x), *(p.weight for p in products), *(p.bias for p in products))
        with self.graph.inserting_before(products[0].nodes[0]):
            whole = self.graph.call_function(function, args)
            parts = [self.graph.call_function(operator.getitem, (whole, i)) for i in range(len(products))]
        for product, part in zip(products, parts, strict=True):
            self._finish(product, part, f"one {'call' if frozen else 'product'} of {what}")
        return stacks


def _named(*members: Any) -> str:
    return ", ".join(product.nodes[0].name for product, *_ in members)


def _text(spec: Spec) -> str:
    return repr(spec.name) + (f" with {spec.activation.name}" if spec.activation else "")
