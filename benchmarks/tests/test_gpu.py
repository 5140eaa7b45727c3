import json

import gpu
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_cuda_the_cpu_part_runs_and_says_so(tmp_path, capsys):
    output = tmp_path / "gpu.md"
    arguments = ["--device", "cpu", "--only", "K-means", "--output", str(output)]
    assert gpu.main(arguments) == 0
    assert "no CUDA" in capsys.readouterr().err
    found = json.loads(output.with_suffix(".json").read_text())
    assert found["cuda"] is False
    head, *rows = found["parts"]["K-means"]
    similar = [float(row[head.index("mean similarity")]) for row in rows]
    assert similar[0] == pytest.approx(similar[1], abs=0.03)
    assert "There was no CUDA device" in output.read_text()


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def failing(device, sizes):
        raise RuntimeError("of memory\nthere is none")

    monkeypatch.setattr(gpu, "PARTS", {"K-a": failing, "K-b": lambda *_: [["x", "y"], ["1", "2"]]})
    arguments = ["--device", "cpu", "--only", "K-", "--output", str(tmp_path / "page.md")]
    assert gpu.main(arguments) == 1
    text = (tmp_path / "page.md").read_text()
    assert "RuntimeError: of memory there is none" in text
    assert "| 1 | 2 |" in text


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path):
    arguments = ["--device", "cpu", "--minutes", "0", "--only", "K-", "--output", "-"]
    assert gpu.main(arguments) == 0


def test_a_failed_test_fails_the_run(monkeypatch, tmp_path):
    failed = {"summary": "1 failed", "failed": ["tests/a.py::b"], "status": 1}
    monkeypatch.setattr(gpu, "tests", lambda *_: failed)
    arguments = ["--device", "cpu", "--only", "-", "--output", str(tmp_path / "page.md")]
    monkeypatch.setattr(gpu, "PARTS", {})
    assert gpu.main(arguments) == 1
    assert "tests/a.py::b" in (tmp_path / "page.md").read_text()
