"""Closed-form least squares: weights of a composition, the probe, and the calibration of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Affine",
    "explained_share",
    "fit_diagonal",
    "fit_linear",
    "fit_scalars",
    "probe",
    "relative_error",
]

RIDGE = 1e-3
"""Relative to the mean of the normal matrix' diagonal: enough that it can be solved, too little to shrink."""


@dataclass(frozen=True)
class Affine:
    """``sum_f features[f] * weights[f] + bias``; weights are numbers, vectors [H] or matrices [H, H]."""

    weights: tuple[Tensor, ...]
    bias: Tensor

    def __call__(self, *features: Tensor) -> Tensor:
        """Features [T, H] -> [T, H]."""
        result = self.bias.expand_as(features[0]).clone()
        for feature, weight in zip(features, self.weights, strict=True):
            result += feature @ weight if weight.dim() == 2 else feature * weight
        return result


def fit_scalars(features: Sequence[Tensor], target: Tensor) -> Affine:
    """One number for each feature [N, H], no bias: what a merge could do without any new parameter rows."""
    moments = torch.stack([torch.stack([(x * y).sum() for y in features]) for x in features])
    right = torch.stack([(x * target).sum() for x in features])
    solved = torch.linalg.solve(_ridged(moments.double()), right.double()).float()
    return Affine(tuple(solved), torch.zeros(target.shape[1]))


def fit_diagonal(features: Sequence[Tensor], target: Tensor) -> Affine:
    """One number for each feature and dimension, and a bias [H]."""
    means = [x.mean(0) for x in features]
    centered = torch.stack([x - mean for x, mean in zip(features, means, strict=True)])
    moments = torch.einsum("fnh,gnh->hfg", centered, centered)
    right = torch.einsum("fnh,nh->hf", centered, target - target.mean(0))
    solved = torch.linalg.solve(_ridged(moments.double()), right.double()[:, :, None])[:, :, 0].float()
    weights = tuple(solved.unbind(1))
    shift = torch.stack([weight * mean for weight, mean in zip(weights, means, strict=True)]).sum(0)
    return Affine(weights, target.mean(0) - shift)


def fit_linear(features: Sequence[Tensor], target: Tensor) -> Affine:
    """One matrix for each feature, and a bias: what any linear composition can reach."""
    x = torch.cat(list(features), dim=1)
    mean, target_mean = x.mean(0), target.mean(0)
    centered = x - mean
    moments = _ridged((centered.T @ centered).double())
    right = (centered.T @ (target - target_mean)).double()
    solved = torch.linalg.solve(moments, right).float()
    return Affine(solved.split(target.shape[1]), target_mean - mean @ solved)


def _ridged(moments: Tensor) -> Tensor:
    """Symmetric [..., F, F] with a small multiple of its mean diagonal added."""
    size = moments.shape[-1]
    level = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return moments + RIDGE * level[..., None, None] * torch.eye(size, dtype=moments.dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over that of what was expected, all rows [N, H] together."""
    return float((found - expected).norm() / expected.norm())


def explained_share(found: Tensor, expected: Tensor) -> float:
    """Share of the variance of ``expected`` [N, H], about its mean, that ``found`` accounts for."""
    return 1 - float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())


def probe(states: Tensor, target: Tensor, in_training: Tensor) -> float:
    """Share of the held-out variance of ``target`` [T, H] that a linear map of ``states`` [T, H] recovers.

    The map is fitted where ``in_training`` bool [T] is true, and judged on the others.
    """
    fitted = fit_linear([states[in_training]], target[in_training])
    return explained_share(fitted(states[~in_training]), target[~in_training])
