"""Linear maps and batch norm in NumPy and float64, by their definitions."""

from __future__ import annotations

import itertools

import numpy as np


def conv(x, weight, bias=None, *, groups=1, strides=1, pads=0, dilations=1):
    """A convolution; pads is one number for all borders, or (begin..., end...)."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    rank = x.ndim - 2
    strides, dilations = np.broadcast_to(strides, rank), np.broadcast_to(dilations, rank)
    begins, ends = np.broadcast_to(pads, 2 * rank).reshape(2, rank)
    x = np.pad(x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
    sizes = [
        (x.shape[2 + i] - dilations[i] * (weight.shape[2 + i] - 1) - 1) // strides[i] + 1 for i in range(rank)
    ]
    y = np.zeros((len(x), groups, len(weight) // groups, *sizes))
    parts = x.reshape(len(x), groups, -1, *x.shape[2:])
    split = weight.reshape(groups, -1, *weight.shape[1:])
    for tap in itertools.product(*map(range, weight.shape[2:])):
        starts = [tap[i] * dilations[i] for i in range(rank)]
        part = [slice(s, s + sizes[i] * strides[i], strides[i]) for i, s in enumerate(starts)]
        y += np.einsum("ngi...,goi->ngo...", parts[(..., *part)], split[(..., *tap)])
    return with_bias(y.reshape(len(x), -1, *sizes), bias)


def conv_transpose(x, weight, bias=None, *, groups=1, strides=1, pads=0, output_padding=0):
    """A transposed convolution: every value of x adds the kernel, times it, to the result."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    rank, kernel = x.ndim - 2, weight.shape[2:]
    sizes = [(x.shape[2 + i] - 1) * strides + kernel[i] + output_padding for i in range(rank)]
    y = np.zeros((len(x), groups, weight.shape[1], *sizes))
    parts = x.reshape(len(x), groups, -1, *x.shape[2:])
    split = weight.reshape(groups, -1, *weight.shape[1:])
    for tap in itertools.product(*map(range, kernel)):
        part = [slice(t, t + x.shape[2 + i] * strides, strides) for i, t in enumerate(tap)]
        y[(..., *part)] += np.einsum("ngi...,gio->ngo...", parts, split[(..., *tap)])
    y = y.reshape(len(x), -1, *sizes)[(..., *(slice(pads, size - pads) for size in sizes))]
    return with_bias(y, bias)


def linear(x, weight, bias=None):
    """x·weightᵀ + bias."""
    return with_bias(x.astype(np.float64) @ weight.T.astype(np.float64), bias)


def with_bias(y, bias):
    return y if bias is None else y + along_channels(bias, y.ndim)


def along_channels(values, rank):
    return values.astype(np.float64).reshape(-1, *(1,) * (rank - 2))


def batch_norm(x, gamma, beta, mean, var, eps):
    gamma, beta, mean, var = (along_channels(p, x.ndim) for p in (gamma, beta, mean, var))
    return gamma * (x - mean) / np.sqrt(var + eps) + beta
