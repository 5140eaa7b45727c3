import json

import simulation


def test_each_part_is_done_and_reads_what_the_last_has_left(tmp_path, monkeypatch):
    given = ["--images", "2000", "--dim", "16", "--folder", str(tmp_path)]
    monkeypatch.setattr(simulation, "apart", simulation.measure)  # without the time of processes
    target = tmp_path / "table.json"
    assert simulation.main([*given, "--output", str(tmp_path / "t.md"), "--json", str(target)]) == 0
    found = json.loads(target.read_text())["parts"]
    assert list(found) == list(simulation.PARTS)
    assert found["embedding pass into one file"]["said"]["bytes an image"] < 65
    assert found["search"]["said"]["recall at 10"] > 0.97
    assert found["evaluation"]["said"]["recall at 1"] > 0.7
    assert found["resume"]["said"]["the order is that of the first process"]
    assert all(part["peak MiB"] > 0 for part in found.values())

    # It is not run again in the folder of a run, and the page keeps what others have written.
    monkeypatch.setattr(simulation, "apart", None)
    assert simulation.main([*given, "--output", str(tmp_path / "t.md"), "--json", str(target)]) == 0
    page = tmp_path / "page.md"
    page.write_text(f"before\n{simulation.BEGIN}\nold\n{simulation.END}\nafter\n")
    assert simulation.main(["--publish", str(target), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "### 2 000 images, 20 clusters" in text
    assert "| index | " in text.partition("### Ten and a hundred million images")[2]
    # Of a run that was stopped, the page says what is missing, and takes it from another.
    stopped = {**json.loads(target.read_text()), "images": 9999, "note": "One more."}
    del stopped["parts"]["index"]
    (tmp_path / "stopped.json").write_text(json.dumps(stopped))
    both = [str(target), str(tmp_path / "stopped.json")]
    assert simulation.main(["--publish", *both, "--page", str(page)]) == 0
    text = page.read_text()
    assert "**Not measured**: index. One more." in text
    assert "\n| index | 2 000 | " in text
    assert "\n| search | 9 999 | " in text


def test_two_levels_compare_less():
    one, two = (simulation.comparisons(10**7, clusters) for clusters in (20_000, 20_001))
    assert two < one / 10
    assert simulation.comparisons(10**6, 10_000) == 500_000 * 10_000 * 10 + 10**10
    assert simulation.lasting(119.6) == "120 s"
    assert simulation.lasting(7200) == "2 h"
