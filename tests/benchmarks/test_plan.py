"""Plans of runs on other machines, against sums by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan
from benchmarks.plan import CACHE_SHARE, CORE_SCALING, Node, Rates, load_machine, load_rates
from engine.config.settings import Data, Model, Settings
from pipeline.system.errors import InputError
from tests.benchmarks.conftest import Run

NODE = Node("n", "G", 4, 2, 16, 100, 80, 100, 10, 100, 80, 2)
RATES = Rates(500.0, 1e5, 2e5, 2e13, ("loader", "step"))
RUN: dict[str, Any] = {
    "flops_a_pair": 1e10,
    "trained": 25_000_000,
    "activation_bytes_a_pair": 50 * 2**20,
    "view_bytes_a_pair": 0,
    "held_bytes": 5 * 2**30 - 128 * 50 * 2**20,
    "norm_passes": (40, 20),
}
IMAGES = 1_000_000


def settings(bn: str = "plain", batch: int = 1024) -> Settings:
    return Settings(data=Data(batch=batch), model=Model(bn=bn))  # type: ignore[arg-type]


def plan_with(**changed: Any) -> dict[str, Any]:
    chosen = settings(**{key: value for key, value in changed.items() if key in ("bn", "batch")})
    node = replace(NODE, **{key: value for key, value in changed.items() if key not in ("bn", "batch")})
    return plan.plan(node, RATES, chosen, RUN, IMAGES)


def test_the_slowest_part_limits_the_step() -> None:
    row = plan_with()
    seconds = row["seconds"]
    assert seconds["compute"] == pytest.approx(1024 / 8 * 1e10 / 2e13)
    assert seconds["decode"] == pytest.approx(512 / (500 * 16 * CORE_SCALING))
    assert seconds["disk"] == pytest.approx(512 * 1e5 / 2e9)  # 100 GB, 75 GiB of them cached
    assert IMAGES * 1e5 > CACHE_SHARE * 100 * 2**30
    assert seconds["gradients"] == pytest.approx(2 * 3 / 4 * 1e8 / 100e9 + 2 * 1 / 2 * 1e8 / 10e9)
    assert seconds["copy"] == pytest.approx(128 * 2e5 / 10e9)
    assert seconds["exchange"] == 0  # hidden
    assert row["limit"] == "decode"
    step, keys = 512 / (500 * 16 * CORE_SCALING), 1024 * 128 * 4
    assert row["busy"]["GPU link"] == pytest.approx(3 / 4 * (2e8 + keys) / 100e9 / step)
    assert row["busy"]["network"] == pytest.approx(1 / 2 * (2e8 + keys) / 10e9 / step)
    assert row["pairs_per_second"] == pytest.approx(500 * 16 * CORE_SCALING * 2)
    assert row["hours"] == pytest.approx(IMAGES * 200 / row["pairs_per_second"] / 3600)
    assert row["gpu_hours"] == pytest.approx(8 * row["hours"])
    assert row["cores_a_gpu"] == pytest.approx(128 / seconds["compute"] / (500 * CORE_SCALING))
    assert row["memory_by_batch_gib"][128] == pytest.approx(5)
    assert "data.backend dali" in row["first"]


def test_more_of_the_limiting_resource_changes_the_limit() -> None:
    assert plan_with(cores=1000)["limit"] == "GPU"
    assert "compile" in plan_with(cores=1000)["first"]
    assert plan_with(cores=1000, disk_gbytes=0.1)["limit"] == "disk"
    assert plan_with(cores=1000, disk_gbytes=0.1, memory_gib=1000)["limit"] == "GPU"
    assert plan_with(cores=1000, host_link_gbytes=0.01)["limit"] == "copy"
    slow = plan_with(cores=1000, network_gbits=1)
    assert slow["seconds"]["exchange"] > 0.1 * slow["seconds"]["compute"]
    assert "gradient_dtype" in slow["first"]
    image = 3 * 224**2
    crops = 3 / 4 * 128 * image / 100e9 + 1 / 2 * 512 * image / 10e9
    assert plan_with(bn="shuffle")["seconds"]["crops"] == pytest.approx(crops)
    keys = 1024 * 128 * 4
    assert plan_with()["seconds"]["keys"] == pytest.approx(3 / 4 * keys / 100e9 + 1 / 2 * keys / 10e9)
    assert plan_with()["seconds"]["norms"] == 0
    assert plan_with(bn="sync")["seconds"]["norms"] == pytest.approx(60e-6 * (40 + 20))  # forward, and backward
    assert plan_with(bn="sync", nodes=1)["seconds"]["norms"] == pytest.approx(20e-6 * (40 + 20))
    with pytest.raises(InputError, match="does not divide among its 8 GPUs"):
        plan_with(batch=1020)


def test_batches_too_large_for_the_gpu_are_computed_in_parts() -> None:
    run = RUN | {"held_bytes": 2 * 2**30}  # 128 pairs take 6.25 GiB more
    node = replace(NODE, cores=1000)
    for gib, parts in ((9.0, 1), (8.9, 2), (6.0, 2), (5.0, 4), (2.2, 0)):
        row = plan.plan(replace(node, gpu_memory_gib=gib), RATES, settings(), run, IMAGES)
        assert row["parts"] == parts
        if parts:
            assert row["memory_gib"] == pytest.approx(2 + 6.25 / parts)
            assert row["hours"] > 0
        else:
            assert math.isnan(row["hours"])
            assert "activation_checkpointing" in row["first"]
    assert row["memory_by_batch_gib"][64] == pytest.approx(2 + 6.25 / 2)


def test_every_constant_is_listed_in_the_notes() -> None:
    """Except gloo's rate, which is for runs without a GPU."""
    notes = " ".join(plan.assumptions())
    constants = {
        name
        for name, value in vars(plan).items()
        if name[0] != "_" and name.isupper() and isinstance(value, float | tuple)
    }
    constants -= {"GLOO_BYTES_PER_SECOND", "OURS"}
    assert len(constants) == 8
    assert not [name for name in constants if f"({name})" not in notes]
    row = plan_with() | {"sources": RATES.sources}
    report = plan.report(settings(), [row])
    assert report.notes[-len(plan.assumptions()) :] == plan.assumptions()
    (cells,) = report.rows
    shown = dict(zip(report.headings, cells, strict=True))
    exchange = sum(row["seconds"][name] for name in ("gradients", "keys", "crops", "norms"))
    assert shown["exchange, ms a step"] == f"{1e3 * exchange:.2f}"
    assert shown["of it not hidden"] == "0.00"
    assert shown["network busy"] == f"{row['busy']['network']:.1%}"


