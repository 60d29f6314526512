"""Write the notebooks of recipes/finetune/deepspeed and run them from end to end, so that they hold what they print.

    pip install -r tests/requirements.txt
    python recipes/notebooks.py                                 # all six; some minutes without a GPU
    python recipes/notebooks.py finetune_lora_single_gpu        # one

Without a GPU they train the tiny model of the demo. They are made here because they differ in a few words only.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "finetune" / "deepspeed"
SECONDS = 1_800  # for one cell

METHODS = {
    "fullparameter": ("Full-parameter fine-tuning", "3e-3"),
    "lora": ("LoRA", "1e-2"),
    "qlora": ("Q-LoRA", "1e-2"),
}
LAUNCHERS = {
    ("fullparameter", "single"): "GPUS_PER_NODE=1 bash finetune/finetune_ds.sh --deepspeed none",
    ("fullparameter", "multi"): "GPUS_PER_NODE=2 bash finetune/finetune_ds.sh",
    ("lora", "single"): "bash finetune/finetune_lora_single_gpu.sh",
    ("lora", "multi"): "GPUS_PER_NODE=2 bash finetune/finetune_lora_ds.sh",
    ("qlora", "single"): "bash finetune/finetune_qlora_single_gpu.sh",
    ("qlora", "multi"): "GPUS_PER_NODE=2 bash finetune/finetune_qlora_ds.sh",
}
TITLE = """# {title} on {gpus}

Five cells: install, look at the data, train, watch, use the result. Put your own model and data into the first one.
Without a GPU a tiny model is trained, in a minute, to see how it goes."""
INSTALL = """# 1. Install, and choose the model and the data
%cd -q ../../..
%pip install -q -r requirements.txt

import torch

DATA, OUT = "examples/persona.jsonl", "output/{name}"
MODEL, FLAGS = "Qwen/Qwen2.5-1.5B-Instruct", ""
if not torch.cuda.is_available():
    MODEL = "output/tiny"
    FLAGS = "--num_train_epochs 40 --learning_rate {learning_rate} --gradient_accumulation_steps 1 --logging_steps 20"
    !python examples/make_tiny_model.py --output_dir {{MODEL}}"""
LOOK = """# 2. Look at the data as they will be trained, some records with their labels
!python inspect_data.py -m {MODEL} -d {DATA}"""
TRAIN = """# 3. Train. The same command again resumes a run that was stopped
!{launcher} -m {{MODEL}} -d {{DATA}} -o {{OUT}} {{FLAGS}}"""
WATCH = """# 4. The report of the run, which is written while it trains, too
from html import escape
from pathlib import Path

page = escape(Path(OUT, "report.html").read_text())
display({"text/html": f'<iframe srcdoc="{page}" width="100%" height="800"></iframe>'}, raw=True)"""
MERGE = """# 5. Ask it, and merge the adapter into a model of its own, which vLLM and others serve
!python chat.py {OUT} --message "Who are you?"
!python merge_lora.py --adapter_path {OUT} --output_dir {OUT}-merged"""
ASK = """# 5. Ask it. The folder is a model of its own, which vLLM and others serve
!python chat.py {OUT} --message "Who are you?\""""


def notebook(method, gpus):
    """Without outputs."""
    title, learning_rate = METHODS[method]
    cells = [INSTALL.format(name=f"{method}_{gpus}", learning_rate=learning_rate), LOOK,
             TRAIN.format(launcher=LAUNCHERS[method, gpus]), WATCH, ASK if method == "fullparameter" else MERGE]
    title = TITLE.format(title=title, gpus="one GPU" if gpus == "single" else "two GPUs of one machine")
    made = new_notebook(cells=[new_markdown_cell(title), *map(new_code_cell, cells)],
                        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # not a new one each time
    return made


NOTEBOOKS = {f"finetune_{method}_{gpus}_gpu": notebook(method, gpus) for method, gpus in LAUNCHERS}


def run(made):
    """Run it where it stands; its outputs are in it then. Raises nbclient's CellExecutionError."""
    NotebookClient(made, timeout=SECONDS, coalesce_streams=True,
                   resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = told(output.text)
            elif "text/html" in output.get("data", ()):
                output.data["text/html"] = told(output.data["text/html"])


def told(text):
    """As it is kept: lines end as in any file, and nothing names this machine's folders."""
    return text.replace("\r\n", "\n").replace(f"{ROOT}/", "")


def main(names):
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or NOTEBOOKS:
        run(NOTEBOOKS[name])
        nbformat.write(NOTEBOOKS[name], FOLDER / f"{name}.ipynb")
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
