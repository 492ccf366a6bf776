"""The Triton kernels compile for GPUs: the compiler refuses code that its interpreter accepts."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from types import ModuleType

import pytest

from tests import processes

pytest.importorskip("triton")

Types = dict[str, str]
NORM_OUTPUTS = {"moments": "*fp32", "combine": "*fp32", "normalize": "*bf16"}
NORM_OUTPUTS |= {"gradient_sums": "*fp32", "input_gradient": "*bf16"}
NORM_TYPES = dict.fromkeys(("x", "gradient"), "*bf16") | dict.fromkeys(("momentum", "eps", "share"), "fp32")
NORM_TYPES |= dict.fromkeys(("splits", "parts", "channels", "rows", "total", "length"), "i32")
NORM_TYPES |= dict.fromkeys(("statistics", "weight", "bias", "sums"), "*fp32")
NORM_TYPES |= dict.fromkeys(("partial", "running_mean", "running_var"), "*fp32")
NORM_CONSTANTS = {"ROWS": 64, "CHANNELS": 64, "AFFINE": True, "RUNNING": True}

AUGMENT_OUTPUTS = {"crop_view": "*u8", "sum_luma": "", "color": "*bf16", "blur_rows": "", "blur_columns": "*bf16"}
AUGMENT_TYPES = {"starts": "*i64", "widths": "*i64", "boxes": "*i32", "flips": "*u8", "parameters": "*fp32"}
AUGMENT_TYPES |= {"sums": "*i32", "blurs": "*i64", "rows": "*fp32", "pixels": "*u8", "crops": "*u8", "colored": "*u8"}
AUGMENT_CONSTANTS = {"SIZE": 224, "PIXELS": 224 * 224, "BLOCK": 256, "RADIUS": 6, "GRAY_FIRST": False}


@pytest.mark.parametrize("capability", [90, *(pytest.param(older, marks=pytest.mark.slow) for older in (80, 89))])
def test_kernels_compile_for_a_gpu(capability: int, pytestconfig: pytest.Config) -> None:
    """Triton's cache lasts between runs, so that only kernels that have changed take time."""
    assert pytestconfig.cache is not None
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    compiled, errors = processes.call(compile_kernels, capability, env=environment).communicate(300)
    assert len(compiled.splitlines()) == len(NORM_OUTPUTS) + len(AUGMENT_OUTPUTS), errors


def compile_kernels(capability: int) -> None:
    """Compile all kernels, and print a line for each; in a process of its own, as it imports Triton anew."""
    warnings.simplefilter("ignore")  # Triton 3.9 warns of a default that no launch relies on
    for name in list(sys.modules):  # imported with the interpreter in place of the compiler
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    compile_all("methods.norm_kernels", NORM_TYPES, NORM_OUTPUTS, NORM_CONSTANTS, capability)
    compile_all("pipeline.augment.triton_kernels", AUGMENT_TYPES, AUGMENT_OUTPUTS, AUGMENT_CONSTANTS, capability)


def compile_all(path: str, types: Types, outputs: Types, constants: dict[str, int], capability: int) -> None:
    """Compile a module's kernel `_NAME` for each NAME of `outputs`, which gives the type of its argument `out`."""
    module: ModuleType = importlib.import_module(path)
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, out in outputs.items():
        kernel = getattr(module, f"_{name}")
        kernel = getattr(kernel, "function", kernel)
        known = types | {"out": out}
        signature = {argument: known.get(argument, "constexpr") for argument in kernel.arg_names}
        constexprs = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        print(name, len(compile_kernel(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]))
