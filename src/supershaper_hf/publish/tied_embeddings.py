"""Keep the tied embeddings of a masked LM one table in an 8-bit ONNX file.

The decoder of a masked LM multiplies with the transpose of the word embeddings. ONNX Runtime quantises a table that is
looked up, but leaves a product with a transposed table in 32 bits: the whole table is converted back and transposed for
every batch, which made the 8-bit file slower than the one in 32 bits. `fold_transposes` stores the transpose, so that
the product is quantised. `share_tables` lets words be looked up in it, so that the table is stored once. It has a scale
for every word, which also makes the embeddings more exact.
"""

from typing import Any


def fold_transposes(model: Any) -> dict[str, str]:
    """Replace every transposed weight of an ONNX model by the weight that the transpose returns.

    Returns:
        The name of each new weight and of the one that it was made of.
    """
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    folded = {}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        array = numpy_helper.to_array(weights[node.input[0]]).transpose(node.attribute[0].ints)
        graph.initializer.append(numpy_helper.from_array(array.copy(), node.output[0]))
        graph.node.remove(node)
        folded[node.output[0]] = node.input[0]
    return folded


def share_tables(model: Any, folded: dict[str, str]) -> None:
    """Look words up in the transposed table, if a quantised ONNX model has the same table twice.

    Args:
        model: The model after ONNX Runtime has quantised it.
        folded: What `fold_transposes` has returned before.
    """
    graph = model.graph
    names = {tensor.name for tensor in graph.initializer}
    for transposed, table in folded.items():
        if not {f"{table}_quantized", f"{transposed}_quantized"} <= names:
            continue
        (lookup,) = [node for node in graph.node if node.op_type == "Gather" and node.input[0] == f"{table}_quantized"]
        readers = [node for node in graph.node if lookup.output[0] in node.input]
        if [node.op_type for node in readers] != ["DequantizeLinear"]:
            continue
        (restore,) = readers
        nodes = [node for node in graph.node if node is not restore]
        place = next(index for index, node in enumerate(nodes) if node is lookup)
        nodes[place : place + 1] = rows(transposed, lookup.input[1], restore.output[0])
        kept = [tensor for tensor in graph.initializer if not tensor.name.startswith(f"{table}_")]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)


def rows(transposed: str, ids: str, output: str) -> list[Any]:
    """Return nodes that look `ids` up in a transposed table of integers, with a scale and a zero for every word."""
    from onnx import TensorProto, helper

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [output], name=f"{output}.{kind}", **attributes)

    nodes = [
        node("Transpose", [f"{transposed}_quantized"], f"{output}_table", perm=[1, 0]),
        node("Gather", [f"{output}_table", ids], f"{output}_integers"),
    ]
    last = helper.make_tensor(f"{output}_last", TensorProto.INT64, [1], [-1])
    nodes.append(helper.make_node("Constant", [], [f"{output}_last_axis"], name=f"{output}.Constant", value=last))
    for part in ("zero_point", "scale"):
        nodes.append(node("Gather", [f"{transposed}_{part}", ids], f"{output}_{part}_of_word"))
        nodes.append(node("Unsqueeze", [f"{output}_{part}_of_word", f"{output}_last_axis"], f"{output}_{part}"))
    nodes.append(node("Cast", [f"{output}_integers"], f"{output}_floats", to=TensorProto.FLOAT))
    nodes.append(node("Cast", [f"{output}_zero_point"], f"{output}_zero", to=TensorProto.FLOAT))
    nodes.append(node("Sub", [f"{output}_floats", f"{output}_zero"], f"{output}_centred"))
    return [*nodes, node("Mul", [f"{output}_centred", f"{output}_scale"], output)]
