"""The example model: causal, rotary, grouped heads, tied embeddings."""

from __future__ import annotations

import math

import torch

from decotrain.model import (
    ModelConfig,
    Transformer,
    generate,
    loss_of,
    rotary_table,
    rotate,
)

TINY = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, hidden=24, context=12)


def test_no_position_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY)
    text = torch.randint(0, 256, (2, 12))
    changed = text.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_attention_equals_the_formula() -> None:
    """Grouped heads written out one by one, in float64, with a mask instead of is_causal."""
    torch.manual_seed(0)
    model = Transformer(TINY).double()
    attention, table = model.blocks[0].attention, model.rotary.double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    qkv = attention.qkv(x)[0]  # (time, 16 + 2 * 8)
    heads = []
    for head in range(4):
        group = head // 2
        q = qkv[:, head * 4 : head * 4 + 4]
        k = qkv[:, 16 + group * 4 : 16 + group * 4 + 4]
        v = qkv[:, 24 + group * 4 : 24 + group * 4 + 4]
        q, k = (
            rotate(part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt(), table)
            for part in (q, k)
        )
        scores = q @ k.T / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = attention.out(torch.cat(heads, dim=-1))
    assert torch.allclose(attention(x, table)[0], expected, atol=1e-10)


def test_rotation_depends_on_distance_only() -> None:
    table = rotary_table(32, 8)
    q, k = torch.randn(8), torch.randn(8)
    at = lambda x, t: rotate(x, table[:, t])  # noqa: E731
    near, far = at(q, 5) @ at(k, 3), at(q, 25) @ at(k, 23)
    assert torch.allclose(near, far, atol=1e-4)
    assert not torch.allclose(near, at(q, 5) @ at(k, 2), atol=1e-4)


def test_embedding_and_output_are_one_matrix_and_the_size_is_as_planned() -> None:
    model = Transformer(ModelConfig())
    assert all("head" not in name for name, _ in model.named_parameters())
    assert 400_000 < sum(p.numel() for p in model.parameters()) < 1_200_000


def test_an_untrained_model_knows_nothing_and_learns_something() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY)
    text = torch.tensor(list(b"abcabcabcabca" * 4)).view(4, 13)
    assert abs(loss_of(model, text).item() - math.log(256)) < 0.3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss_of(model, text).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, text).item() < 0.5
    assert generate(model, b"abcabc", 6, temperature=0.1) == b"abcabc"


def test_loss_is_the_mean_over_all_bytes() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY)
    text = torch.randint(0, 256, (3, 9))
    scores = model(text[:, :-1]).log_softmax(-1)
    expected = -scores.gather(-1, text[:, 1:, None]).mean()
    assert torch.allclose(loss_of(model, text), expected)


def test_generation_is_fixed_by_its_seed() -> None:
    model = Transformer(TINY)
    one, two, three = (generate(model, b"x", 20, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert one != three
    assert len(one) == 20
