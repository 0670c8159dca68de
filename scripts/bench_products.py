"""A layer's products of few rows: XLA's, and the kernel's that reads matrices where they lie in their stack.

    python scripts/bench_products.py                  # on a TPU, both forms
    python scripts/bench_products.py --form xla       # anywhere

A loop over a stack of layers, as in a step, of what kernels_pallas/stacked_matmul does: norm and q, k, v; o;
norm and MLP; nothing else of a layer. The shapes are a device's share of models. The kernel is timed where a
server would leave a product to XLA, too: it decides what `MOST_MATRIX_BYTES` of its blocks.py should be. The
share is that of what a copy on this device moves. Prints a Markdown table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from bench_workload import describe_machine, print_table
from device_rates import add_ceiling_flags, measure_ceilings, time_calls
from flax import nnx

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS, KernelSet, KernelTarget, choose_kernels
from jaxserve.models.products import LayerProducts

EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A device's share of a layer."""

    name: str
    width: int
    q_width: int
    kv_width: int
    mlp_width: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each."""
        return {
            "qkv": (self.q_width + 2 * self.kv_width, self.width),
            "o": (self.width, self.q_width),
            "gate_up": (2 * self.mlp_width, self.width),
            "down": (self.width, self.mlp_width),
        }

    @property
    def layer_bytes(self) -> int:
        return 2 * sum(outputs * inputs for outputs, inputs in self.matrices.values())


SHAPES = (
    LayerShape(name="0.5B on one", width=896, q_width=896, kv_width=128, mlp_width=4864),
    LayerShape(name="8B on 8", width=4096, q_width=512, kv_width=128, mlp_width=1792),
    LayerShape(name="7B on 4", width=3584, q_width=896, kv_width=128, mlp_width=4736),
    LayerShape(name="70B on 8", width=8192, q_width=1024, kv_width=128, mlp_width=3584),
)


def describe_operands(shape: LayerShape, num_rows: int, num_layers: int) -> dict[str, jax.ShapeDtypeStruct]:
    stacks = {name: ((num_layers, *axes), jnp.bfloat16) for name, axes in shape.matrices.items()}
    norms = dict.fromkeys(("attn_norm", "mlp_norm"), ((num_layers, shape.width), jnp.float32))
    operands = {**stacks, **norms, "x": ((num_rows, shape.width), jnp.float32)}
    return {name: jax.ShapeDtypeStruct(axes, dtype) for name, (axes, dtype) in operands.items()}


def make_operands(shape: LayerShape, num_rows: int, num_layers: int) -> dict[str, jax.Array]:
    """Random, on the device; of matrices so small that sums stay what they are."""
    described = describe_operands(shape, num_rows, num_layers)
    keys = jax.random.split(jax.random.key(0), len(described))
    drawn = {
        name: jax.random.normal(key, operand.shape, operand.dtype) * operand.shape[-1] ** -0.5
        for key, (name, operand) in zip(keys, described.items(), strict=True)
    }
    return jax.block_until_ready(drawn)


def choose_form(form: str, device_kind: str) -> KernelSet:
    """A TPU's kernels, with the products of few rows for all that can be cut into blocks, or without them."""
    target = KernelTarget(
        platform="tpu",
        head_dim=128,
        num_kv_heads=1,
        page_size=128,
        kv_dtype="bfloat16",
        device_kind=device_kind,
    )
    kernels = choose_kernels(target)
    assert kernels.stacked is not None
    stacked = replace(kernels.stacked, serves=lambda *_: True) if form == "pallas" else None
    return replace(kernels, stacked=stacked)


def choose_form_here(form: str) -> KernelSet:
    device = jax.devices()[0]
    if device.platform == "tpu":
        return choose_form(form, device.device_kind)
    if form == "pallas":
        raise SystemExit(f"bench_products: the kernel is for TPUs, and this is a {device.platform}.")
    return XLA_KERNELS


def run_layers(kernels: KernelSet, q_width: int, operands: dict[str, jax.Array]) -> jax.Array:
    """The products of all layers, one behind the other: float32 [T, D]."""
    params = {name: nnx.Param(operand) for name, operand in operands.items()}

    def run_layer(layer: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_TD, y_TD = carry
        products = LayerProducts(kernels, layer, EPS)
        x_TD, qkv_TF = products.norm_multiply(x_TD, y_TD, params["attn_norm"], params["qkv"])
        y_TD = products.multiply(qkv_TF[:, :q_width], params["o"])
        return products.norm_mlp(x_TD, y_TD, params["mlp_norm"], params["gate_up"], params["down"])

    x_TD = operands["x"]
    x_TD, y_TD = jax.lax.fori_loop(0, len(operands["qkv"]), run_layer, (x_TD, jnp.zeros_like(x_TD)))
    return x_TD + y_TD


def time_shape(call: Callable[..., Any], shape: LayerShape, num_rows: int, num_layers: int) -> float:
    """Seconds a layer."""
    return time_calls(jax.jit(call), make_operands(shape, num_rows, num_layers)) / num_layers


@dataclass(frozen=True, slots=True)
class Found:
    shape: str
    rows: int
    form: str
    layer_us: float
    gb_per_s: float


def show_found(found: Found, copy_gb_per_s: float) -> list[str]:
    share = found.gb_per_s / copy_gb_per_s
    figures = f"{found.layer_us:.1f}", f"{found.gb_per_s:.0f}", f"{share:.2f}"
    return [found.shape, str(found.rows), found.form, *figures]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=("both", "pallas", "xla"), default="both", help="[%(default)s]")
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="[8 32]")
    parser.add_argument("--layers", type=int, default=16, help="of the stack [%(default)s]")
    add_ceiling_flags(parser)
    arguments = parser.parse_args()
    forms = ["xla", "pallas"] if arguments.form == "both" else [arguments.form]
    chosen = {form: choose_form_here(form) for form in forms}
    ceilings = measure_ceilings(arguments.copy_mib << 20, arguments.matmul_width)
    print(f"{ceilings}\n")
    found = []
    for shape in (shape for shape in SHAPES if arguments.only in shape.name):
        for num_rows in arguments.rows:
            for form, kernels in chosen.items():
                call = partial(run_layers, kernels, shape.q_width)
                layer_s = time_shape(call, shape, num_rows, arguments.layers)
                found.append(
                    Found(shape.name, num_rows, form, layer_s * 1e6, shape.layer_bytes / layer_s / 1e9)
                )
    show = partial(show_found, copy_gb_per_s=ceilings.copy_bytes_per_s / 1e9)
    print_table(["layer of", "rows", "form", "us a layer", "GB/s", "share"], map(show, found))
    device = jax.devices()[0]
    packages = ["jax", "libtpu"] if device.platform == "tpu" else ["jax"]
    machine = {"device": device.device_kind, **describe_machine(packages)}
    print(json.dumps({**machine, **asdict(ceilings), "products": [asdict(one) for one in found]}))


if __name__ == "__main__":
    main()
