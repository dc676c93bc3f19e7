"""The figures of speed of docs/benches.md, from the files in suites/performance/data that the benches wrote.

python -m moe_harness.suites.performance.figures            rewrites docs/benches.md and docs/performance.svg
"""

import re
from functools import partial

from moe_harness.harness.bench.pictures import remarks
from moe_harness.harness.bench.timing import BenchReport, Timing
from moe_harness.suites.performance import DATA, ROOT, header, model_figures, ranked_figures, row, spread_figures

PAGE, PICTURE = ROOT / "docs/benches.md", ROOT / "docs/performance.svg"
MARKED = re.compile(
    r"(<!-- figures: (\w+), by python -m moe_harness.suites.performance.figures -->\n)"
    r".*?(<!-- end of figures -->\n)",
    re.DOTALL,
)
FIRST = "experts-qwen3-30b-a3b.json"
MODELS = ("qwen3-235b-a22b", "qwen3-next-80b-a3b", "mixtral-8x7b", "deepseek-v3-ep8")
SMALL = (
    "router-qwen3-30b-a3b", "router-qwen3-next-80b-a3b", "shared_expert_gate-qwen3-omni-talker",
    "shared_expert_gate-qwen3-next-80b-a3b",
)  # fmt: skip


def read(name: str) -> BenchReport:
    return BenchReport.read(DATA / (name if name.endswith(".json") else f"{name}.json"))


def by_spec(report: BenchReport) -> dict[str, dict[int, Timing]]:
    """Timings of a report by implementation and number of tokens."""
    found: dict[str, dict[int, Timing]] = {}
    for timing in report.timings:
        found.setdefault(timing.spec, {})[timing.tokens] = timing
    return found


def over_floor(timing: Timing) -> str:
    """Time over floor; "-" for what was not timed, and the number of launches where the floor is one launch."""
    if not timing.median:
        return "-"
    ratio = timing.median / timing.floor
    return f"{ratio:.0f} launches" if timing.bound_by == "launch" else f"{ratio:.2f}"


def experts_table(report: BenchReport) -> list[str]:
    """Time over floor of every implementation that was timed at all."""
    specs = {spec: timings for spec, timings in by_spec(report).items() if any(t.median for t in timings.values())}
    tokens = list(next(iter(specs.values())))
    lines = header("tokens", *tokens)
    for spec, timings in specs.items():
        lines.append(row(f"`{spec}`", *(over_floor(timings[t]) for t in tokens)))
    return [*lines, "", *(f"- {remark}" for remark in remarks(report) if remark.split()[0] in specs)]


def models_table(reports: list[BenchReport]) -> list[str]:
    """Time over floor of the Triton experts and how many times grouped_mm's speed that is, for each model."""
    tokens = list(by_spec(reports[0])["triton"])
    lines = header("tokens", *tokens)
    for report in reports:
        ours, peer = by_spec(report)["triton"], by_spec(report)["transformers:grouped_mm"]
        part = f", one rank of EP {report.ep_size}" if report.ep_size > 1 else ""
        lines.append(row(f"{report.model['name']}{part}", *(over_floor(ours[t]) for t in tokens)))
        lines.append(row("... times as fast", *(faster(ours[t], peer[t]) for t in tokens)))
    return lines


def faster(ours: Timing, peer: Timing) -> str:
    return f"{peer.median / ours.median:.1f}" if ours.median and peer.median else "-"


def small_table(report: BenchReport) -> list[str]:
    """Microseconds, the plain expression's, and the share of the floor, of a router or gate."""
    (ours_name, ours), (peer_name, peer) = by_spec(report).items()
    model = report.model
    size = f"E {model['num_experts']}, k {model['top_k']}" if report.stage == "router" else f"K {model['hidden_size']}"
    lines = header(f"{report.stage}, {size}", *ours)
    lines.append(row(f"`{ours_name}`, us", *(f"{t.median:.1f}" for t in ours.values())))
    lines.append(row(f"times as fast as `{peer_name}`", *(faster(t, peer[n]) for n, t in ours.items())))
    lines.append(row("share of the floor", *(f"{t.floor / t.median:.0%} ({t.bound_by})" for t in ours.values())))
    return lines


def spread(reports: list[BenchReport], spec: str) -> float:
    """The widest distance from the slowest to the fastest round over the median, of the timings above 10 us."""
    return max((t.high - t.low) / t.median for r in reports for t in by_spec(r)[spec].values() if t.median > 10)


def bench() -> list[str]:
    """What `moe-harness bench` measured on one GPU."""
    first, models, small = read(FIRST), [read(f"experts-{m}") for m in MODELS], [read(name) for name in SMALL]
    versions = ", ".join(f"{name} {first.versions[name]}" for name in ("torch", "triton", "transformers"))
    ceilings = f"{first.copy_bandwidth / 1e6:.2f} TB/s, {first.matrix_rate / 1e6:.0f} TFLOP/s"
    intro = (
        f"One {first.device}, {first.dtype} ({versions}): time over the floor that the ceilings of the same run set "
        f"({ceilings}).\n{first.model['name']} ([figures](../suites/performance/data/{FIRST})):"
    )
    outro = (
        "Reading weights alone is a little faster than copying, so a ratio may fall below 1. Medians of 11 rounds; "
        "the widest spread of a `triton` figure above 10 us is "
        f"{spread([first, *models, *small], 'triton'):.0%} of its median."
    )
    parts = [
        [intro],
        experts_table(first),
        ["Other models, and how many times as fast as `transformers:grouped_mm` that is:"],
        models_table(models),
        ["Router and shared-expert gate, against the plain expression of PyTorch:"],
        *(small_table(report) for report in small),
        [outro],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts).splitlines()


CALLED = ("experts", "router")


def called() -> list[str]:
    """Microseconds of one call in a row of many, beside those of the same calls in a CUDA graph."""
    lines: list[str] = []
    for report in (read(f"called-{stage}-qwen3-30b-a3b") for stage in CALLED):
        specs = by_spec(report)
        lines += ["", *header(report.stage, *next(iter(specs.values())))]
        for spec, timings in specs.items():
            lines.append(row(f"`{spec}`", *(f"{t.called:.0f} ({t.median:.0f})" for t in timings.values())))
    return lines[1:]


SECTIONS = {
    "bench": bench,
    "called": called,
    "whole_model": model_figures.whole_model,
    "quantized": model_figures.quantized,
    "dispatch": ranked_figures.dispatch,
    "symmetric": ranked_figures.symmetric,
    "expert_parallel": ranked_figures.expert_parallel,
    "over_ranks": spread_figures.over_ranks,
    "large": spread_figures.large,
    "next": partial(spread_figures.large, "over_ranks_next"),
    "workload": spread_figures.workload,
    "reduction": spread_figures.reduction,
    "loading": spread_figures.loading,
    "readers": spread_figures.readers,
}


def rewritten(text: str) -> str:
    """The page with its figures replaced, section by section."""

    def section(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return begin + "\n".join(SECTIONS[name]()) + "\n" + end

    return MARKED.sub(section, text)


def main() -> None:
    from moe_harness.harness.bench.pictures import picture

    PAGE.write_text(rewritten(PAGE.read_text()))
    picture(read(FIRST), PICTURE)


if __name__ == "__main__":
    main()
