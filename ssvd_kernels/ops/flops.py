"""The cost of the linear op: the matrix products of each mode, and the resulting FLOPs and bytes.

The dispatcher, the roofline floors of the benchmark, and the tests, which compare it with counted products, all use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Product(NamedTuple):
    """(rows, depth) @ (depth, cols)."""

    rows: int
    cols: int
    depth: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition count as two."""
        return 2 * self.rows * self.cols * self.depth

    @property
    def elements(self) -> int:
        """Both operands read once, the result written once."""
        return self.rows * self.depth + self.depth * self.cols + self.rows * self.cols


def compose_products(d_in: int, d_out: int, k: int) -> list[Product]:
    """U core, then (U core) V^T."""
    return [Product(d_out, k, k), Product(d_out, d_in, k)]


def forward_products(mode: str, T: int, d_in: int, d_out: int, k: int, need_z: bool = True) -> list[Product]:
    """y from x; "composed" without the composition of W', and with z = x V only where the backward needs it."""
    base, z = Product(T, d_out, d_in), Product(T, k, d_in)
    if mode == "composed":
        return [base, z] if need_z else [base]
    return [z, base, Product(T, k, k), Product(T, d_out, k)]


def backward_products(
    mode: str, T: int, d_in: int, d_out: int, k: int, need_dx: bool = True, need_dcore: bool = True
) -> list[Product]:
    """dx and dcore from dy; "composed" without the composition of W'."""
    dx = [Product(T, d_in, d_out)] if need_dx else []
    dyU, dcore = Product(T, k, d_out), [Product(k, k, T)] if need_dcore else []
    if mode == "composed":
        if need_dcore and T < d_out:
            return [*dx, dyU, *dcore]
        return dx + ([Product(d_out, k, T), Product(k, k, d_out)] if need_dcore else [])
    through_core = [Product(T, k, k), Product(T, d_in, k)] if need_dx else []
    return [dyU, *dx, *through_core, *dcore]


def flops(products: Iterable[Product]) -> int:
    """Floating-point operations of `products`."""
    return sum(product.flops for product in products)


def linear_flops(mode: str, T: int, d_in: int, d_out: int, k: int, backward: bool) -> int:
    """FLOPs of the forward, and of the backward for x and core; "composed" builds W' once for both."""
    products = forward_products(mode, T, d_in, d_out, k, need_z=backward)
    if backward:
        products += backward_products(mode, T, d_in, d_out, k)
    return flops(products) + (flops(compose_products(d_in, d_out, k)) if mode == "composed" else 0)
