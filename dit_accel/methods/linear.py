"""The linear branch of fine-tuned methods where the keys are shared between processes."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.trained import Parts
from dit_accel.parallel.sharded import Ring


def linear_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feature_map: str,
    ring: Ring,
) -> Tensor:
    """Linear attention over the keys of all processes, projected, float32: each makes the state of
    its own keys, and one all-reduce adds them up (LASP-2, arXiv 2502.07563)."""
    ones = v.new_ones(*v.shape[:3], 1)
    keys = ops.features(k.float(), feature_map)
    state = ring.summed(keys.mT @ torch.cat([v, ones], 3).float())
    queries = ops.features(q.float(), feature_map)
    total = queries @ state[..., -1:] + ops.EPS
    out = (queries @ (state[..., :-1] @ weight.float().mT)) / total
    return out if bias is None else out + bias.float()


def completed(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, learned: Parts, feature_map: str, ring: Ring
) -> Tensor:
    """SLA's output, float32, from its sparse part and the layer's tensors, projection or gate."""
    if "gate" not in learned:
        linear = (learned["weight"], learned.get("bias"), feature_map)
        return out + linear_branch(q, k, v, *linear, ring)
    share = learned["gate"].float().sigmoid()
    eye = torch.eye(q.shape[3], device=q.device)
    return share * out + (1 - share) * linear_branch(q, k, v, eye, None, feature_map, ring)
