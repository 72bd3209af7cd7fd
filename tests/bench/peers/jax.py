"""JAX: two passes and the closed form of the gradient, compiled, into donated memory; 16 bits in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bench.case import EPS, Call, Case
from bench.rows import BACKWARD, FORWARD, INFERENCE

jax.config.update("jax_enable_x64", True)


def version() -> str:
    return jax.__version__


def calls(case: Case, threads: int) -> dict[str, Call]:
    axes = case.reduced
    x, dy = (jnp.array(case.rows(a)) for a in (case.x, case.dy))
    gamma, beta, mean, var = (jnp.array(case.beside(p)) for p in (case.gamma, case.beta, case.mean, case.var))
    wide = jnp.float32 if case.narrow else x.dtype

    def statistics(x):
        mu = x.mean(axes, keepdims=True)
        return mu, jax.lax.rsqrt(jnp.square(x - mu).mean(axes, keepdims=True) + EPS)

    def forward(x, out):
        x = x.astype(wide)
        mu, invstd = statistics(x)
        return ((x - mu) * invstd * gamma + beta).astype(out.dtype)

    def infer(x, out):
        return ((x.astype(wide) - mean) * (gamma * jax.lax.rsqrt(var + EPS)) + beta).astype(out.dtype)

    mu, invstd = jax.jit(lambda x: statistics(x.astype(wide)))(x)

    def backward(dy, x, out):
        dy, xhat = dy.astype(wide), (x.astype(wide) - mu) * invstd
        dbeta, dgamma = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
        count = x.size // gamma.size
        dx = gamma * invstd * (dy - dbeta / count - xhat * (dgamma / count))
        return dx.astype(out.dtype), dgamma, dbeta

    memory = [jnp.ones_like(x)]

    def compiled(function, *inputs):
        """Each answer is written over the one before, whose memory is donated."""
        jitted = jax.jit(function, donate_argnums=len(inputs), keep_unused=True)

        def run():
            answer = jax.block_until_ready(jitted(*inputs, memory.pop()))
            memory.append(answer[0] if isinstance(answer, tuple) else answer)
            return memory[0]

        return run

    return {
        FORWARD: compiled(forward, x),
        INFERENCE: compiled(infer, x),
        BACKWARD: compiled(backward, dy, x),
    }
