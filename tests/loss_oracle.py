"""The losses in torch, float64, image by image on unpadded targets: an oracle for our own.

Written from the formulas of upstream's ``sam3/train`` (and the paper's), with scipy, torch's own
binary cross-entropy, quantile, resize and ``grid_sample``, and autograd.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

Pairs = list[tuple[int, int]]


def tensor(x: np.ndarray, *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.asarray(x, np.float64), requires_grad=grad)


def focal(x: torch.Tensor, t: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    p = x.sigmoid()
    p_t = p * t + (1 - p) * (1 - t)
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - p_t) ** gamma
    return loss if alpha < 0 else loss * (alpha * t + (1 - alpha) * (1 - t))


def dice(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p = x.sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def iou_giou(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of boxes (cx, cy, w, h) with broadcast leading axes."""
    a0, a1, b0, b1 = (
        a[..., :2] - a[..., 2:] / 2,
        a[..., :2] + a[..., 2:] / 2,
        *(
            b[..., :2] - b[..., 2:] / 2,
            b[..., :2] + b[..., 2:] / 2,
        ),
    )
    inner = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
    union = (a1 - a0).prod(-1) + (b1 - b0).prod(-1) - inner
    return inner / union, inner / union - (hull - union) / hull


def assign(logits: torch.Tensor, boxes: torch.Tensor, goal: torch.Tensor) -> Pairs:
    """Hungarian pairs (query, target) of one image."""
    x, boxes = logits.detach(), boxes.detach()
    p = x.sigmoid()
    cost = 0.25 * (1 - p) ** 2 * -F.logsigmoid(x) - 0.75 * p**2 * -F.logsigmoid(-x)
    l1 = torch.cdist(boxes, goal, p=1)
    cost = 2 * cost[:, None] + 5 * l1 - 2 * iou_giou(boxes[:, None], goal)[1]
    return list(zip(*(i.tolist() for i in linear_sum_assignment(cost.numpy())), strict=True))


def assign_many(logits: torch.Tensor, boxes: torch.Tensor, goal: torch.Tensor, topk: int) -> Pairs:
    if not len(goal):
        return []
    iou = iou_giou(boxes.detach()[:, None], goal)[0]
    quality = 0.3 * logits.detach().sigmoid()[:, None] + 0.7 * iou
    level = max(0.0, 1 - topk / len(logits))
    matches = (quality > torch.quantile(quality, level, dim=0, keepdim=True)) & (quality > 0.4)
    return [tuple(pair) for pair in matches.nonzero().tolist()]  # queries, then targets, ascend


def layer_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    goals: list[torch.Tensor],
    matches: list[Pairs],
    negatives: list[bool] | None,
) -> dict[str, torch.Tensor]:
    """Class (mean over the batch, padded to 200), L1 and GIoU sums of one layer and kind.

    ``negatives``: which images have negatives (then the mean is over what counts), None: all.
    """
    of_class = l1 = giou = torch.zeros(())
    size = len(logits) * max(200, logits.shape[1]) if negatives is None else 1e-6
    for i, (x, box, goal, pairs) in enumerate(zip(logits, boxes, goals, matches, strict=True)):
        p, soft = x.sigmoid(), {}
        if negatives is not None:
            size += len(x) if negatives[i] else len({query for query, _ in pairs})
        if not len(goal):
            continue
        for query, target in pairs:  # a later target takes the place of an earlier one
            overlap, general = iou_giou(box[query], goal[target])
            soft[query] = (p[query] ** 0.25 * overlap**0.75).clamp(min=0.01).detach()
            l1 = l1 + (box[query] - goal[target]).abs().sum()
            giou = giou + 1 - general
        for query in range(len(x)):
            if query in soft:
                bce = F.binary_cross_entropy_with_logits(x[query], soft[query])
                of_class = of_class + 10 * bce
            elif negatives is None or negatives[i]:
                bce = F.binary_cross_entropy_with_logits(x[query], torch.zeros_like(x[query]))
                of_class = of_class + bce * p[query] ** 2
    return {"class": of_class / size, "box": l1, "giou": giou}


def resize(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(x[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def mask_losses(
    pred: torch.Tensor, masks: list[torch.Tensor], has_mask: list[np.ndarray], matches: list[Pairs]
) -> dict[str, torch.Tensor]:
    """Sums over pairs, compared at the target's size."""
    sums = {"mask": torch.zeros(()), "dice": torch.zeros(())}
    for logits, goal, known, pairs in zip(pred, masks, has_mask, matches, strict=True):
        for query, target in pairs:
            if known[target]:
                x = resize(logits[query], goal[target].shape)
                sums["mask"] = sums["mask"] + focal(x, goal[target], 0.25, 2).mean()
                sums["dice"] = sums["dice"] + dice(x, goal[target])
    return sums


def semantic_losses(pred: torch.Tensor, goals: torch.Tensor) -> dict[str, torch.Tensor]:
    shown = [(resize(x, t.shape), t) for x, t in zip(pred, goals, strict=True) if t.any()]
    count = len(shown) + 1e-6
    return {
        "semantic": sum((focal(x, t, 0.6, 2).mean() for x, t in shown), torch.zeros(())) / count,
        "semantic_dice": sum((dice(x, t) for x, t in shown), torch.zeros(())) / count,
    }


def detection_loss(
    out: dict[str, torch.Tensor],
    goals: list[torch.Tensor],
    masks: list[torch.Tensor],
    has_mask: list[np.ndarray],
    semantic: torch.Tensor,
    *,
    topk: int = 4,
    many_on_aux: bool = False,
    negatives: list[bool] | None = None,
    replicas: int = 1,
    scale: bool = True,
    use_masks: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Released recipe with masks; ``goals`` and ``masks`` hold the real targets of every image."""
    queries = out["pred_logits"].shape[1]
    depth, batch = out["layer_logits"].shape[:2]
    num_boxes = max(replicas, sum(map(len, goals)))
    weights = {"class": 20, "box": 5, "giou": 2, "presence": 20, "mask": 200, "dice": 10}
    weights |= {"semantic": 20, "semantic_dice": 30}
    total, named = torch.zeros(()), {}
    for layer in range(depth):
        final = layer == depth - 1
        for kind in range(out["layer_logits"].shape[2] // queries):
            mine = slice(kind * queries, (kind + 1) * queries)
            x, box = out["layer_logits"][layer, :, mine], out["layer_boxes"][layer, :, mine]
            many = kind == 1 and (final or many_on_aux)
            images = zip(x, box, goals, strict=True)
            matches = [assign_many(*i, topk) if many else assign(*i) for i in images]
            terms = layer_losses(x, box, goals, matches, negatives)
            if final and use_masks:
                terms |= mask_losses(out["pred_masks"][:, mine], masks, has_mask, matches)
            terms = {k: v if k == "class" else v / num_boxes for k, v in terms.items()}
            if kind == 0:
                seen = tensor([bool(len(goal)) for goal in goals])
                terms["presence"] = focal(out["layer_presence"][layer], seen, 0.5, 0).sum() / batch
                if final and use_masks:
                    terms |= semantic_losses(out["semantic_seg"], semantic)
            suffix = ("" if final else f"_aux_{layer}") + ("_o2m" if kind else "")
            named |= {name + suffix: value for name, value in terms.items()}
            total = total + sum((2 if kind else 1) * weights[k] * v for k, v in terms.items())
    return total * ((batch / replicas) ** 0.5 if scale else 1), named
