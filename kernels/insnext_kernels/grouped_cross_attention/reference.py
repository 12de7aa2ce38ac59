"""Eager twin of the Triton kernels and the oracle of their tests. It gathers the chunks; nothing else may."""

import torch
from torch.nn.functional import pad


def grouped_cross_attention_reference(
    q_BHTD: torch.Tensor,
    k_BGNSD: torch.Tensor,
    v_BGNSD: torch.Tensor,
    indices_BCK: torch.Tensor,
    weights_BCK: torch.Tensor,
    off_by_one: bool,
    scale: float,
) -> torch.Tensor:
    B, H, T, D = q_BHTD.shape
    G, C = k_BGNSD.shape[1], indices_BCK.shape[1]
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    q_BGRCMD = q_BHTD.to(dtype).reshape(B, G, H // G, C, T // C, D)
    batch_B11 = torch.arange(B, device=q_BHTD.device)[:, None, None]
    # index -1 finds a last chunk of zeros: its output and its gradients are zero
    k_BCKGSD = pad(k_BGNSD.to(dtype), (0, 0, 0, 0, 0, 1)).transpose(1, 2)[batch_B11, indices_BCK]
    v_BCKGSD = pad(v_BGNSD.to(dtype), (0, 0, 0, 0, 0, 1)).transpose(1, 2)[batch_B11, indices_BCK]
    weights_BCK = weights_BCK.to(dtype).masked_fill(indices_BCK < 0, 0)

    scores_BGRCMKS = torch.einsum("bgrcmd,bckgsd->bgrcmks", q_BGRCMD, k_BCKGSD) * scale
    if off_by_one:
        probs_BGRCMKS = pad(scores_BGRCMKS, (0, 1)).softmax(-1)[..., :-1]
    else:
        probs_BGRCMKS = scores_BGRCMKS.softmax(-1)
    probs_BGRCMKS = probs_BGRCMKS * weights_BCK[:, None, None, :, None, :, None]
    out_BGRCMD = torch.einsum("bgrcmks,bckgsd->bgrcmd", probs_BGRCMKS, v_BCKGSD)
    return out_BGRCMD.reshape(B, H, T, D).to(q_BHTD.dtype)
