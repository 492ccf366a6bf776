"""What tests of benchmarks share."""

from tests.engine.conftest import fresh_accelerator

__all__ = ["fresh_accelerator"]
