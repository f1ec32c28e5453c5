"""The statistics behind the study's tables, against closed forms; and the tables against the rows they are made of."""

import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.append(str(BENCHMARKS))

import long  # noqa: E402
import picture  # noqa: E402
import study  # noqa: E402
import study_report  # noqa: E402
import torch  # noqa: E402


@pytest.mark.parametrize("values, mean", [
    ([1.0, 2.0, 3.0, 100.0], 2.5),  # the outer quarters are cut
    ([0.0, 1.0, 2.0, 3.0, 90.0], 2.0),  # of five, a quarter of 1 and 3 goes too: (0.75 + 2 + 0.75 * 3) / 2.5
    ([4.0], 4.0),
    ([1.0, 3.0], 2.0),
])  # fmt: skip
def test_interquartile_mean(values, mean):
    assert study_report.iqm(torch.tensor(values)[torch.randperm(len(values))]).item() == pytest.approx(mean)
    middle, low, high = study_report.interval(values)
    assert middle == pytest.approx(mean) and min(values) <= low <= middle <= high <= max(values)


def test_paired_differences():
    """Differences 1, 2, 3: mean 2, standard deviation 1, and t = 4.303 at two degrees of freedom."""
    assert study_report.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == "+2.000 ± 2.484 (3)"
    assert study_report.paired([3.0, 4.0, 5.0], [1.0, 2.0, 3.1]) == "**+1.967 ± 0.143** (3)"  # 0 is outside
    assert study_report.paired([1.0], [0.0]) == "-"


def test_gold_at_equal_kl():
    curve = [(1.0, 0.5), (2.0, 0.7), (9.0, 0.9)]
    assert study_report.interpolate(curve, 1.5) == pytest.approx(0.6)
    assert study_report.interpolate(curve, 0.5) is None  # outside
    assert study_report.interpolate(curve, 5.0) is None  # between runs too far apart
    ours = {1: curve, 2: [(1.0, 0.6), (2.0, 0.8)], 3: curve}
    theirs = {1: [(1.0, 0.4), (2.0, 0.6)], 2: [(1.0, 0.4), (2.0, 0.6)]}  # no third seed: it is left out
    assert study_report.at_equal_kl(ours, theirs, 1.5) == "+0.150 ± 0.635 (2)"
    assert study_report.at_equal_kl(ours, theirs, 5.0) == "-"


def test_every_run_has_a_name_of_its_own():
    cells = [cell for experiment in (*study.STUDY, *study.MORE) for cell in study.cells(experiment, 1)]
    assert len({cell.key for cell in cells}) == len(cells)
    folders = [flags["output_dir"] for cell in cells for script, flags in cell.stages if script != "train_gvm"]
    assert len(set(folders)) == len(folders)


def test_the_report_is_that_of_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    study_report.main(study_report.Args(output_dir=str(tmp_path)))
    number = re.compile(r"-?\d+\.\d+")
    ours, theirs = ((folder / "report.md").read_text() for folder in (tmp_path, RESULTS))
    assert number.sub("0", ours) == number.sub("0", theirs)
    for again, committed in zip(number.findall(ours), number.findall(theirs)):  # another CPU may round the other way
        assert float(again) == pytest.approx(float(committed), abs=0.0011)


@pytest.mark.parametrize("document, start, end, at_least", [
    ("README.md", "## Results", "## ", 3),
    ("tests/benchmarks/README.md", "## Does it hold?", "## Real pairs", 20),
])  # fmt: skip
def test_the_documents_say_what_the_reports_say(document, start, end, at_least, capsys):
    """Every interval and every difference with a margin that they give stands in the reports of the rows."""
    text = (BENCHMARKS.parents[1] / document).read_text().replace("−", "-")
    study_part = text.split(f"\n{start}\n")[1].split(f"\n{end}")[0]
    figures = re.findall(r"-?\d\.\d{3} \[[^\]]+\]|\d\.\d{3} ± \d\.\d{3}", study_part)
    long.tables([json.loads(line) for line in (RESULTS / "long.jsonl").read_text().splitlines()])
    report = (RESULTS / "report.md").read_text() + capsys.readouterr().out
    assert len(figures) >= at_least and [figure for figure in figures if figure not in report] == []


def test_rows_can_be_made_again():
    """A committed run of our own trainers that bears the name of one of the study's had the same flags."""
    flags = lambda stages: {name: x for name, x in stages[-1][1].items() if not name.endswith(("_path", "output_dir"))}
    wanted = {cell.key: flags(cell.stages) for experiment in (*study.STUDY, *study.MORE)
              for seed in (*range(1, 9), study.TUNING_SEED) for cell in study.cells(experiment, seed)}  # fmt: skip
    made = {row["key"]: flags(row["stages"]) for row in study_report.read(RESULTS / "study.jsonl.gz")
            if row["key"] in wanted and row["method"] in ("dvpo", "ppo")}  # fmt: skip
    assert len(made) > 50 and made == {key: wanted[key] for key in made}


def test_the_readmes_picture_is_made_by_its_command(tiny_gvm, tmp_path):
    picture.main(picture.Args(tiny_gvm, output=str(tmp_path / "picture.svg")))
    drawn = (tmp_path / "picture.svg").read_text()
    assert "good answer, exact score 1<" in drawn and "bad answer, exact score " in drawn and len(drawn) < 100_000
