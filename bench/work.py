"""FLOPs and bytes of each version of a layer, forward and backward, from which the roofline floors follow."""

from __future__ import annotations

from ssvd_kernels.ops import flops


def linear_flops(mode: str, T: int, d_in: int, d_out: int, k: int) -> float:
    """y, dx and dcore from a core (multiply and add are two)."""
    return flops.linear_flops(mode, T, d_in, d_out, k, backward=True)


def linear_bytes(size: int, T: int, d_in: int, d_out: int, k: int) -> float:
    """Each input read once and each result written once, in either pass: x, y, dy, dx, and twice W, U, V, core."""
    bases = size * d_in * d_out + 4 * k * (d_in + d_out + k)
    return 2 * bases + 2 * size * T * (d_in + d_out) + 2 * size * T * k + 4 * k * k


def frozen_bytes(size: int, T: int, d_in: int, d_out: int) -> float:
    """x, y, dy, dx, and twice W."""
    return size * (2 * d_in * d_out + 2 * T * (d_in + d_out))


def solve_flops(k: int) -> float:
    """E by torch.linalg.solve, and the gradient of theta."""
    return 20 / 3 * k**3


def rotation_flops(k: int) -> float:
    """The same by block elimination."""
    return 6 * k**3


def rotation_bytes(B: int, k: int) -> float:
    """float32: theta read, E written; dE and E read, dtheta written."""
    return 4 * B * (k * (k - 1) + 3 * k * k)


def layer_flops(version: str, mode: str, T: int, d_in: int, d_out: int, k: int) -> float:
    """The version's products for y, dx and the gradients of its parameters, its rotation included."""
    frozen = 4 * T * d_in * d_out
    if version in ("frozen linear", "full fine-tuning"):
        return frozen * (1.5 if version == "full fine-tuning" else 1)
    if version.startswith("LoRA"):
        return frozen + 6 * T * lora_rank(version) * (d_in + d_out)
    if version == "OFT":
        return frozen + 6 * T * d_in * OFT_BLOCK
    if version.startswith("rebuilt weight"):
        r = min(d_in, d_out)
        return 1.5 * frozen + 4 * r * d_in * (r + d_out) + solve_flops(k)
    if version == "ssvd":
        return linear_flops(mode, T, d_in, d_out, k) + rotation_flops(k)
    return linear_flops("factored", T, d_in, d_out, k) + solve_flops(k)


def layer_bytes(version: str, size: int, T: int, d_in: int, d_out: int, k: int) -> float:
    """Each input, parameter and result of either pass moved once."""
    frozen = frozen_bytes(size, T, d_in, d_out)
    if version in ("frozen linear", "full fine-tuning", "OFT"):
        return frozen + (size * d_in * d_out if version == "full fine-tuning" else 0)
    if version.startswith("LoRA"):
        return frozen + 3 * size * lora_rank(version) * (d_in + d_out)
    return linear_bytes(size, T, d_in, d_out, k) + rotation_bytes(1, k)


OFT_BLOCK = 32


def lora_rank(version: str) -> int:
    """16 of "LoRA r16"."""
    return int(version.rpartition("r")[2])
