"""Makes torchvision importable beside a CPU build of torch; `make_env.py` puts it into the test environment.

The registry's torchvision is linked against CUDA, so beside a CPU torch its operators never load and its import fails
at "operator torchvision::nms does not exist". Declared, but without a kernel, they let it import; nothing in vLLM or
transformers calls them.
"""

import torch

_SCHEMAS = torch.library.Library("torchvision", "DEF")
_SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
