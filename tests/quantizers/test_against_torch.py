"""Against vector-quantize-pytorch, where that is installed: same books, same inputs.

Losses there are means over all numbers, here sums over tokens: `BATCH * TOKENS * DIM` apart, times
the weight.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.quantizers import LFQ, VQ, Residual, RotationTrick, SimVQ, VQStatistics

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("vector_quantize_pytorch")
# On a busy machine its threads wait for each other far longer than these sizes take.
torch.set_num_threads(1)

TOKENS, CODES, DIM = 200, 16, 4
KEEP = jnp.ones(TOKENS, bool)


def draw(step: int = 0) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(TOKENS, DIM)).astype(np.float32)


def tensor(x) -> "torch.Tensor":
    return torch.from_numpy(np.array(x, np.float32))


def give_book(module, vq: VQ) -> None:
    """The book and its averages."""
    book = module._codebook
    book.embed.data.copy_(tensor(vq.codebook)[None])
    book.embed_avg.data.copy_(tensor(vq.sums)[None])
    book.cluster_size.data.copy_(tensor(vq.counts)[None])


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_over_several_steps(cosine):
    vq = VQ(CODES, DIM, key=jax.random.key(0), decay=0.8, revival=0, epsilon=1e-5, cosine=cosine)
    module = theirs.VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        decay=0.8,
        commitment_weight=0.25,
        threshold_ema_dead_code=0,
        use_cosine_sim=cosine,
        rotation_trick=False,
    )
    give_book(module, vq)
    module.train()
    for step in range(6):
        z = draw(step)
        out = eqx.filter_jit(vq)(jnp.asarray(z), KEEP)
        points, codes, loss = module(tensor(z)[None])
        np.testing.assert_array_equal(out.codes, codes[0].numpy())
        np.testing.assert_allclose(out.latents, points[0].detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(out.loss / z.size, loss.item(), rtol=1e-4)
        assert isinstance(out.statistics, VQStatistics)
        vq = vq.update(out.statistics)
        np.testing.assert_allclose(
            vq.entries(), module._codebook.embed[0].numpy(), rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(vq.counts, module._codebook.cluster_size[0], rtol=1e-4)


def test_the_rotation_trick():
    vq = VQ(CODES, DIM, key=jax.random.key(0), estimator=RotationTrick())
    module = theirs.VectorQuantize(
        dim=DIM, codebook_size=CODES, rotation_trick=True, commitment_weight=0.0
    )
    give_book(module, vq)
    module.train()
    z, weights = draw(), draw(1)
    x = tensor(z)[None].requires_grad_()
    points, _, _ = module(x)
    (points * tensor(weights)).sum().backward()
    mine = jax.grad(lambda z: jnp.sum(vq(z, KEEP).latents * weights))(jnp.asarray(z))
    np.testing.assert_allclose(mine, x.grad[0], rtol=1e-3, atol=1e-3)


def test_residual_vq():
    stages = Residual(VQ(CODES, DIM, key=jax.random.key(0)), 3)
    module = theirs.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3).eval()
    for layer, stage in zip(module.layers, stages.stages, strict=True):
        give_book(layer, stage)
    z = draw()
    out = eqx.filter_jit(stages)(jnp.asarray(z), KEEP)
    points, codes, _ = module(tensor(z)[None])
    np.testing.assert_array_equal(out.codes, codes[0].numpy())
    np.testing.assert_allclose(out.latents, points[0].numpy(), atol=1e-5)


def test_simvq():
    q = SimVQ(CODES, DIM, key=jax.random.key(0))
    weight = jax.random.normal(jax.random.key(1), (DIM, DIM))
    q = eqx.tree_at(lambda q: q.weight, q, weight)
    module = theirs.SimVQ(dim=DIM, codebook_size=CODES, rotation_trick=False)
    module.frozen_codebook.data.copy_(tensor(q.base))
    module.code_transform.weight.data.copy_(tensor(weight.T))
    z = draw()
    points, codes, loss = module(tensor(z)[None])
    loss.backward()
    out = q(jnp.asarray(z), KEEP)
    np.testing.assert_array_equal(out.codes, codes[0].numpy())
    np.testing.assert_allclose(out.latents, points[0].detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(out.loss / z.size, loss.item(), rtol=1e-4)
    gradient = eqx.filter_grad(lambda q: q(jnp.asarray(z), KEEP).loss / z.size)(q)
    np.testing.assert_allclose(
        gradient.weight.T, module.code_transform.weight.grad, rtol=1e-3, atol=1e-5
    )


def test_lfq():
    """Codes there count bits from the other end. The entropy of a token's code is the same; theirs
    takes the logits `2 z.c` times an inverse temperature, and clips probabilities at 1e-5. The
    entropy of the mean code is another thing: theirs is that over all codes, ours the sum over the
    bits, which is never less.
    """
    q = LFQ(DIM, temperature=0.5, commitment=0.3, entropy_weight=1.0)
    module = theirs.LFQ(dim=DIM, commitment_loss_weight=0.3, entropy_loss_weight=1.0)
    module.train()
    z = draw()
    (points, codes, _), parts = module(
        tensor(z)[None], inv_temperature=1 / 0.5, return_loss_breakdown=True
    )
    out = q(jnp.asarray(z), KEEP)
    flipped = sum((np.asarray(out.codes) >> i & 1) << DIM - 1 - i for i in range(DIM))
    np.testing.assert_array_equal(flipped, codes[0].numpy())
    np.testing.assert_allclose(out.latents, points[0].detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(out.loss / 0.3 / z.size, parts.commitment.item(), rtol=1e-5)
    entropy = out.statistics.entropy / TOKENS
    np.testing.assert_allclose(entropy, parts.per_sample_entropy.item(), rtol=1e-3)
    of_bits = entropy - q.batch_loss(out.statistics)
    joint = parts.batch_entropy.item()
    assert joint - 1e-3 < of_bits < joint + 0.2
