"""Benchmarks import their neighbours by bare name, as they do when they are run as scripts."""

from __future__ import annotations

import sys

from tests.source_tree import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
