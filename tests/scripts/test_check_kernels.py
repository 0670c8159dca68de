"""check_kernels.py on the reference forms: JSON of every group, and one that fails costs no other."""

from __future__ import annotations

import json

import pytest

from scripts import check_kernels


@pytest.mark.parametrize("group", ["int4", "experts", "rope write"])
def test_a_case_is_told_in_one_line(group, capsys):
    assert check_kernels.run_group(group, "xla", 1) == []
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["kernel"], row["right"]) == (group, True)
    assert 0 <= row["error"] <= row["tolerance"]


def test_a_kernel_that_fails_is_told_with_its_reason(monkeypatch, capsys):
    def find_broken(group: str, form: str):
        raise_it = RuntimeError("no such instruction")

        def call(*arguments, **options):
            raise raise_it

        return call

    monkeypatch.setattr(check_kernels, "find_form", find_broken)
    (wrong,) = check_kernels.run_group("int4", "gpu", None)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert wrong == "int4: RuntimeError: no such instruction"
    assert (row["right"], row["failed"]) == (False, "RuntimeError: no such instruction")
