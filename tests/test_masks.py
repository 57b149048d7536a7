"""Masks."""

from __future__ import annotations

@pytest.mark.parametrize("make", [adamw, sgd])
def test_masked_channels_stay_zero_until_finalize_removes_them(make: Callable[[nn.Module], Optimizer]) -> None:
    model = Small().double()
    optimizer = make(model)
    x = small_inputs(dtype=torch.float64)
    pruner = pat.Pruner(model, target_sparsity=0.5, end_epoch=3, mode="mask", reg_strength=1e-2)
    shapes = [p.shape for p in model.parameters()]
    for _ in range(5):
        train_one_epoch(model, optimizer, x=x)
        report = pruner.step()
        assert [p.shape for p in model.parameters()] == shapes
    assert report.channels == (14, 14)
    assert report.params[1] < report.dense_params == sum(p.numel() for p in model.parameters())
    train_one_epoch(model, optimizer, x=x)
    dead = (model.inner.weight.flatten(1) == 0).all(1)
    assert 0 < dead.sum() < 16
    assert (model.outer.weight[:, dead] == 0).all()
    assert (model.inner.bias[dead] == 0).all()
    expected = model.eval()(x)
    final = pruner.finalize()
    assert (final.stage, final.channels, final.params[1]) == ("finetune", (14, 14), report.params[1])
    assert sum(p.numel() for p in model.parameters()) == report.params[1]
    assert model.inner.out_channels == 16 - dead.sum()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    before = weights(model)
    train_one_epoch(model, optimizer, x=x)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert pruner.step().channels == (14, 14)


def test_mask_mode_chooses_what_prune_mode_chooses_and_local_macs_never_revive() -> None:
    """With a target in MACs and local ranking, what was masked stays masked at every step."""
    for ranking in ("local", "global"):
        options = {"target_sparsity": 0.8, "mac_target": 0.4, "ranking": ranking}
        pruned, masked = Small(width=24), Small(width=24)
        masked.load_state_dict(pruned.state_dict())
        gone = steps(pruned, 10, **options)
        held = steps(masked, 10, mode="mask", **options)
        assert [r.channels for r in gone] == [r.channels for r in held]
        assert [r.macs for r in gone] == [r.macs for r in held]
        assert gone[-1].macs[1] <= 0.4 * gone[-1].dense_macs
        assert int((masked.inner.weight.flatten(1) != 0).any(1).sum()) == pruned.inner.out_channels


def test_a_statistic_over_masked_channels_is_noted() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    pruner = pat.Pruner(model, example_inputs=torch.randn(2, 6), mode="mask")
    assert any("a norm takes statistics over masked channels" in note for note in pruner.step().notes)
