import json

import simulation


def test_each_part_is_done_and_reads_what_the_last_has_left(tmp_path, monkeypatch):
    given = ["--images", "2000", "--dim", "16", "--folder", str(tmp_path)]
    found = {}

    class Done:
        returncode = 0

        def __init__(self, command, **_):
            said = []
            monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(words[0]))
            simulation.main(command[2:])
            monkeypatch.undo()
            monkeypatch.setattr(simulation.subprocess, "run", Done)
            self.stdout = said[-1]

    monkeypatch.setattr(simulation.subprocess, "run", Done)  # without the time of new processes
    target = tmp_path / "table.json"
    assert simulation.main([*given, "--output", str(tmp_path / "t.md"), "--json", str(target)]) == 0
    found = json.loads(target.read_text())["parts"]
    assert list(found) == list(simulation.PARTS)
    assert found["embedding pass into one file"]["said"]["bytes an image"] < 65
    assert found["search"]["said"]["recall at 10"] > 0.97
    assert found["evaluation"]["said"]["recall at 1"] > 0.7
    assert found["resume"]["said"]["the order is that of the first process"]
    assert all(part["peak MiB"] > 0 for part in found.values())
