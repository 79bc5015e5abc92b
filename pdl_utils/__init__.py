"""Shared code of the three notebooks: see README.md. Needs the checkout that it is installed from."""

import warnings
from pathlib import Path

if not (Path(__file__).resolve().parent.parent / "pyproject.toml").exists():
    raise ImportError(
        "pdl_utils was installed as a copy, without the weights and data of its checkout. "
        "In the folder of the checkout, run:  pip uninstall -y pdl-utils && pip install -e ."
    )

# Two lines that importing torch_geometric prints, of which neither is about what a reader does.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
warnings.filterwarnings("ignore", message="IProgress not found")
