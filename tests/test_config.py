"""Settings: what a flag, a YAML key and a default come to, and the sentences that refuse the rest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxserve.config import FIELDS, ServerConfig, flag_of
from jaxserve.cuda_flags import IGNORED_FLAGS
from jaxserve.errors import ConfigError
from jaxserve.flags import build_parser, load_config, read_config_file, shipped_configs
from jaxserve.launch import make_settings, read_preferred_sampling
from jaxserve.weights.resolve import ModelFiles

ISSUE_FLAGS = """
    model-path served-model-name tokenizer-path host port dtype quantization kv-cache-dtype load-format
    context-length page-size max-total-tokens max-running-requests max-concurrent-requests
    max-queued-requests chunked-prefill-size mem-fraction-static disable-radix-cache tp-size dp-size
    random-seed chat-template api-key log-level download-dir revision stream-interval compilation-cache-dir
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    return caught.value.message


# -- where a value comes from


def test_command_line_wins_over_file_wins_over_default(tmp_path: Path):
    path = write(tmp_path, "model-path: m\nport: 8000\nstream_interval: 4\n")
    config = load_config(["--config", str(path), "--port", "9000"]).config
    assert (config.port, config.stream_interval, config.host) == (9000, 4, "127.0.0.1")


def test_command_line_wins_wherever_the_file_is_named(tmp_path: Path):
    path = write(tmp_path, "model-path: m\nport: 8000\n")
    assert load_config(["--port=9000", "--config", str(path)]).config.port == 9000


def test_keys_are_flag_names_with_either_mark_and_aliases(tmp_path: Path):
    path = write(tmp_path, "model: m\nmax-total-tokens: 100\nmax_running_requests: 3\ntp: 2\n")
    config = load_config(["--config", str(path)]).config
    assert (config.model_path, config.max_total_tokens, config.max_running_requests) == ("m", 100, 3)
    assert config.tp_size == 2


def test_flags_with_underscores_and_aliases_are_the_same_flags():
    config = load_config(["--model=m", "--max_running_requests=5", "--tensor-parallel-size", "4"]).config
    assert (config.max_running_requests, config.tp_size) == (5, 4)


def test_a_switch_in_the_file_can_be_taken_back_on_the_command_line(tmp_path: Path):
    path = write(tmp_path, "model-path: m\ndisable-radix-cache: true\n")
    assert load_config(["--config", str(path)]).config.disable_radix_cache is True
    assert (
        load_config(["--config", str(path), "--disable-radix-cache=false"]).config.disable_radix_cache
        is False
    )
    assert load_config(["--model-path", "m", "--disable-radix-cache"]).config.disable_radix_cache is True


def test_null_in_the_file_means_the_default(tmp_path: Path):
    path = write(tmp_path, "model-path: m\nport: null\napi-key:\n")
    config = load_config(["--config", str(path)]).config
    assert (config.port, config.api_key) == (30000, None)


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("8k", 8192), ("8K", 8192), ("1m", 1048576)])
def test_sizes_may_be_written_short(tmp_path: Path, text: str, tokens: int):
    path = write(tmp_path, f"model-path: m\ncontext-length: {text}\n")
    config = load_config(["--config", str(path), "--max-total-tokens", text]).config
    assert (config.context_length, config.max_total_tokens) == (tokens, tokens)


def test_a_choice_may_be_spelt_in_capitals(tmp_path: Path):
    """SGLang writes NGRAM, and so do the scripts of those who come from it."""
    config = load_config(["--model-path", "m", "--speculative-algorithm", "NGRAM"]).config
    assert config.speculative_algorithm == "ngram"
    file = tmp_path / "c.yaml"
    file.write_text("model-path: m\nspeculative-algorithm: Ngram\n")
    assert load_config(["--config", str(file)]).config.speculative_algorithm == "ngram"


def test_minus_one_is_a_value_not_a_flag():
    assert (
        load_config(["--model-path", "m", "--chunked-prefill-size", "-1"]).config.chunked_prefill_size == -1
    )


