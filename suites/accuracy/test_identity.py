"""What an answer depends on beside its request: whatever changes it is another implementation, or another model."""

from moe_harness.harness.core import registry
from moe_harness.harness.gate import identity

KERNEL = """
def experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu"):
    return {}
"""


def source(folder, text, name="kernel.py"):
    (folder / name).write_text(text)
    return identity.source_hash(registry.find("experts", f"{folder / name}:experts"))


def test_an_edited_kernel_is_another_implementation(tmp_path):
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    one, edited = (source(tmp_path / name, KERNEL.format(value)) for name, value in (("one", 1), ("three", 2)))
    assert one != edited


def test_a_switch_that_a_kernel_reads_makes_it_another(tmp_path, monkeypatch):
    """Otherwise the kernel behind a switch would be served the answers of the one before it."""
    text = "import os\nFAST = os.environ.get('MY_FAST_PATH')\n" + KERNEL.format(1)
    seen = [source(tmp_path, text)]
    unread = "MY_" + "OTHER"  # in one word it would be read: this file is loaded, too
    for name, value in (("MY_FAST_PATH", "1"), ("MY_FAST_PATH", "2"), (unread, "3")):
        monkeypatch.setenv(name, value)
        seen.append(source(tmp_path, text))
    assert len(set(seen[:3])) == 3 and seen[3] == seen[2]


def test_switches_of_installed_libraries_count_and_their_folders_do_not(monkeypatch):
    before = identity.surroundings("cpu")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert identity.surroundings("cpu") == before
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")
    assert identity.surroundings("cpu")["switches"] == before["switches"] | {"VLLM_USE_DEEP_GEMM": "1"}


def test_an_edited_neighbour_of_a_kernel_is_too(tmp_path):
    (tmp_path / "tiles.cu").write_text("// one")
    before = source(tmp_path, KERNEL.format(1))
    (tmp_path / "tiles.cu").write_text("// two")
    assert source(tmp_path, KERNEL.format(1)) != before


def test_an_edited_file_of_a_package_is_even_if_it_is_imported_later(tmp_path):
    inner = tmp_path / "package" / "inner"
    (tmp_path / "package" / "late").mkdir(parents=True)
    inner.mkdir()
    for folder in (inner, tmp_path / "package", tmp_path / "package" / "late"):
        (folder / "__init__.py").write_text("")
    (tmp_path / "package" / "late" / "tiles.py").write_text("size = 1")
    before = source(inner, KERNEL.format(1))
    (tmp_path / "package" / "late" / "tiles.py").write_text("size = 2")
    assert source(inner, KERNEL.format(1)) != before


def test_an_edited_checkpoint_is_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = identity.model_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert identity.model_hash(tmp_path) != before
