"""Every output block of the pages is what its command prints, every link leads somewhere, every command exists."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from moe_harness.harness.commands.app import COMMANDS, app
from moe_harness.suites.docs.blocks import PAGES, PICTURE, ROOT, blocks, folder, masked, run

LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")
FOUND = [pytest.param(page, command, output, id=f"{page}-{command[:60]}")
         for page in PAGES for command, output in blocks(page)]  # fmt: skip


@pytest.fixture(scope="module")
def place():
    with folder() as made:
        run("moe-harness init experts", made)
        yield made


@pytest.mark.parametrize(("page", "command", "output"), FOUND)
def test_a_block_is_what_its_command_prints(page, command, output, place, tmp_path):
    if "moe-harness init" in command:  # it does not overwrite what another block needs
        with folder() as fresh:
            printed = run(command, fresh)
    else:
        printed = run(command, place)
    assert masked(printed) == masked(output), "run python -m moe_harness.suites.docs.blocks"


def test_the_pages_have_blocks_and_the_picture_shows_a_report():
    assert len(FOUND) >= 5
    texts = (text for text in ElementTree.parse(PICTURE).iter() if text.tag.endswith("text"))
    words = " ".join("".join(text.itertext()) for text in texts)
    for word in ("many_experts.py:fused", "replay", "FAIL"):
        assert word in words.replace("\xa0", " ")


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page):
    text = (ROOT / page).read_text()
    links = [link for link in LINK.findall(text) if not link.startswith(("http", "mailto"))]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page):
    named = set(re.findall(r"moe-harness ([a-z]+)", re.sub(r"moe-harness\[", "", (ROOT / page).read_text())))
    assert named <= {*COMMANDS, *(group.name for group in app.registered_groups)}


def test_the_action_judges_a_project_step_by_step(tmp_path):
    """Its steps are shell; the one that installs is tried by hand, since it needs a network."""
    yaml = pytest.importorskip("yaml")
    steps = yaml.safe_load((ROOT / "docs" / "github-action.yml").read_text())["jobs"]["judge"]["steps"]
    (judging,) = [step for step in steps if step.get("name") == "Judge the kernels"]
    with folder() as made:
        run("moe-harness init shared_expert_gate -l triton -o kernel.py && mkdir tests", made)
        suite = (ROOT / "docs" / "examples" / "test_fused.py").read_text()
        judged = '"shared_expert_gate", "kernel.py:shared_expert_gate"'
        suite = suite.replace('"experts", "my_experts.py:experts"', judged)
        Path(made, "tests", "test_kernels.py").write_text(suite.replace("def test_experts", "def test_contract"))
        exports = "".join(f"export {name}={value}\n" for name, value in judging["env"].items())
        told = run(f"export GITHUB_ACTIONS=true\nset -e\n{exports}{judging['run']}", made)
        assert " passed" in told and "::error" not in told, told
        assert {file.name for file in Path(made, "reports").iterdir()} == {"junit.xml", "page.html"}
