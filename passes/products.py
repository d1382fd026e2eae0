"""How a graph uses a weight: from its placeholder, through views and casts, to the products that take it.

Every product is brought to one of three normal forms, so that a rewrite knows three ops and not all that torch can
write: ``linear`` (x w^T), ``grouped`` (rows of x sorted by expert, x_e w_e) and ``batched`` (a matrix of x an expert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from .nodes import agree, bound, dims_of, size_of, use_of
from .views import Permutation, View, next_view, swapped


@dataclass(frozen=True)
class Product:
    """A product in normal form: y = after(form(before(x), w)), w the view, or its transpose where ``flipped``.

    Normal are (out, in) for linear, (E, in, out) for grouped and batched.
    """

    form: str
    use: str
    node: fx.Node
    view: View
    x: fx.Node
    flipped: bool = False
    bias: fx.Node | None = None
    before: Permutation | None = None
    after: Permutation | None = None
    offsets: fx.Node | None = None

    @property
    def transposed(self) -> bool:
        """The normal form's weight is the transpose of what the module stores."""
        return self.view.transposed != self.flipped

    @property
    def branch(self) -> fx.Node:
        """The user of the weight's placeholder that leads here: the node itself, or its first view."""
        return self.view.path[0] if self.view.path else self.node

    @property
    def holder(self) -> fx.Node:
        """The weight's placeholder."""
        return self.view.path[0].all_input_nodes[0] if self.view.path else self.view.node


def find_products(holder: fx.Node, dims: int) -> tuple[list[Product], list[fx.Node]]:
    """The products of the weight that ``holder`` stands for, and the users of ``holder`` that lead to anything else.

    holder: a placeholder of a weight with ``dims`` dimensions. Users that are regions of their own (checkpointed
    bodies) or the output are for the caller to look at; they are in neither list.
    """
    view = View(holder, dims)
    products: list[Product] = []
    others: list[fx.Node] = []
    for user in holder.users:
        found = _follow(view, user)
        if found is None:
            others.append(user)
        else:
            products += found
    return products, others


def renewed(product: Product) -> Product:
    """The same product as it stands in the graph now: rewriting another may have replaced its input."""
    found = _product(product.view, product.node)
    assert found is not None
    return found


def _follow(view: View, user: fx.Node) -> list[Product] | None:
    """The products behind one user of a view; None where any way from there leads to something else."""
    product = _product(view, user)
    if product is not None:
        return [product]
    following = next_view(view, user)
    if following is None:
        return None
    found: list[Product] = []
    for next_user in user.users:
        behind = _follow(following, next_user)
        if behind is None:
            return None
        found += behind
    return found


def _product(view: View, user: fx.Node) -> Product | None:
    """The normal form of ``user``, if it is a product of an input and ``view``, and ``view`` is nothing else of it."""
    if view.unbound:
        return None
    name = use_of(user)
    read = _READERS.get((name, view.dims))
    product = None if read is None else read(view, user)
    return None if product is None or product.x is view.node or product.bias is view.node else product


def _linear(view: View, user: fx.Node) -> Product | None:
    given = bound(user, "input", "weight", "bias")
    if given is None or given["weight"] is not view.node:
        return None
    return Product("linear", "linear", user, view, given["input"], bias=given.get("bias"))


def _addmm(view: View, user: fx.Node) -> Product | None:
    given = bound(user, "input", "mat1", "mat2")
    if given is None or given["mat2"] is not view.node or dims_of(given["input"]) != 1:
        return None
    if not agree(size_of(given["input"], 0), size_of(view.node, 1)):
        return None  # a bias of one element for all of y's
    return Product("linear", "addmm", user, view, given["mat1"], flipped=True, bias=given["input"])


def _operands(user: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    first, second = user.args if len(user.args) == 2 and not user.kwargs else (None, None)
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


def _matmul(view: View, user: fx.Node) -> Product | None:
    operands = _operands(user)
    if operands is None:
        return None
    x = operands[0] if operands[1] is view.node else operands[1]
    if operands[1] is view.node:
        return Product("linear", "matmul", user, view, x, flipped=True)
    dims = dims_of(x)
    if dims is None:
        return None
    order = None if dims < 2 else swapped(dims)
    return Product("linear", "matmul", user, view, x, before=order, after=order)


def _bmm(view: View, user: fx.Node) -> Product | None:
    operands = _operands(user)
    if operands is None or any(dims_of(operand) != 3 for operand in operands):
        return None
    if not agree(*(size_of(operand, 0) for operand in operands)):
        return None
    name = use_of(user)
    if operands[1] is view.node:
        return Product("batched", name, user, view, operands[0])
    order = swapped(3)
    return Product("batched", name, user, view, operands[1], flipped=True, before=order, after=order)


def _grouped(view: View, user: fx.Node) -> Product | None:
    x, weight, *more = user.args
    given = {**dict(zip(("offs", "bias", "out_dtype"), more, strict=False)), **user.kwargs}
    offsets = given.pop("offs", None)
    if weight is not view.node or view.gathered or any(value is not None for value in given.values()):
        return None
    if not isinstance(x, fx.Node) or not isinstance(offsets, fx.Node) or dims_of(x) != 2:
        return None
    return Product("grouped", "grouped_mm", user, view, x, offsets=offsets)


def _einsum(view: View, user: fx.Node) -> Product | None:
    equation, *operands = user.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or user.kwargs:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    x = operands[0] if operands[1] is view.node else operands[1]
    letters = dict(zip(operands, inputs.split(","), strict=False))
    if not arrow or not isinstance(x, fx.Node) or len(letters) != 2:
        return None
    return _contraction(view, user, x, letters[x], letters[view.node], output)


def _contraction(view: View, user: fx.Node, x: fx.Node, of_x: str, of_w: str, of_y: str) -> Product | None:
    """An einsum as a linear: one letter of w is summed over and x's, the other is y's alone."""
    summed = [letter for letter in of_w if letter in of_x and letter not in of_y]
    free = [letter for letter in of_w if letter not in of_x and letter in of_y]
    if len(of_w) != 2 or len(summed) != 1 or len(free) != 1:
        return None
    if not agree(size_of(x, _place(of_x, summed[0])), size_of(view.node, of_w.index(summed[0]))):
        return None  # one of them is broadcast
    kept = of_x.replace(summed[0], "")
    if "." in of_x:  # batch dimensions without letters: only where nothing needs to move
        plain = of_x == kept + summed[0] and of_y == kept + free[0]
        moves: tuple[Permutation | None, Permutation | None] | None = (None, None) if plain else None
    elif len(set(of_x)) != len(of_x) or sorted(of_y) != sorted(kept + free[0]):
        moves = None
    else:
        moves = _order(of_x, kept + summed[0]), _order(kept + free[0], of_y)
    if moves is None:
        return None
    return Product("linear", "einsum", user, view, x, of_w[0] == summed[0], before=moves[0], after=moves[1])


def _place(letters: str, letter: str) -> int:
    """Which dimension it is, counted from the side on which no "..." stands between."""
    before, _, after = letters.partition(letter)
    return len(before) if "." not in before else -1 - len(after)


def _order(have: str, want: str) -> Permutation | None:
    return None if have == want else tuple(have.index(letter) for letter in want)


_READERS: dict[tuple[str, int], Callable[[View, fx.Node], Product | None]] = {
    ("linear", 2): _linear,
    ("addmm", 2): _addmm,
    ("matmul", 2): _matmul,
    ("einsum", 2): _einsum,
    ("bmm", 3): _bmm,
    ("matmul", 3): _bmm,
    ("grouped_mm", 3): _grouped,
}
