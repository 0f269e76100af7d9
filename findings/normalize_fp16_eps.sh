#!/usr/bin/env bash
# torch 2.13.0, CPU: F.normalize and cosine_similarity of a zero vector are NaN in fp16: the eps that prevents it is 0 there.
#
# normalize divides by max(norm, eps), cosine_similarity by max(norms, eps), poisson_nll_loss takes log(x + eps): each has an
# eps for the case of zero, and a test in fp32 or bf16 finds it at work. The defaults are 1e-12, 1e-8 and 1e-8, and the smallest
# number of fp16 is 6e-8. So an eps that is put into the tensor's dtype is 0 and guards nothing: padded rows, dead features and
# clipped embeddings give 0 / 0, and one NaN in a batch of embeddings is a NaN in the contrastive loss of all, for good where no
# loss scale looks at it. An eps that fp16 holds (eps=1e-6) is at work.
#
# Seen, zeros, value, and whether the gradient is finite: normalize fp32 and bf16 0, yes, fp16 NaN, no; cosine_similarity 0,
# yes; NaN, no; cosine_embedding_loss 1, yes; NaN, no; poisson_nll_loss(log_input=False) 18, yes; inf, no; with eps=1e-6
# normalize in fp16 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn import functional as F

losses = {
    "normalize": lambda x, y: F.normalize(x, dim=-1),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y),
    "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(len(x))),
    "poisson_nll_loss": lambda x, y: F.poisson_nll_loss(x, y, log_input=False),
}
for name, loss in losses.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
        value = loss(x, torch.ones(4, 8, dtype=dtype))
        value.sum().backward()
        finite = value.isfinite().all().item(), x.grad.isfinite().all().item()
        print(f"{name} {dtype}: {value.flatten()[0].item():.4g}, value and gradient finite: {finite}")
        if dtype is torch.float16:
            assert not finite[0]
        else:
            assert finite == (True, True)
wider = F.normalize(torch.zeros(4, 8, dtype=torch.float16), dim=-1, eps=1e-6)
print("normalize in fp16 with eps=1e-6:", wider.abs().max().item())
assert not wider.any()
PY
