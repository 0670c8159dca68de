"""The command: instant help, one-line errors, resolved settings as YAML, progress and log lines."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxserve import __version__
from jaxserve.cli import main, mask_secrets
from jaxserve.flags import load_config
from jaxserve.log import set_up_logging
from jaxserve.progress import Progress, format_duration

HEAVY_MODULES = ("jax", "numpy", "transformers", "sanic", "rich", "tokenizers")


@pytest.fixture(autouse=True)
def _restored_logging():
    root = logging.getLogger()
    loggers = [root, logging.getLogger("jaxserve"), logging.getLogger("jaxserve.access")]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["launch", "--help"], ["configs"], ["config", "--config", "qwen"], ["plan", "--help"]],
)
def test_help_and_config_import_nothing_heavy(argv: list[str]):
    script = (
        "import sys; from jaxserve.cli import main; status = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY_MODULES} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout


@pytest.mark.parametrize("module", ["jaxserve", "jaxserve.launch_server"])
def test_both_modules_run_the_command(module: str):
    argv = [sys.executable, "-m", module, *(["launch"] if module == "jaxserve" else []), "--prot", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "jaxserve: error: Unknown flag --prot. Did you mean --port?\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxserve {__version__}\n"
    assert main([]) == 0
    assert "jaxserve launch --config smollm2.yaml" in capsys.readouterr().out


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["lanch"]) == 2
    assert (
        capsys.readouterr().err == "jaxserve: error: Unknown command lanch. Did you mean `jaxserve launch`?\n"
    )


def test_config_prints_what_config_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    argv = ["--config", "tiny", "--api-key", "s3cret", "--max-total-tokens", "2k"]
    assert main(["config", *argv]) == 0
    printed = capsys.readouterr().out
    assert "s3cret" not in printed
    again = tmp_path / "again.yaml"
    again.write_text(printed, encoding="utf-8")
    assert yaml.safe_load(printed)["max-total-tokens"] == 2048
    assert load_config(["--config", str(again), "--api-key", "s3cret"]).config == load_config(argv).config


def test_ignored_flags_are_logged_as_warnings(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--config", "tiny", "--disable-cuda-graph", "--log-level", "warning"]) == 0
    assert "WARNING cli: --disable-cuda-graph (from the command line) is ignored:" in capsys.readouterr().err


def test_configs_lists_each_with_its_first_line(capsys: pytest.CaptureFixture[str]):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("qwen.yaml ")).endswith(
        "the model of the quickstart."
    )


def test_the_shown_command_line_has_no_key():
    argv = ["--api-key", "s3cret", "--port", "1", "--api_key=s3cret"]
    assert mask_secrets(argv) == ["--api-key", "***", "--port", "1", "--api_key=***"]


# -- log lines and progress


def test_a_log_line_has_time_level_and_room(capsys: pytest.CaptureFixture[str]):
    set_up_logging("info")
    set_up_logging("info")
    logging.getLogger("jaxserve.engine.loop").info("up")
    logging.getLogger("jaxserve.engine.loop").debug("hidden")
    logging.getLogger("somebody.else").info("hidden")
    (line,) = capsys.readouterr().err.splitlines()
    assert line[0] == "["
    assert line[20:] == "] INFO engine.loop: up"


def test_level_warning_hides_info(capsys: pytest.CaptureFixture[str]):
    set_up_logging("warning")
    logging.getLogger("jaxserve.engine").info("hidden")
    logging.getLogger("jaxserve.engine").warning("shown")
    assert capsys.readouterr().err.count("\n") == 1


def test_requests_may_be_logged_at_a_level_of_their_own(capsys: pytest.CaptureFixture[str]):
    set_up_logging("info", "warning")
    logging.getLogger("jaxserve.access").info("hidden")
    logging.getLogger("jaxserve.launch").info("shown")
    set_up_logging("info")
    logging.getLogger("jaxserve.access").info("shown")
    assert capsys.readouterr().err.count("shown") == 2


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_away_from_a_terminal_progress_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jaxserve")
    clock = Clock()
    progress = Progress("info", is_terminal=False, clock=clock)
    for tick in range(41):  # 100 MB at 2.5 MB a tick, four ticks a second
        clock.now_s = tick / 4
        progress.update("Downloading x", tick * 2.5e6, 100e6)
    assert caplog.messages[:3] == [
        "Downloading x: 0 % (0 B of 100.0 MB)",
        "Downloading x: 10 % (10.0 MB of 100.0 MB), about 9.0 s left",
        "Downloading x: 20 % (20.0 MB of 100.0 MB), about 8.0 s left",
    ]
    assert caplog.messages[-1] == "Downloading x: done, 100.0 MB in 10 s"
    assert len(caplog.messages) == 11


def test_a_slow_stage_still_speaks_and_a_resumed_one_estimates_from_where_it_began(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO", "jaxserve")
    clock = Clock()
    progress = Progress("info", is_terminal=False, clock=clock)
    progress.update("Compiling", 10, 20, "programs")
    for done, clock.now_s in ((11, 2.0), (11, 4.0), (12, 6.0)):
        progress.update("Compiling", done, 20, "programs")
    assert caplog.messages[1:] == ["Compiling: 60 % (12 of 20 programs), about 24 s left"]
    progress.finish("Compiling")
    progress.finish("Compiling")
    assert caplog.messages[2:] == ["Compiling: done, 20 programs in 6.0 s"]


def test_without_logging_progress_is_printed(capsys: pytest.CaptureFixture[str]):
    logging.getLogger("jaxserve").setLevel("WARNING")
    Progress("info", is_terminal=False).update("Downloading x", 1e6, 2e6)
    assert capsys.readouterr().err == "Downloading x: 50 % (1.0 MB of 2.0 MB)\n"


def test_progress_is_silent_at_level_warning(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG", "jaxserve")
    with Progress("warning", is_terminal=True) as progress:
        progress.update("Downloading x", 1, 2)
        progress.finish("Downloading x")
    assert caplog.messages == []
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str]):
    with Progress("info", is_terminal=True) as progress:
        progress.update("Loading x", 5e6, 10e6)
        progress.update("Loading x", 10e6, 10e6)
    assert "Loading x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (12, "12 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")]
)
def test_durations_read_naturally(seconds: float, text: str):
    assert format_duration(seconds) == text
