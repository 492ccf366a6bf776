"""Tests of installed packages and their versions."""

from __future__ import annotations

import sys

import numpy

from pipeline.system.packages import installed, version


def test_modules_are_found_without_importing_them() -> None:
    assert installed("numpy")
    assert installed("xml.dom.pulldom")
    assert "xml.dom.pulldom" not in sys.modules
    assert not installed("no_such_package")
    assert not installed("no_such_package.inside")


def test_versions_are_those_of_packages() -> None:
    assert version("numpy") == numpy.__version__
    assert version("no-such-package") is None
