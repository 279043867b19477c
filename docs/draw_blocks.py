"""Draw each block design from the code itself: docs/block-DESIGN.svg, with the shapes of DiT-XL/2
at 256 pixels.

    python docs/draw_blocks.py

torch.fx traces a block of models.py, a pass without contents gives the shapes. What depends on the
tokens stands in the middle, what depends on the condition alone on the right.
"""

import argparse
import operator
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

import models

BATCH = 7  # stands for N; no other size at XL/2 is 7
WIDE = models.SIZES["XL"]["hidden_size"]
# The order in which a Modulation has them
VECTORS = {6: ("shift", "scale", "gate") * 2, 4: ("shift", "scale") * 2}
# Of the drawing, in pixels
MIDDLE, RIGHT, PITCH, WIDTH, HEIGHT, LANE, ACROSS = 180, 520, 52, 240, 34, 30, 680
KINDS = {
    "Attention": "self-attention", "CrossAttention": "cross-attention", "Mlp": "MLP",
    "Modulation": "SiLU, Linear",
}  # fmt: skip


class BlockTracer(fx.Tracer):
    """Traces a block down to its own modules, and `modulated` as one step."""

    def __init__(self):
        super().__init__(autowrap_functions=(models.modulated,))

    def is_leaf_module(self, module, name):
        return True


def trace(block):
    """The fx graph of the first block of DiT-XL/2 with this design, each node with the shape of
    what it gives.
    """
    with torch.device("meta"), torch.no_grad():
        network = models.DiT_XL_2(block=block).eval()
        given = []
        network.blocks[0].register_forward_pre_hook(lambda module, args: given.extend(args))
        network(
            torch.zeros(BATCH, 4, 32, 32), torch.zeros(BATCH), torch.zeros(BATCH, dtype=torch.long)
        )
        tokens, condition, layout = given
        graph = BlockTracer().trace(network.blocks[0], concrete_args={"layout": layout})
        for node in reversed(graph.nodes):  # what is left of the layout, which changes nothing here
            if not node.users and node.op != "output":
                graph.erase_node(node)
        module = fx.GraphModule(network.blocks[0], graph)
        ShapeProp(module).propagate(tokens, condition)
    return module


def shape_of(node):
    """Such as "(N, 256, 1152)"."""
    sizes = node.meta["tensor_meta"].shape
    return f"({', '.join('N' if size == BATCH else str(size) for size in sizes)})"


def source(node):
    """(the node that a value comes from, passing over changes of form; the name of the vector that
    was taken of it).
    """
    name = ""
    while node.op == "call_method" or node.target is operator.getitem:
        if node.target is operator.getitem:
            name = VECTORS[node.args[0].args[1]][node.args[1]]
        node = node.args[0]
    return node, name


def label(node, module):
    """The two lines that a box has: what it is, and what it gives."""
    if node.op == "call_module":
        part = module.get_submodule(node.target)
        kind = KINDS.get(type(part).__name__, type(part).__name__)
        size = sum(p.numel() for p in part.parameters())
        return f"{node.target}: {kind}", f"{shape_of(node)}" + (
            f"   {size:,} parameters" if size else ""
        )
    if node.op == "get_attr":
        return (
            node.target,
            f"{shape_of(node)}   {getattr(module, node.target).numel():,} parameters",
        )
    if node.op == "placeholder":
        shared = node.target == "c" and node.meta["tensor_meta"].shape[-1] != WIDE
        names = {
            "x": "tokens x",
            "c": "six vectors of shared_modulation" if shared else "condition c",
        }
        return names[node.target], shape_of(node)
    formulas = {
        models.modulated: "· (1 + scale) + shift", operator.mul: "· gate", operator.add: "+",
    }  # fmt: skip
    return formulas[node.target], shape_of(node)


def parts(module):
    """(boxes in the middle, boxes on the right): the nodes that are drawn, in order."""
    tokens, of_tokens, of_condition = set(), [], []
    for node in module.graph.nodes:
        if node.op == "output" or not (node.users and "tensor_meta" in node.meta):
            continue
        if node.target == "x" or any(parent in tokens for parent in node.all_input_nodes):
            tokens.add(node)
        if source(node)[0] is node and isinstance(
            node.meta["tensor_meta"], fx.passes.shape_prop.TensorMetadata
        ):
            (of_tokens if node in tokens else of_condition).append(node)
    return of_tokens, of_condition


def box(x, y, lines):
    """A box around two lines of text, its middle at (x, y)."""
    return (
        f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" '
        f'rx="5"/><text x="{x}" y="{y - 3:g}" class="what">{lines[0]}</text>'
        f'<text x="{x}" y="{y + 12:g}">{lines[1]}</text>'
    )


def path(*points):
    """An arrow along these points."""
    return f'<path d="M{" L".join(f"{x:g},{y:g}" for x, y in points)}" marker-end="url(#tip)"/>'


def draw(block):
    """The SVG of one design."""
    module = trace(block)
    middle, right = parts(module)
    place = {node: (MIDDLE, PITCH * (i + 0.6)) for i, node in enumerate(middle)}
    place |= {node: (RIGHT, PITCH * (i + 0.6)) for i, node in enumerate(right)}
    shapes = [box(*place[node], label(node, module)) for node in (*middle, *right)]
    for node in (*middle, *right):
        for given in (arg for arg in node.args if isinstance(arg, fx.Node)):
            shapes.append(arrow(*source(given), node, place))
    height = PITCH * (len(middle) + 0.2)
    style = (
        "rect{fill:#f4f6fa;stroke:#456} path{fill:none;stroke:#456} "
        "text{font:11px sans-serif;text-anchor:middle;fill:#223} "
        ".what{font-weight:bold} .name{fill:#456}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0,0 L8,4 L0,8"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {ACROSS} {height:g}" '
        f'width="{ACROSS}" height="{height:g}">'
        f"<title>{block}: a block of DiT-XL/2 at 256 pixels</title>"
        f"<style>{style}</style><defs>{tip}</defs>"
        f'<rect x="0" y="0" width="{ACROSS}" height="{height:g}" style="fill:#fff;stroke:none"/>'
        + "\n".join(shapes)
        + "</svg>\n"
    )


def arrow(given, name, node, place):
    """The arrow from one box to another: down a column, past its boxes, or in from the right with
    its name.
    """
    (x, y), (to_x, to_y) = place[given], place[node]
    if x != to_x:
        bend = RIGHT - WIDTH / 2 - LANE
        text_x, text_y = (bend + MIDDLE + WIDTH / 2) / 2, to_y - 4 + 13 * (name == "scale")
        text = f'<text x="{text_x:g}" y="{text_y:g}" class="name">{name}</text>'
        return path((x - WIDTH / 2, y), (bend, y), (bend, to_y), (to_x + WIDTH / 2, to_y)) + text
    if to_y - y > PITCH * 1.5:
        outwards = -1 if x == MIDDLE else 1
        edge, lane = x + outwards * WIDTH / 2, x + outwards * (WIDTH / 2 + LANE)
        return path((edge, y + 8), (lane, y + 8), (lane, to_y - 8), (edge, to_y - 8))
    return path((x, y + HEIGHT / 2), (to_x, to_y - HEIGHT / 2))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = "where to write (default: docs)"
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help=folder)
    args = parser.parse_args(argv)
    for block in models.BLOCKS:
        target = args.output / f"block-{block}.svg"
        try:
            target.write_text(draw(block), encoding="utf-8")
        except OSError as error:
            parser.error(
                f"cannot write {target} ({error.strerror}); give a folder that exists as --output"
            )
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
