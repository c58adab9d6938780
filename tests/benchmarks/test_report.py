"""The report says what the JSON files say, and nothing else."""

from pathlib import Path

import pytest

from benchmarks.figures import draw_curves
from benchmarks.report import main
from benchmarks.result import Curve

from .test_result import make_result


@pytest.fixture
def page(tmp_path: Path) -> str:
    make_result().write(tmp_path / "results" / "mixed.json")
    main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    return (tmp_path / "docs" / "results.md").read_text()


def test_tables_name_command_machine_and_figures(page: str, tmp_path: Path) -> None:
    result = make_result()
    assert "Command: `python -m benchmarks.mixed`" in page
    assert f"Machine: {result.machine.cpu}, {result.machine.cores} cores" in page
    assert "| HMI | set-up of HMI | 300 (300 to 400) |  |" in page
    assert "| peer | set-up of peer | 150 (150 to 200) | 2.00x (2.00 to 2.00) |" in page
    assert "| bigrams found | 62.5% |" in page
    assert "| 100 | 50.0% |" in page
    assert "A note." in page
    assert "ranks: 8/64; tables: a 1,000" in page
    assert "--quick" not in page
    for figure in ("mixed-a-case.svg", "mixed-hits.svg"):
        assert f"(figures/{figure})" in page
        assert (tmp_path / "docs" / "figures" / figure).read_text().startswith("<?xml")


def test_same_results_give_the_same_files(page: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tmp_path / "docs").rglob("*") if path.is_file()}
    main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    assert before == {
        path.name: path.read_bytes() for path in (tmp_path / "docs").rglob("*") if path.is_file()
    }


def test_quick_runs_are_marked(tmp_path: Path) -> None:
    make_result(is_quick=True).write(tmp_path / "results" / "mixed.json")
    main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    assert "measures nothing" in (tmp_path / "docs" / "results.md").read_text()


def test_no_results_is_said(tmp_path: Path) -> None:
    main(["--results", str(tmp_path / "none"), "--docs", str(tmp_path / "docs")])
    assert "No results yet" in (tmp_path / "docs" / "results.md").read_text()


def test_that_no_gpu_was_measured_is_said(page: str) -> None:
    assert "## How fast are the kernels on a GPU?" in page
    assert "No GPU run has ended in full yet" in page


def test_a_figure_with_a_zero_on_its_logarithmic_axis_is_drawn_straight(tmp_path: Path) -> None:
    curve = Curve(figure="f", name="ours", x_label="x", y_label="y", x=(0, 50, 100), y=(0.1, 0.2, 0.3))
    pictures = []
    for scale in ("log", "linear"):
        scaled = curve.model_copy(update={"x_scale": scale})
        pictures.append(draw_curves([scaled], tmp_path / f"{scale}.svg").read_bytes())
    assert pictures[0] == pictures[1]
