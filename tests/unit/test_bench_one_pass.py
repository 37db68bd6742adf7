"""The bench of one pass: every part runs small on a CPU, and a part measured alone leaves the others."""

import json
from pathlib import Path

import pytest
from bench import one_pass


def quick(output: Path, *parts: str) -> dict[str, list[dict[str, object]]]:
    assert one_pass.main(["--quick", "--output", str(output), "--parts", *parts]) == 0
    report: dict[str, list[dict[str, object]]] = json.loads(output.read_text())
    return {name: report[name] for name in one_pass.PARTS if name in report}


@pytest.mark.slow
def test_parts_are_measured_one_by_one_into_one_file(tmp_path: Path) -> None:
    output = tmp_path / "one_pass.json"
    shared = quick(output, "shared_layers")
    assert [row["tokens"] for row in shared["shared_layers"]] == [192] * 3
    both = quick(output, "offloaded")
    assert both["shared_layers"] == shared["shared_layers"]
    assert [row["case"] for row in both["offloaded"]] == ["LoRA on all layers, tiny"]
    elsewhere = json.loads(output.read_text()) | {"machine": {"cpu": "another"}}
    output.write_text(json.dumps(elsewhere))
    assert set(quick(output, "offloaded")) == {"offloaded"}