def test_machine_files_are_validated(tmp_path: Path) -> None:
    for name in ("h200x1", "h100x8", "h100x8x4", "a100x8"):
        assert load_machine(name).name == name
    assert load_machine("h100x8x4").world == 32
    text = (Path(plan.__file__).parent / "machines" / "h100x8.yaml").read_text()
    for changed, message in (
        (text.replace("cores: 96", "cores: 0"), "cores 0: give an integer above 0"),
        (text.replace("gpu: H100\n", ""), "give gpu, gpus"),
        (text.replace("gpu_link_gbytes: 450", "gpu_link_gbytes: 0"), "the rate between its 8 GPUs"),
        ("[", "give gpu, gpus"),
        ("", "give gpu, gpus"),
        (text + "cores: 5\n", "given twice"),
        (text + "name: x\n", "give gpu, gpus"),
        (text.replace("gpu: H100", "gpu: !!python/name:os.system ''"), "is not read"),
        (text.replace("gpu: H100", "gpu: [1]"), "give its name"),
        (text.replace("cores: 96", "cores: 9.5"), "an integer above 0"),
        (text.replace("cores: 96", "cores: true"), "cores True"),
        (text.replace("nodes: 1", "nodes: 1000000000000"), "nodes 1000000000000"),
        (text.replace("gpu_tflops: 989", "gpu_tflops: .nan"), "gpu_tflops nan"),
        (text.replace("disk_gbytes: 6", "disk_gbytes: .inf"), "disk_gbytes inf"),
        (text.replace("disk_gbytes: 6", "disk_gbytes: x"), "disk_gbytes 'x'"),
        (text.replace("network_gbits: 200", "network_gbits: -1"), "network_gbits -1"),
    ):
        (tmp_path / "m.yaml").write_text(changed)
        with pytest.raises(InputError, match=message):
            load_machine(str(tmp_path / "m.yaml"))
    with pytest.raises(InputError, match="choose one of a100x8"):
        load_machine("cray")


