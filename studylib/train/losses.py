"""Distillation losses: what a student learns from its teacher's logits, attention maps and hidden states."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from studylib.config import KL, LOGIT_LOSSES, SYMMETRIC_KL

CHUNK = 256  # tokens whose logits are held at once: 256 x 49,152 x 4 bytes = 50 MB a model


class _ChunkedLoss(torch.autograd.Function):
    """Mean over tokens of a loss on logits z = h W^T, with its gradients computed chunk by chunk in the forward pass.

    of_chunk(slice, z) returns the chunk's summed loss and dloss/dz; then dh = dz W and dW = dz^T h. No chunk's logits
    outlive it.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, of_chunk: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        tokens, dtype = len(hidden), _matmul_dtype(hidden)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        w = head.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        for at in range(0, tokens, CHUNK):
            part = slice(at, at + CHUNK)
            h = hidden[part].to(dtype)
            loss, d_logits = of_chunk(part, (h @ w.T).float())
            total += loss
            d_logits = d_logits.div_(tokens).to(dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ w
            if d_head is not None and d_head.dtype == dtype:
                d_head.addmm_(d_logits.T, h)  # without a product of its own, which is as large as the head
            elif d_head is not None:
                d_head += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_head)
        return total / tokens

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return *(None if d is None else d * gradient for d in ctx.saved_tensors), None


def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def soft_logit_loss(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: str = KL, temperature: float = 1.0
) -> Tensor:
    """Distillation on soft logits: the mean over tokens of a divergence of the student from the teacher, in nats.

    kind "kl": KL(teacher || student) (LLM-QAT, Eq. 3); "reverse-kl": KL(student || teacher); "symmetric-kl": the
    mean of both.
    temperature T divides the logits of both and multiplies the loss by T^2 (Hinton et al. 2015, section 2).
    hidden [N, D] and head [V, D]: the student's last hidden states and output matrix; teacher_hidden [N, D'] and
    teacher_head [V, D'] likewise. Full [N, V] logits are never held: CHUNK tokens at a time. Softmax in fp32, products
    in the autocast type. Gradients with p, q the softmax of teacher and student at T: kl T (q - p); reverse
    T q (log q - log p - KL(q || p)).
    Raises ValueError for no tokens, shapes that do not belong together, or an unknown kind.
    """
    if hidden.ndim != 2 or len(hidden) == 0 or len(hidden) != len(teacher_hidden) or len(head) != len(teacher_head):
        raise ValueError(
            f"soft_logit_loss: hidden {tuple(hidden.shape)} and {tuple(teacher_hidden.shape)} must be [N, D] "
            f"with the same N > 0, heads {tuple(head.shape)} and {tuple(teacher_head.shape)} of one vocabulary"
        )
    if kind not in LOGIT_LOSSES[1:]:
        raise ValueError(f"kind: {kind!r} is not known; use one of {', '.join(LOGIT_LOSSES[1:])}")
    dtype = _matmul_dtype(hidden)
    teacher_hidden, teacher_w = teacher_hidden.detach(), teacher_head.detach().to(dtype)

    def of_chunk(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.div_(temperature).log_softmax(-1)  # (C, V)
        log_p = (teacher_hidden[part].to(dtype) @ teacher_w.T).float().div_(temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        difference = log_q.sub_(log_p)
        if kind == KL:
            loss, gradient = -(p * difference).sum(), q.sub_(p)
        else:
            apart = (q * difference).sum(-1, keepdim=True)
            loss, gradient = apart.sum(), q * (difference - apart)
            if kind == SYMMETRIC_KL:
                loss, gradient = (loss - (p * difference).sum()) / 2, gradient.add_(q).sub_(p).div_(2)
        return loss * temperature**2, gradient.mul_(temperature)

    return _ChunkedLoss.apply(hidden, head, of_chunk)


def label_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels [N] in nats a token, chunk by chunk: hidden [N, D] and head [V, D] as above."""

    def of_chunk(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = labels[part, None]
        log_q = logits.log_softmax(-1)
        loss = -log_q.gather(1, ids).sum()
        return loss, log_q.exp_().scatter_add_(1, ids, torch.full_like(ids, -1, dtype=log_q.dtype))

    return _ChunkedLoss.apply(hidden, head, of_chunk)


def label_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """That of each token [N], without gradients."""
    dtype, found = _matmul_dtype(hidden), []
    w = head.to(dtype)
    for part, ids in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        log_q = (part.to(dtype) @ w.T).float().log_softmax(-1)
        found.append(-log_q.gather(1, ids[:, None])[:, 0])
    return torch.cat(found)


def attention_loss(maps: tuple[Tensor, ...], teacher_maps: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers, heads and positions of KL(teacher's attention || student's), maps [B, H, T, T] a layer.

    As MiniLM (Wang et al. 2020, Eq. 4), over all layers.
    """
    tiny = torch.finfo(torch.float32).tiny
    losses = [
        F.kl_div(own.float().clamp_min(tiny).log(), given.float(), reduction="sum") / own[..., 0].numel()
        for own, given in zip(maps, teacher_maps, strict=True)
    ]
    return torch.stack(losses).mean()


def hidden_loss(states: tuple[Tensor, ...], teacher_states: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers and tokens of |h - h_T|^2 / |h_T|^2: each token's error relative to the teacher's state h_T.

    states, teacher_states: [B, T, D] a layer. A few tokens of a language model, its first above all, hold activations
    that are hundreds of times as large as all others (Sun et al. 2024, "Massive Activations", arXiv 2402.17762). In a
    raw mean of squares they are nearly all of the loss; here such a token counts as much as any other. OneBit (Xu et
    al. 2024, arXiv 2402.11295, section 3.4) divides both states by their own lengths, so that the student's length is
    not learned; both by the teacher's is ours. A teacher's state of zeros counts as the smallest normal number long.
    """
    tiny = torch.finfo(torch.float32).tiny
    losses = []
    for own, given in zip(states, teacher_states, strict=True):
        own, given = (state.to(torch.promote_types(state.dtype, torch.float32)) for state in (own, given))
        length = given.square().sum(-1).clamp_min(tiny)
        losses.append(((own - given).square().sum(-1) / length).mean())
    return torch.stack(losses).mean()


def raw_hidden_loss(states: tuple[Tensor, ...], teacher_states: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers of the mean squared error of hidden states [B, T, D] (TinyBERT: Jiao et al. 2020, Eq. 8)."""
    losses = [F.mse_loss(own.float(), given.float()) for own, given in zip(states, teacher_states, strict=True)]
    return torch.stack(losses).mean()
