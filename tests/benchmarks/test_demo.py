"""The demo's table, and its row in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import demo
from benchmarks.common.figures import GOALS, HEADLINES, Results


def _result() -> dict[str, Any]:
    scores = {"raw pixels": (0.3, 0.33), "untrained encoder": (0.1, 0.2), "trained encoder": (0.9, 0.8)}
    rows = [
        {"seed": seed, "top1": {name: values[seed] for name, values in scores.items()}, "seconds": 270.0 + seed}
        | {"epoch": 60.0, "training_seconds": 200.0 + 10 * seed, "pairs_per_second": 900.4, "device": "cpu"}
        for seed in (0, 1)
    ]
    return {"machine": {"processor": "Old"}, "rows": rows, "capability": "AVX2"}


def test_the_table_has_a_row_a_seed() -> None:
    table = demo.report(_result())
    assert table.rows[1] == ["1", "33.0", "20.0", "80.0", "60", "900", "210", "271"]
    assert len(table.headings) == len(table.rows[0])
    assert "cpu (AVX2)" in table.notes[0]


def test_the_readme_names_the_worst_seed(tmp_path: Path) -> None:
    (tmp_path / "2026-01-01-demo-avx2.json").write_text(json.dumps(_result()))
    results = Results(tmp_path)
    ((title, text, machine),) = [row for headline in HEADLINES for row in headline(results)]
    assert title == "kNN top-1 after `./millrace demo` on two cores with AVX2, worst of 2 seeds"
    assert text == "**80.0 %** after 3.5 minutes; raw pixels 33.0 %, untrained encoder 20.0 %"
    assert machine == "Old"
    judged = {goal.title: goal.judge(results) for goal in GOALS if goal.series == "demo-avx2"}
    assert [verdict for _, verdict in judged.values()] == ["reached"] * 3
    assert [text.split(" (")[0] for text, _ in judged.values()] == ["80 %", "33 %", "3.5 min"]


def test_the_demo_is_run_with_the_seed_and_other_arguments(tmp_path: Path, monkeypatch: Any) -> None:
    def run(call: list[str], check: bool) -> Any:
        out = Path(call[call.index("--out") + 1])
        assert call[call.index("--seed") + 1 :] == ["4", "--minutes", "9"]
        (out / "run").mkdir(parents=True)
        row = _result()["rows"][1]
        (out / "run" / "summary.json").write_text(json.dumps(row))
        (out / "demo.json").write_text(json.dumps(row["top1"]))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(demo.subprocess, "run", run)
    row = demo.take(4, tmp_path / "out", ["--minutes", "9"])
    assert row["seed"] == 4
    assert row["seconds"] < 60
    assert row["top1"]["trained encoder"] == 0.8
    assert row["training_seconds"] == 210.0
