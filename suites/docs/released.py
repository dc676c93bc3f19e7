"""docs/released.md: what the judge says of released kernels, from the files suites/performance/data/released-*.json.

    python -m moe_harness.suites.docs.released            writes the page

A file holds the findings of one library at one version on one device, and what was timed there.
"""

import json
from typing import Any

from moe_harness.suites.performance import DATA, ROOT, header, row
from moe_harness.suites.performance.model_figures import quantized

PAGE, REPRODUCERS = ROOT / "docs" / "released.md", ROOT / "docs" / "released"
INTRO = """# Released kernels under the judge

Written by `python -m moe_harness.suites.docs.released` from [the data](../suites/performance/data).

A *defect* is a wrong answer to a question that the kernel takes, a *missing check* one where it should have refused, a
*rough edge* an error that tells nobody what to do, a *wider contract* an input that [ours](contract.md) has and the
kernel's has not: there the adapter refuses it. A replay line repeats a finding where the library is installed; a
reproducer needs the library alone and is what one would file with it."""
UNTRIED = """## Adapters that nobody has run yet

Written against published interfaces; `suites/adapters` holds what they hand over against stand-ins of the libraries.
Where the library is missing they are refused, with the line that installs it.

| library | implementations |
|---|---|
| vLLM | `vllm:fp8_token`, `vllm:int8`, `vllm:int4`, `vllm:permuted`, `vllm:aligned` |
| SGLang | `sglang`, `sglang:aligned`, `sglang:fp8`, `sglang:plain` |
| sgl-kernel | `sglang:topk_softmax`, `sglang:topk_sigmoid`, `sglang:moe_fused_gate` |
| FlashInfer | `flashinfer`, `flashinfer:fp8`, `flashinfer:plain`, `flashinfer:fused_topk_deepseek` |
| DeepGEMM | `deepgemm`, `deepgemm:fp8` |
| Liger | `liger` (RMSNorm) |
| DeepEP | `dispatchers:deepep` |"""


def files() -> list[dict[str, Any]]:
    """What is known, in the order of the files' names."""
    return [json.loads(path.read_text()) for path in sorted(DATA.glob("released-*.json"))]


def page() -> str:
    parts = [INTRO, *(section(library) for library in files()), beside(), UNTRIED]
    return "\n\n".join(parts) + "\n"


def section(library: dict[str, Any]) -> str:
    """One library at one version: findings, how to repeat them, times."""
    on_cpu = library["device"] == "CPU"
    device = "on the CPU" if on_cpu else f"one {library['device']}"
    lines = [
        f"## {library['library']} {library['version']}, {device}, torch {library['torch']}",
        "",
        f"Judged at {library['judged_at']}: {library['how']}. `{library['install']}` brings it.",
        "",
        *header("kernel", "finding", "seen in", "kind", "reproducer"),
    ]
    for found in library["findings"]:
        file = found.get("reproducer")
        link = f"[{file}](released/{file})" if file else "-"
        lines.append(row(found["kernel"], found["finding"], found["seen"], found["kind"], link))
    repeated = [replay(found, on_cpu) for found in library["findings"] if "case" in found]
    if repeated:
        where = "with the library" if on_cpu else "on a machine with a GPU and the library"
        lines += ["", f"To repeat one, {where}:", "", "```", *repeated, "```"]
    lines += reproduced(library["findings"])
    for table in library["timed"]:
        lines += ["", *timed(table)]
    return "\n".join(lines)


def reproduced(findings: list[dict[str, Any]]) -> list[str]:
    """What running the reproducers as they are written down showed, and which nobody has run."""
    files = {found["reproducer"]: found.get("reproduced", "") for found in findings if "reproducer" in found}
    told = [f"[{file}](released/{file}) was run on {said}." for file, said in files.items() if said]
    left = [f"[{file}](released/{file})" for file, said in files.items() if not said]
    if left:
        told.append(f"Not run since {'they were' if len(left) > 1 else 'it was'} written down: {', '.join(left)}.")
    return ["", " ".join(told)] if told else []


def beside() -> str:
    """Kernels in the formats in which they are shipped, ours and others', timed in one run each."""
    told = "Microseconds, and in brackets how many times the floor of the run."
    return "\n".join(["## Quantised experts, timed", "", told, "", *quantized()])


def replay(found: dict[str, Any], on_cpu: bool) -> str:
    return f"moe-harness replay {found['case']} --impl {found['spec']}{'' if on_cpu else ' --device cuda'}"


def timed(table: dict[str, Any]) -> list[str]:
    """Times and the ratio of two of them; ceilings are those of the same run."""
    upper, lower = table["over"]
    ratio = [f"{a / b:.2f}" for a, b in zip(table["rows"][upper], table["rows"][lower], strict=True)]
    lines = [f"{table['title']} ({table['ceilings']}):", "", *header("tokens", *table["tokens"])]
    lines += [row(name, *times) for name, times in table["rows"].items()]
    return [*lines, row(f"{upper} / {lower}", *ratio)]


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
