"""The table of models against slices in docs/planning.md, by the code of `jaxserve plan`.

Called by gen_docs.py. Arithmetic only: nothing is compiled, and no compiler need be installed.
"""

from __future__ import annotations

from jaxserve.config import ServerConfig
from jaxserve.planning.fit import fit_slice
from jaxserve.planning.options import PlanOptions
from jaxserve.planning.roofline import bound_serving, count_sequences
from jaxserve.planning.shapes import find_model
from jaxserve.planning.slices import list_slices

MODELS = ("qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-vl-7b", "llama-3-8b", "qwen2.5-72b", "llama-3-70b")
SLICES = ("v5e:2x2", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "v6e:4x4", "v5e:16x16", "h200:1", "h200:8")
MOST_SEQUENCES = 64
HEAD = ("model", "slice", "fits", "KV tokens", "ITL of 1, ms", "sequences", "their ITL, ms", "tokens/s")


def list_rows() -> list[tuple[str, ...]]:
    """A row for each model and slice. Sequences are as many as have pages, up to MOST_SEQUENCES a copy."""
    context = PlanOptions(topologies=SLICES).context
    rows = []
    for model in MODELS:
        config = ServerConfig(model_path=model)
        files = find_model(config)
        for where in list_slices(SLICES):
            fit = fit_slice(config, files, where, context)
            name = f"{where}, {fit.num_copies} copies" if fit.num_copies > 1 else str(where)
            if fit.blueprint is None or not fit.fits:
                missing = f"no, {fit.missing_bytes / 2**30:.1f} GiB short a device"
                rows.append((model, str(where), missing, *"-----"))
                continue
            one = bound_serving(fit.blueprint, where, fit.num_copies, context)
            number = fit.num_copies * min(count_sequences(fit.blueprint, context), MOST_SEQUENCES)
            many = bound_serving(fit.blueprint, where, number, context)
            tokens = fit.num_copies * fit.blueprint.sizes.num_tokens
            cells = (f"{tokens:,}", f"{one.itl_s * 1e3:.2f}", f"{number:,}", f"{many.itl_s * 1e3:.2f}")
            rows.append((model, name, "yes", *cells, f"{many.tokens_per_s:,.0f}"))
    return rows
