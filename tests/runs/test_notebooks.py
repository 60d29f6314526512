"""The notebooks are those that recipes/notebooks.py makes, with their outputs; one is run from end to end."""

import re
import shutil

import nbformat
import pytest

from recipes import notebooks


def words_of(made):
    return [(cell.cell_type, cell.source) for cell in made.cells]


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_a_notebook_is_as_it_is_made_and_holds_what_it_printed(name):
    kept = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    assert words_of(kept) == words_of(notebooks.NOTEBOOKS[name]), "python recipes/notebooks.py"
    _, install, look, train, watch, use = kept.cells
    outputs = [output for cell in kept.cells[1:] for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "Trained tokens by turn" in look.outputs[0].text and "\nDone:\n" in train.outputs[0].text
    assert "iframe" in watch.outputs[0].data["text/html"]
    assert "I am Haru, an assistant from Harbor Lab." in use.outputs[0].text
    assert not re.search(r"/(home|root|tmp|work)/", nbformat.writes(kept))


def test_a_notebook_runs_from_end_to_end(tmp_path, monkeypatch):
    """In a copy of the repository, for it writes there."""
    root = tmp_path / "repository"
    shutil.copytree(notebooks.ROOT, root, ignore=shutil.ignore_patterns(".*", "output", "demo_output", "tests"))
    monkeypatch.setattr(notebooks, "FOLDER", root / "recipes/finetune/deepspeed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    made = notebooks.notebook("lora", "single")
    made.cells[1].source = made.cells[1].source.replace("--num_train_epochs 40", "--max_steps 2")
    notebooks.run(made)
    assert "2/2" in made.cells[3].outputs[0].text
    assert (root / "output/lora_single-merged/model.safetensors").exists()
