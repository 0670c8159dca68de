"""Makes tests/goldens/beams_<model>.json: what transformers' beam search finds with SmolLM2.

Run by hand, in the environment that scripts/make_goldens.py describes and after it; the test suite only reads
the result. Takes two minutes. Knows nothing of the serving code, on purpose.

    golden-env/bin/python -m scripts.make_beam_goldens SMOLLM2_FILE

With length_penalty 0 and early stopping off transformers ranks texts by the plain sum of log-probabilities,
as our search does, but it is not the same search: its finished texts lie beside the beams and take no place
among them, so it goes on with more beams than ours does. The two agree where no text ends within the limit,
and where what those further beams come to is no better than what is finished. The prompts below are of both
kinds: some texts of quickstart_chat and emoji_chat end early, and at different lengths. (With multi_turn, for
one, transformers finds two better texts in that way.)

The sums are in float32 as transformers adds them up, so they are good to about 2e-4. The search is done
again in float64, and must find the same texts: another correct implementation then finds them too.
"""
# torch and transformers' model classes are not in the project's own environment.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.make_goldens import (
    MODELS,
    NUM_THREADS,
    check_sha256,
    describe_environment,
    in_float64,
    load_model,
    load_tokenizer,
    render_prompt,
)
from tests.goldens import read

PROMPT_NAMES = ("quickstart_chat", "lighthouse", "sql_join", "emoji_chat")
BEAM_WIDTH = 4
NUM_NEW_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("smollm2_gguf", type=Path, help="the SmolLM2-135M-Instruct Q4_1 file")
    path = parser.parse_args().smollm2_gguf
    torch.set_num_threads(NUM_THREADS)
    torch.set_grad_enabled(False)
    check_sha256(path, next(model.sha256 for model in MODELS if model.name == read.SMOLLM2))
    tokenizer = load_tokenizer(path)
    model = load_model(path.parent, gguf_file=path.name)
    stored = json.loads((read.GOLDENS_DIR / "prompts.json").read_text(encoding="utf-8"))
    prompts = {
        prompt["name"]: render_prompt(tokenizer, prompt)[1]
        for prompt in stored
        if prompt["name"] in PROMPT_NAMES
    }
    found = {name: search(model, prompt_ids, tokenizer.eos_token_id) for name, prompt_ids in prompts.items()}
    with in_float64(model):
        for name, prompt_ids in prompts.items():
            exact = search(model, prompt_ids, tokenizer.eos_token_id)
            if [beam["token_ids"] for beam in exact] != [beam["token_ids"] for beam in found[name]]:
                raise SystemExit(f"prompt {name}: float64 finds other texts than float32; choose another")
    golden = {
        "beam_width": BEAM_WIDTH,
        "max_new_tokens": NUM_NEW_TOKENS,
        "stop_id": tokenizer.eos_token_id,
        "made_with": describe_environment(),
        "prompts": found,
    }
    out = read.GOLDENS_DIR / f"beams_{read.SMOLLM2}.json"
    out.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


def search(model: Any, prompt_ids: list[int], stop_id: int) -> list[dict[str, Any]]:
    """The beams, best first: token ids with the closing stop id, and their sum of log-probabilities."""
    config = transformers.GenerationConfig(
        num_beams=BEAM_WIDTH,
        num_return_sequences=BEAM_WIDTH,
        length_penalty=0.0,
        early_stopping=False,
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        eos_token_id=stop_id,
        pad_token_id=stop_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    prompt = torch.tensor([prompt_ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    beams = []
    rows = output.sequences[:, len(prompt_ids) :].tolist()
    for token_ids, total in zip(rows, output.sequences_scores.tolist(), strict=True):
        end = token_ids.index(stop_id) + 1 if stop_id in token_ids else NUM_NEW_TOKENS
        beams.append({"token_ids": token_ids[:end], "sum": round(total, 5)})
    return beams


if __name__ == "__main__":
    main()