def test_rates_come_from_the_benchmarks(tmp_path: Path) -> None:
    row = {"name": "decode-only", "threads": 1, "cpu": {"median": 700.0}, "read_bytes": 9e4, "to_device_bytes": 1.0}
    paths = {"a": row, "b": {**row, "name": "ffcv-gpu", "to_device_bytes": 3e5}}
    (tmp_path / "loader.json").write_text(json.dumps({"paths": paths}))
    (tmp_path / "step.json").write_text(
        json.dumps(
            {
                "machine": {"gpu": "NVIDIA G 80GB"},
                "tflops": {"eager": {"median": 5}, "graph": {"median": 7}, "official": {"median": 9}},
            }
        )
    )
    rates = load_rates(NODE, tmp_path / "loader.json", tmp_path / "step.json")
    assert (rates.decode, rates.record_bytes, rates.sent_bytes, rates.flops) == (700.0, 9e4, 3e5, 7e12)
    assumed = load_rates(NODE, None, None)
    assert assumed.flops == pytest.approx(plan.COMPUTE_SHARE * 1e14)
    assert assumed.sources[1].startswith("assumed")
    with pytest.raises(InputError, match="measured on NVIDIA G 80GB, not on H100"):
        load_rates(replace(NODE, gpu="H100"), tmp_path / "loader.json", tmp_path / "step.json")
    with pytest.raises(InputError, match="no decode-only with 1 thread"):
        load_rates(NODE, tmp_path / "step.json", None)


@pytest.mark.parametrize(
    "content",
    [
        [],
        5,
        {"paths": [1]},
        {"paths": {"a": 5}},
        {"paths": {"a": {"name": "decode-only", "threads": 1}}},
        {"paths": {"a": {"name": "decode-only", "threads": 1, "cpu": {"median": "9"}, "read_bytes": 1}}},
        {"paths": {"a": {"name": "decode-only", "threads": 1, "cpu": {"median": -9}, "read_bytes": 1}}},
        {"paths": {"a": {"name": "decode-only", "threads": 1, "cpu": {"median": float("nan")}, "read_bytes": 1}}},
        {"paths": {"a": {"name": "decode-only", "threads": 1, "cpu": [1], "read_bytes": 1}}},
    ],
)
def test_other_files_are_rejected(content: object, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"x\.json: .*give the JSON of a benchmark"):
        load_rates(NODE, tmp_path / "x.json", None)
    (tmp_path / "x.json").write_text(json.dumps({"tflops": content}))
    with pytest.raises(InputError, match=r"x\.json: .*give the JSON of a benchmark"):
        load_rates(NODE, None, tmp_path / "x.json")


def test_the_command_prints_and_writes_plans(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.arch", "resnet18", "--model.width", "0.25", "--data.size", "32", "--data.batch", "1024"]
    assert run(plan, "h100x8", "h100x8x4", *small, "--json", str(tmp_path / "p.json")) == 0
    plans = json.loads((tmp_path / "p.json").read_text())["plans"]
    assert [row["machine"] for row in plans] == ["h100x8", "h100x8x4"]
    assert "assumed, 19.5% of 989 TFLOP/s" in capsys.readouterr().out