def test_dotted_paths_in_a_file_are_relative_to_it_and_other_values_are_kept(tmp_path: Path):
    path = write(tmp_path, "model-path: ./weights\nchat-template: ../t.jinja\ntokenizer-path: bytes\n")
    config = load_config(["--config", str(path)]).config
    assert config.model_path == str(tmp_path / "weights")
    assert config.chat_template == str(tmp_path.parent / "t.jinja")
    assert config.tokenizer_path == "bytes"
    assert load_config(["--model-path", "./weights"]).config.model_path == "./weights"


# -- shipped configs


def test_shipped_configs_are_found_with_and_without_suffix_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("qwen", "qwen.yaml"):
        assert load_config(["--config", name]).config.model_path == "Qwen/Qwen2.5-0.5B-Instruct"
    write(tmp_path, "model-path: mine\n", "qwen.yaml")
    assert load_config(["--config", "qwen.yaml"]).config.model_path == "mine"


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_each_shipped_config_is_valid_and_begins_with_a_sentence(name: str):
    options = load_config(["--config", name])
    first_line = shipped_configs()[name].read_text(encoding="utf-8").splitlines()[0]
    assert options.warnings == ()
    assert first_line.startswith("# ")
    assert first_line.endswith(".")


def test_the_tiny_config_points_at_a_model_description_that_ships_beside_it():
    config = load_config(["--config", "tiny"]).config
    description = json.loads((Path(config.model_path) / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = description["num_attention_heads"], description["num_key_value_heads"]
    assert (config.load_format, config.tokenizer_path) == ("dummy", "bytes")
    assert heads % kv_heads == 0
    assert description["hidden_size"] % (2 * heads) == 0, "rotary embeddings need an even head width"


# -- refusals


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--port", "99999"], "port must be a whole number from 1 to 65535, got 99999."),
        (["--port", "eighty"], 'port must be a whole number from 1 to 65535, got "eighty".'),
        (["--port", "1.5"], 'port must be a whole number from 1 to 65535, got "1.5".'),
        (["--dtype", "fp8"], 'dtype must be one of auto, bfloat16, float32, got "fp8".'),
        (
            ["--mem-fraction-static", "1.2"],
            "mem_fraction_static must be a number from 0.05 to 0.98, got 1.2.",
        ),
        (
            ["--mem-fraction-static", "nan"],
            "mem_fraction_static must be a number from 0.05 to 0.98, got NaN.",
        ),
        (["--chunked-prefill-size", "0"], "at least 1, such as 8192 or 8k, or -1, got 0."),
        (["--disable-radix-cache", "maybe"], 'disable_radix_cache must be true or false, got "maybe".'),
        (["--preferred-sampling-params", "top_p=1"], 'must be an object such as {"temperature": 0.7}, got'),
        (["--served-model-name", ""], 'served_model_name must be text, not empty, got "".'),
        (["--port"], "--port: expected one argument."),
        (["--prot", "1"], "Unknown flag --prot. Did you mean --port?"),
        (
            ["--max-runing-requests=4"],
            "Unknown flag --max-runing-requests. Did you mean --max-running-requests?",
        ),
        (["--config", "qwenn.yaml"], "Did you mean qwen.yaml?"),
        (["--config", "qwen", "--config", "tiny"], "--config was given 2 times"),
        (["Qwen/Qwen2.5-0.5B"], "write --model-path Qwen/Qwen2.5-0.5B."),
    ],
)
def test_a_wrong_command_line_is_refused_in_a_sentence(argv: list[str], sentence: str):
    assert sentence in refusal("--model-path", "m", *argv)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot: 1", "line 2: unknown key prot. Did you mean port?"),
        ("port: 1\nport: 2", "line 3: port is set a second time."),
        ("tp-size: 1\ntp_size: 2", "line 3: tp_size is set a second time."),
        ("model: n", "line 2: model is set a second time."),
        ("port: true", "port must be a whole number from 1 to 65535, got true."),
        ("port: [1, 2]", "port must be a whole number from 1 to 65535, got [1, 2]."),
        ("disable-radix-cache: 1", "disable_radix_cache must be true or false, got 1."),
        ("revision: 1234567", "revision must be text, not empty, got 1234567 (put it in quotes)."),
        ("port: 1\n  host: x", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_line(tmp_path: Path, text: str, sentence: str):
    path = write(tmp_path, f"model-path: m\n{text}\n")
    message = refusal("--config", str(path))
    assert str(path) in message
    assert sentence in message


def test_a_file_must_be_a_mapping_and_may_be_empty(tmp_path: Path):
    assert "key: value" in refusal("--config", str(write(tmp_path, "- port\n")))
    assert read_config_file(write(tmp_path, "# nothing yet\n")) == {}


def test_no_model_is_an_error_that_names_the_ways_out():
    assert "--model-path" in refusal()
    assert "smollm2.yaml" in refusal("--port", "1")


def test_the_library_is_held_to_the_same_ranges():
    with pytest.raises(ConfigError, match="port must be a whole number from 1 to 65535, got 0"):
        ServerConfig(model_path="m", port=0)


def test_preferred_sampling_params_are_json_on_the_command_line_and_a_mapping_in_a_file(tmp_path: Path):
    path = write(tmp_path, "model-path: m\npreferred-sampling-params:\n  top_p: 0.5\n  logit_bias: {5: 1}\n")
    config = load_config(["--config", str(path)]).config
    assert config.preferred_sampling_params == {"top_p": 0.5, "logit_bias": {"5": 1}}
    files = ModelFiles(
        kind="dummy", model_id="m", local_dir=tmp_path, files=(), hf_config={}, generation_config={}
    )
    assert make_settings(config, files, []).preferred_sampling_params == config.preferred_sampling_params
    argv = ["--config", str(path), "--preferred-sampling-params", '{"top_k": 7}']
    assert load_config(argv).config.preferred_sampling_params == {"top_k": 7}


@pytest.mark.parametrize(
    ("preferred", "sentence"),
    [
        ({"top_q": 1}, "top_q is not a known field. Did you mean top_p?"),
        ({"max_tokens": 5}, "Did you mean max_new_tokens?"),
        ({"temperature": "hot"}, "temperature must be a number or null, got a string."),
        ({"top_p": 2}, "top_p must be in (0, 1], got 2"),
        ({"stop_regex": "a*"}, "matches the empty text"),
        ({"regex": "a"}, "regex is not supported"),
    ],
)
def test_preferred_sampling_params_are_checked_at_launch_as_a_requests_are(preferred: dict, sentence: str):
    with pytest.raises(ConfigError) as caught:
        read_preferred_sampling(preferred)
    assert caught.value.message.startswith("preferred_sampling_params: ")
    assert sentence in caught.value.message


# -- flags of other engines


def test_cuda_flags_are_accepted_and_each_is_named_with_its_reason(tmp_path: Path):
    path = write(tmp_path, "model-path: m\ncuda-graph-max-bs: 4\ndisable-overlap-schedule: false\n")
    argv = [
        "--disable-cuda-graph",
        "--cuda-graph-bs",
        "1",
        "2",
        "--attention-backend",
        "fa3",
        "--port",
        "8000",
    ]
    options = load_config(["--config", str(path), *argv])
    assert options.config.port == 8000
    assert [warning.split(" is ignored: ")[0] for warning in options.warnings] == [
        f"--cuda-graph-max-bs (from {path})",
        "--disable-cuda-graph (from the command line)",
        "--cuda-graph-bs (from the command line)",
        "--attention-backend (from the command line)",
    ]
    assert "CUDA graphs" in options.warnings[0]


def test_no_setting_of_ours_is_in_the_table_of_ignored_flags():
    assert not set(IGNORED_FLAGS) & set(FIELDS)


# -- one source


def test_every_flag_of_the_issue_is_there_with_help():
    text = build_parser("jaxserve launch").format_help()
    for flag in ISSUE_FLAGS.split():
        assert f"--{flag} " in text
    assert all(flag_of(field).help for field in FIELDS.values())


def test_the_key_is_masked_wherever_the_config_is_shown():
    config = ServerConfig(model_path="m", api_key="s3cret")
    assert "s3cret" not in repr(config)
    assert "s3cret" not in str(config.shown())
    assert dataclasses.asdict(config)["api_key"] == "s3cret", "the HTTP side needs it"
    assert ServerConfig(model_path="m").shown()["api_key"] is None


def test_a_refused_key_is_not_told(tmp_path: Path):
    assert "12345" not in refusal("--config", str(write(tmp_path, "model-path: m\napi-key: 12345\n")))


def test_a_config_survives_the_way_to_another_process():
    config = ServerConfig(model_path="m", max_total_tokens=4096, api_key="k")
    assert ServerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
