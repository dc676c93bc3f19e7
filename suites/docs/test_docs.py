"""Every output block of the pages is what its command prints, every link leads somewhere, every command exists."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from moe_harness.harness.commands.app import COMMANDS
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
    assert named - set(COMMANDS) <= {"check"} | set(COMMANDS), named - set(COMMANDS)
