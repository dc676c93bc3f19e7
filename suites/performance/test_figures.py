"""The figures of speed in docs/benches.md are those of the files that the bench wrote."""

from moe_harness.suites.performance import ROOT, figures, model_figures


def test_the_page_equals_the_files() -> None:
    text = figures.PAGE.read_text()
    assert {found[1] for found in figures.MARKED.findall(text)} == set(figures.SECTIONS)
    assert figures.rewritten(text) == text, "run python -m moe_harness.suites.performance.figures"


def test_figures_come_from_the_command_with_nothing_left_out() -> None:
    named = [figures.FIRST, *(f"experts-{m}.json" for m in figures.MODELS), *(f"{s}.json" for s in figures.SMALL)]
    for name in (*named, *(f"called-{stage}-qwen3-30b-a3b.json" for stage in figures.CALLED)):
        report = figures.read(name)
        assert report.command.startswith("moe-harness bench --stage ")
        assert name in report.command or name not in named
        assert not report.stopped
        assert all(t.median > 0 or t.refused for t in report.timings)


def test_the_readme_tells_the_committed_speeds() -> None:
    told = (ROOT / "README.md").read_text()
    for run in ("whole_model_h200.json", "whole_model_vllm_h200.json"):
        assert f" {model_figures.speeds(model_figures.read(run)).partition(' ')[0]} " in told, run
