"""The crash test itself: trainings that are killed go on to the same end, and a fault would be seen."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from crash.__main__ import table


ROOT = Path(__file__).parents[1]
# A kill in the middle of the fourth checkpoint, which no load of the machine makes miss.
AIMED = "import crash.tries as t; t.MOST_KILLS = 1; "
AIMED += "t.draw_kill = lambda rng, r, again: t.Kill('checkpoint', 4, r.spans[0]['checkpoint'][3] / 3); "
STOCK = "import hf_selfkd.checkpoints as c, transformers.trainer_utils as u; "
STOCK += "c.Checkpoints._last_whole_checkpoint = lambda self: u.get_last_checkpoint(self.args.output_dir)"
FORGETS = "import hf_selfkd.teachers.history as h; h.HistoryTeacher.load = lambda *arguments: None"


def kill(tmp_path, tries, *flags, fault="", processes=1):
    """Run the crash test with a fault put in first; gives the lines of its tries and its exit code."""
    tmp_path.mkdir(exist_ok=True)
    output = tmp_path / "results.jsonl"
    argv = ["--tries", tries, "--processes", processes, "--folder", tmp_path / "runs", "--output", output, *flags]
    code = f"import sys; sys.argv[1:] = {list(map(str, argv))!r}; import crash.__main__ as crash; {fault or 'pass'}\n"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code + "crash.main()"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(results) == tries and f"{tries} tries" in done.stdout
    return results, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_trainings_that_are_killed_end_as_if_nobody_had(tmp_path, processes):
    results, code = kill(tmp_path, 2, "--teacher", "history", fault=AIMED, processes=processes)
    assert code == 0 and [result["lost"] for result in results] == [None] * 2
    assert all(result["kills"] for result in results) and all(len(result["begun"]) > 1 for result in results)
    assert not list((tmp_path / "runs").glob("try-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lost"), [(STOCK, "exit codes"), (FORGETS, "final weights")], ids=["newest folder", "no teacher"]
)
def test_a_fault_is_seen(tmp_path, fault, lost):
    """The control: the newest folder is taken, whole or not, as `Trainer` does; the teacher's state is not loaded."""
    results, code = kill(tmp_path, 1, "--teacher", "history", fault=AIMED + fault)
    assert code == 1 and lost in results[0]["lost"]
    assert list((tmp_path / "runs").glob("try-*"))  # to be looked at


@pytest.mark.slow
def test_an_upload_that_is_killed_leaves_nothing_behind(tmp_path):
    """The last upload of a checkpoint, after which the model comes twice; and the control, in which its copy stays."""
    aimed = "crash.serve(); crash.serve = lambda: None; "  # before anything imports the client
    aimed += "import crash.tries as t; t.MOST_KILLS = 1; t.draw_kill = lambda rng, r, again: "
    aimed += "t.Kill('upload', len(r.spans[0]['upload']) - 2, r.spans[0]['upload'][-3] / 2); "
    stays = "import hf_selfkd.checkpoints as c; c.forget_copies = lambda trainer: None"
    for folder, fault, code, lost in (
        ("ours", "", 0, None),
        ("stays", stays, 1, "copies for the Hub were left behind"),
    ):
        results, found = kill(tmp_path / folder, 1, "--teacher", "uploads", fault=aimed + fault)
        assert (found, results[0]["lost"]) == (code, lost)
        assert [one["died_in"] for one in results[0]["kills"]] == ["upload"]


def test_a_moment_depends_on_the_seed_alone():
    from crash.tries import PHASES, Reference, draw_kill

    reference = Reference(None, [{phase: [0.5, 1.0] for phase in PHASES}, {phase: [0.1] for phase in PHASES}])
    drawn = [[draw_kill(random.Random(seed), reference, True) for seed in range(50)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {one.phase for one in drawn[0]} == set(PHASES) and {one.rank for one in drawn[0]} == {0, 1}
    assert all(0 <= one.delay <= 1 and 1 <= one.occurrence <= 2 for one in drawn[0])
    assert all(draw_kill(random.Random(seed), reference, False).phase != "resume" for seed in range(50))


def test_the_table_counts_kills_and_losses_by_phase():
    kills = [{"phase": "step", "died_in": died, "process": 0} for died in ("step", "rotation", "step")]
    results = [{"kills": kills[:2], "lost": None}, {"kills": kills[2:], "lost": "final weights"}]
    assert table(results) == [
        {"phase": "rotation", "kills": 1, "losses": 0},
        {"phase": "step", "kills": 2, "losses": 1},
    ]


def test_the_page_has_the_figures_of_the_log():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    lines = (ROOT / "docs/results/crash_test.jsonl").read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines]
    assert not any(result["lost"] for result in results)
    counts = []
    for processes in (1, 2):
        own = [result for result in results if result["processes"] == processes]
        deaths = {line["phase"]: line["kills"] for line in table(own)}
        assert f"| {len(own)} tries, {sum(deaths.values())} kills | 0 |" in page
        counts.append(deaths)
    for phase in counts[0]:
        assert f"| {counts[0][phase]} | {counts[1].get(phase, 0)} | 0 |" in page, phase
    lines = (ROOT / "docs/results/crash_test_uploads.jsonl").read_text(encoding="utf-8").splitlines()
    uploads = [json.loads(line) for line in lines]
    deaths = {line["phase"]: line["kills"] for line in table(uploads)}
    assert not any(result["lost"] for result in uploads)
    assert f"| {len(uploads)} tries, {sum(deaths.values())} kills | 0 |" in page
    assert f"{deaths['upload']} of {sum(deaths.values())} kills met an upload" in page
    starts = [whole for result in results for whole in result["stock_choice_is_whole"][1:]]
    assert f"In {starts.count(False)} of the {len(starts)} starts" in page
