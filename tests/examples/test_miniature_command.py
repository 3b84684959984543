"""The miniature's commands: nothing to report, and one from real trainings to its report."""

import pytest
from examples_common.records import Store
from miniature_icons import write_icons
from miniature_paper import command
from miniature_paper.search import command as studies


@pytest.mark.parametrize(("main", "arguments"), [(command.main, []), (studies.main, ["search"])])
def test_nothing_to_report_is_an_error(tmp_path, capsys, main, arguments):
    assert main([*arguments, "--report-only", "--output", str(tmp_path)]) == 1
    assert "holds no record" in capsys.readouterr().out


@pytest.mark.slow
def test_it_trains_measures_reports_and_repeats_nothing(tmp_path):
    """Four models: CLIP and RankCLIP on both backbones."""
    write_icons(tmp_path / "icons", train=4200, validation=40, test=120)
    store = Store(tmp_path / "out" / "quick" / "results")
    line = f"--icons {tmp_path}/icons --output {tmp_path}/out --only table4 --seeds 1 --jobs 2 --device cpu"
    html = tmp_path / "out" / "quick" / "report" / "report.html"
    assert command.main(line.split()) == 0
    there = store.path.read_bytes()
    for more in ([], ["--report-only"]):
        html.unlink()
        assert command.main([*line.split(), *more]) == 0
        assert html.stat().st_size > 1000
    assert store.path.read_bytes() == there
    first_steps = {}
    for record in store.read().values():
        setting, figures = record["setting"], record.get("figures", {})
        first_steps[setting["loss"], setting["backbone"]] = record["training"]["first"]["contrastive_loss"]
        assert (len(figures.get("heat_maps", ())) == 6) == (setting["backbone"] == "resnet")
    for backbone in ("resnet", "vit"):
        # One seed has the same weights and the same first batch, whatever the loss: so seeds can be paired.
        assert first_steps["clip", backbone] == first_steps["rankclip", backbone]
    assert len(first_steps) == 4
    assert not list((tmp_path / "out" / "runs").iterdir())  # no weights are kept
