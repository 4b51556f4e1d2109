"""Losses against closed forms, hand-computed vectors and a float64 reference written row by row."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_selfkd.losses import cross_entropy as cross_entropy_module
from hf_selfkd.losses import progressive as losses_module
from hf_selfkd.losses.cross_entropy import cross_entropy_sum
from hf_selfkd.losses.progressive import progressive_cross_entropy
from hf_selfkd.losses.soft import soft_cross_entropy, target_entropy
from hf_selfkd.losses.soft_targets import LOG_ZERO, SoftTargets, log_softmax
from hf_selfkd.losses.summary import summarize, top_entries


ROWS, CLASSES = 7, 11


def draw(rows=ROWS, classes=CLASSES, seed=0, sharpness=2.0):
    """Logits, labels and past probabilities, float32."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, classes, generator=generator)
    soft_targets = (sharpness * torch.randn(rows, classes, generator=generator)).double().softmax(-1).float()
    return logits, torch.randint(classes, (rows,), generator=generator), soft_targets


def dense(past_probs, mask=None):
    mask = torch.ones(len(past_probs), dtype=torch.bool) if mask is None else mask
    return SoftTargets(past_probs.log().clamp_min(LOG_ZERO), mask)


def top(past_probs, k, mask=None):
    values, index = past_probs.topk(k, dim=-1)
    whole = dense(past_probs, mask)
    return SoftTargets(values.log().clamp_min(LOG_ZERO), whole.mask, index)


def soften(probs, tau):
    powered = probs ** (1 / tau)
    return powered / powered.sum()


def reference_soft(row, past_row, tau, kept=None):
    """Soft cross-entropy of one float64 row; with `kept`, the other classes are one bucket of evenly spread mass."""
    present, classes = (row / tau).softmax(0), len(row)
    if kept is None or len(kept) == classes:
        return -(soften(past_row, tau) * present.log()).sum() * tau**2
    others = [c for c in range(classes) if c not in kept]
    past_row = past_row.clone()
    past_row[others] = (1 - past_row[kept].sum()) / len(others)
    past_row = soften(past_row, tau)
    soft = -(past_row[kept] * present[kept].log()).sum() - past_row[others].sum() * present[others].sum().log()
    return soft * tau**2


def reference(logits, labels, past_probs, mask, alpha, tau=1.0, kept=None):
    """Total loss of each row and the gradient of their sum, float64, without any code of the package."""
    logits = logits.detach().double().requires_grad_()
    losses = []
    for r, label in enumerate(labels.tolist()):
        if label == -100:
            losses.append(logits[r].sum() * 0)
            continue
        hard = -logits[r].softmax(0)[label].log()
        if mask[r]:
            soft = reference_soft(logits[r], past_probs[r].double(), tau, None if kept is None else kept[r].tolist())
            losses.append((1 - alpha) * hard + alpha * soft)
        else:
            losses.append(hard)
    losses = torch.stack(losses)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def run(logits, labels, soft_targets, alpha, tau=1.0):
    """Row losses and the gradient of their sum."""
    logits = logits.detach().clone().requires_grad_()
    losses = progressive_cross_entropy(logits, labels, soft_targets, alpha, tau)
    return losses, torch.autograd.grad(losses.total.sum(), logits)[0]


def plain(logits, labels):
    logits = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(logits, labels, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def close(actual, expected, atol=2e-6):
    torch.testing.assert_close(actual.detach().double(), expected.double(), atol=atol, rtol=2e-6)


# The published target


def test_hand_computed_vector():
    """Invariant 5: alpha 4/15, label 1, logits (2, 1, 0, -1)."""
    logits, label = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([1])
    soft_targets = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    losses, gradient = run(logits, label, dense(soft_targets), 4 / 15)
    assert losses.total.item() == pytest.approx(1.5201897, abs=5e-7)
    close(gradient, torch.tensor([[0.617248, -0.656451, 0.033811, 0.005392]]), atol=1e-6)
    close(logits.softmax(-1) - gradient, torch.tensor([[0.0266667, 0.8933333, 0.0533333, 0.0266667]]), atol=1e-6)
    other, _ = run(logits, label, dense(soft_targets), 0.3)
    assert abs(other.total.item() - 1.5201897) > 1e-2


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0])
def test_dense_equals_float64_reference(alpha):
    """Values and gradients of rows with a past, without one and without a label."""
    logits, labels, soft_targets = draw()
    labels[2], mask = -100, torch.tensor([True, False, True, True, False, True, True])
    losses, gradient = run(logits, labels, dense(soft_targets, mask), alpha)
    total, expected = reference(logits, labels, soft_targets, mask, alpha)
    close(losses.total, total)
    close(gradient, expected)
    assert (total - reference(logits, labels, soft_targets, mask, alpha * 0.9)[0]).abs().max() > 1e-2


def test_gradient_is_present_minus_target_and_never_reaches_the_past():
    """Invariant 6, with the mean over the batch."""
    logits, labels, probs = draw()
    soft_targets = SoftTargets(probs.log().requires_grad_(), torch.ones(ROWS, dtype=torch.bool))
    logits = logits.requires_grad_()
    progressive_cross_entropy(logits, labels, soft_targets, 0.7).total.mean().backward()
    target = 0.3 * F.one_hot(labels, CLASSES) + 0.7 * probs
    close(logits.grad, (logits.softmax(-1) - target) / ROWS)
    assert soft_targets.log_probs.grad is None


def test_parts_add_up():
    """total = (1 - alpha) * hard + alpha * soft where there is a past; soft is 0 elsewhere."""
    logits, labels, soft_targets = draw()
    labels[0], mask = -100, torch.arange(ROWS) != 3
    losses, _ = run(logits, labels, dense(soft_targets, mask), 0.6)
    learning = mask & (labels != -100)
    close(losses.total[learning], 0.4 * losses.hard[learning] + 0.6 * losses.soft[learning])
    assert losses.soft[~learning].tolist() == [0, 0] and (losses.soft[learning] > 0).all()
    assert losses.hard[0] == 0 and torch.equal(losses.total[~learning], losses.hard[~learning])


# Reductions to plain cross-entropy


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("k", [None, 4])
def test_rows_without_a_past_are_bit_equal_to_cross_entropy(k, tau):
    """Invariant 2, beside rows that do have one, label -100 included; stored entries to rounding."""
    logits, labels, soft_targets = draw(64, 100)
    labels[5] = -100
    mask = torch.arange(64) % 2 == 0
    made = dense(soft_targets, mask) if k is None else top(soft_targets, k, mask)
    losses, gradient = run(logits, labels, made, 0.8, tau)
    hard, expected = plain(logits, labels)
    if k is None or tau != 1.0:
        assert torch.equal(losses.total[~mask], hard[~mask]) and torch.equal(gradient[~mask], expected[~mask])
        assert torch.equal(losses.hard, hard)
    close(losses.total[~mask], hard[~mask])
    close(gradient[~mask], expected[~mask])
    assert not torch.isclose(losses.total[mask], hard[mask]).any()


@pytest.mark.parametrize("tail", ["bucket", "label", "renormalize", "uniform"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_entries_of_a_row_without_a_past_are_filler(tau, tail):
    """A table that was never written has class 0 in every entry; it may be the label."""
    logits, labels, soft_targets = draw(64, 100)
    mask = torch.arange(64) % 2 == 0
    made = replace(top(soft_targets, 4, mask), tail=tail)
    written, gradient = run(logits, labels, made, 0.8, tau)
    made.index[~mask], made.log_probs[~mask] = labels[~mask].unsqueeze(-1), 0.0
    losses, found = run(logits, labels, made, 0.8, tau)
    hard, expected = plain(logits, labels)
    close(losses.total[~mask], hard[~mask])
    close(found[~mask], expected[~mask])
    assert torch.equal(losses.total[mask], written.total[mask]) and torch.equal(found[mask], gradient[mask])


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf, 1e30])
def test_alpha_zero_is_bit_equal_whatever_is_stored(poison):
    """Invariant 1."""
    logits, labels, soft_targets = draw(64, 100)
    stored = dense(soft_targets)
    stored.log_probs[::3] = poison
    losses, gradient = run(logits, labels, stored, 0.0)
    hard, expected = plain(logits, labels)
    assert torch.equal(losses.total, hard) and torch.equal(gradient, expected)
    assert not torch.equal(run(logits, labels, dense(soft_targets), 1e-3)[0].total, hard)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_past_equal_to_the_label_is_cross_entropy(alpha):
    """Invariant 10."""
    logits, labels, soft_targets = draw()
    hard, expected = plain(logits, labels)
    losses, gradient = run(logits, labels, dense(F.one_hot(labels, CLASSES).float()), alpha)
    close(losses.total, hard)
    close(gradient, expected)
    assert (run(logits, labels, dense(soft_targets), alpha)[0].total - hard).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_uniform_past_is_label_smoothing(alpha):
    """Invariant 9."""
    logits, labels, _ = draw()
    losses, gradient = run(logits, labels, dense(torch.full((ROWS, CLASSES), 1 / CLASSES)), alpha)
    logits = logits.requires_grad_()
    smoothed = F.cross_entropy(logits, labels, reduction="none", label_smoothing=alpha)
    close(losses.total, smoothed)
    close(gradient, torch.autograd.grad(smoothed.sum(), logits)[0])
    assert (smoothed - F.cross_entropy(logits, labels, reduction="none", label_smoothing=alpha / 2)).abs().max() > 0.1


def test_kl_divergence_has_the_same_gradient_and_lacks_the_target_entropy():
    """Invariant 8."""
    logits, labels, soft_targets = draw()
    alpha = 0.65
    losses, gradient = run(logits, labels, dense(soft_targets), alpha)
    target = (1 - alpha) * F.one_hot(labels, CLASSES) + alpha * soft_targets
    logits = logits.requires_grad_()
    divergence = F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    close(gradient, torch.autograd.grad(divergence.sum(), logits)[0])
    close(losses.total - divergence, -(target * target.log()).sum(-1))
    close(target_entropy(dense(soft_targets), labels, alpha), losses.total - divergence)
    assert ((losses.total - divergence) > 0.1).all()


def test_gradient_rescaling_factor():
    """Invariant 7: the L1 norm shrinks by 1 - alpha * g_past / g_now while alpha <= min of the probability ratios."""
    logits, labels, soft_targets = draw(300, 6, seed=1)
    now = logits.double().softmax(-1)
    wrong = F.one_hot(labels, 6) == 0
    ratio = torch.where(wrong, now / soft_targets, math.inf).amin(-1).clamp_max(1.0)
    gap_now, gap_past = (1 - p.double().gather(1, labels[:, None]).squeeze(1) for p in (now, soft_targets))
    for share in (0.2, 0.999, 1.5):
        for row in range(300):
            one, alpha = slice(row, row + 1), float(share * ratio[row])
            if alpha > 1:
                continue
            norm = run(logits[one], labels[one], dense(soft_targets[one]), alpha)[1].abs().sum().item()
            predicted = 2 * gap_now[row] * (1 - alpha * gap_past[row] / gap_now[row])
            if share <= 1:
                assert norm == pytest.approx(predicted.item(), abs=3e-6)
            else:  # beyond the bound some class changes its sign: the norm is strictly larger
                assert norm > predicted.item() - 3e-6
    bounded = [float(1.5 * r) <= 1 for r in ratio]
    assert sum(bounded) > 100


# Temperature


@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
def test_temperature_is_the_usual_distillation_term(tau):
    """tau^2 * (KLDivLoss of the softened sides + entropy of the softened past)."""
    logits, _, soft_targets = draw()
    logits = logits.requires_grad_()
    softened = (soft_targets.log() / tau).softmax(-1)
    expected = tau**2 * torch.nn.KLDivLoss(reduction="none")((logits / tau).log_softmax(-1), softened).sum(-1)
    soft = soft_cross_entropy(logits, dense(soft_targets), tau)
    close(soft - expected, tau**2 * torch.special.entr(softened).sum(-1), atol=2e-5)
    close(torch.autograd.grad(soft.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0], atol=5e-6)
    assert (soft - soft_cross_entropy(logits, dense(soft_targets), 1.0)).abs().max() > 0.1


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, CLASSES - 1, CLASSES])
def test_top_k_bucket_equals_the_collapsed_dense_computation(k, tau):
    """Stored entries keep their classes, the others are one bucket on both sides."""
    logits, labels, soft_targets = draw()
    mask = torch.arange(ROWS) != 1
    stored = top(soft_targets, k, mask)
    losses, gradient = run(logits, labels, stored, 0.8, tau)
    total, expected = reference(logits, labels, soft_targets, mask, 0.8, tau, kept=stored.index)
    close(losses.total, total, atol=1e-4)  # the last classes' mass is a difference of float32 numbers
    close(gradient, expected, atol=1e-4)
    if k == 4:  # a bucket is not the whole row
        assert (total - reference(logits, labels, soft_targets, mask, 0.8, tau)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_top_k_of_all_classes_is_dense(tau):
    """Invariant 24, in another order of the classes."""
    logits, labels, soft_targets = draw()
    many, gradient = run(logits, labels, top(soft_targets, CLASSES), 0.8, tau)
    whole, expected = run(logits, labels, dense(soft_targets), 0.8, tau)
    close(many.total, whole.total)
    close(gradient, expected)
    assert (run(logits, labels, top(soft_targets, CLASSES - 3), 0.8, tau)[0].total - whole.total).abs().max() > 1e-4


def test_no_gradient_inside_the_bucket():
    """Classes outside the stored entries share the bucket's gradient in proportion to their probability."""
    logits, labels, soft_targets = draw()
    _, gradient = run(logits, labels, top(soft_targets, 3), 1.0)
    outside = torch.ones_like(soft_targets).scatter(1, top(soft_targets, 3).index, 0).bool()
    for row, free in enumerate(outside):
        ratio = gradient[row, free] / logits.softmax(-1)[row, free]
        close(ratio, ratio.mean().expand_as(ratio), atol=1e-4)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck(k, tau):
    """Finite differences (of the float32 inside, hence the wide step)."""
    logits, labels, soft_targets = draw(4, 6, sharpness=1.0)
    labels[1] = -100
    stored = dense(soft_targets) if k is None else top(soft_targets, k)

    def loss(z):
        return progressive_cross_entropy(z, labels, stored, 0.7, tau).total.double()

    inputs = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-2, atol=1e-3, rtol=1e-3)

    def broken(z):
        return loss(z.detach() + 0.95 * (z - z.detach()))

    assert not torch.autograd.gradcheck(broken, inputs, eps=1e-2, atol=1e-3, rtol=1e-3, raise_exception=False)


# Number formats and values that are not finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_half_precision_logits_are_computed_in_float32(dtype, tau):
    """Invariant 19: the value is that of the same logits in float32; the gradient has the type of the logits."""
    logits, labels, soft_targets = draw()
    half = logits.to(dtype)
    losses, gradient = run(half, labels, dense(soft_targets), 0.5, tau)
    expected, wide = run(half.float(), labels, dense(soft_targets), 0.5, tau)
    assert losses.total.dtype == losses.soft.dtype == losses.hard.dtype == torch.float32
    assert torch.equal(losses.total, expected.total)
    assert gradient.dtype == dtype and torch.equal(gradient, wide.to(dtype))
    assert soft_cross_entropy(half, dense(soft_targets), tau).dtype == torch.float32
    in_half = F.cross_entropy(half, labels, reduction="none").float()
    assert (in_half - expected.hard).abs().max() > 1e-5
    assert torch.equal(cross_entropy_sum(half, labels), F.cross_entropy(half.float(), labels, reduction="sum"))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("garbage", [0.0, 7.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
def test_garbage_in_rows_without_a_past_reaches_nothing(garbage, k, tau):
    """Neither the value nor the gradient of any row."""
    logits, labels, soft_targets = draw()
    labels[4], mask = -100, torch.tensor([True, False, True, False, True, True, True])
    clean = dense(soft_targets, mask) if k is None else top(soft_targets, k, mask)
    dirty = SoftTargets(clean.log_probs.clone(), mask, clean.index)
    dirty.log_probs[~mask] = garbage
    dirty.log_probs[4] = garbage  # has a past, but no label
    (a, da), (b, db) = run(logits, labels, clean, 0.8, tau), run(logits, labels, dirty, 0.8, tau)
    for name in ("total", "hard", "soft"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(da, db) and torch.isfinite(da).all()
    dirty.log_probs[0] = garbage
    assert not torch.equal(run(logits, labels, dirty, 0.8, tau)[0].total[0], a.total[0])


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [None, 3])
def test_masked_classes_equal_a_model_without_them(k, tau):
    """Logits of -inf (now and in the past) cost nothing and get no gradient."""
    logits, labels, soft_targets = draw(6, 5)
    gap = -torch.full((6, 2), math.inf)
    wide, wide_past = torch.cat((logits, gap), 1), log_softmax(torch.cat((soft_targets.log(), gap), 1))
    assert (wide_past[:, 5:] == LOG_ZERO).all() and (wide_past.exp()[:, 5:] == 0).all()
    narrow = dense(soft_targets) if k is None else top(soft_targets, k)
    stored = (
        SoftTargets(wide_past, narrow.mask) if k is None else SoftTargets(narrow.log_probs, narrow.mask, narrow.index)
    )
    losses, gradient = run(wide, labels, stored, 0.8, tau)
    expected, narrow_gradient = run(logits, labels, narrow, 0.8, tau)
    if k is None or tau == 1.0:  # at another temperature the bucket spreads its mass over two more classes
        close(losses.total, expected.total)
        close(gradient[:, :5], narrow_gradient)
    assert torch.isfinite(losses.total).all() and torch.isfinite(gradient).all() and (gradient[:, 5:] == 0).all()


@pytest.mark.parametrize("k", [None, 2])
def test_certain_predictions_stay_finite(k):
    """Probability 1 now and then: nothing is left for the bucket, log(0) never appears."""
    logits = torch.tensor([[200.0, 0.0, -300.0, 5.0], [0.0, 200.0, 0.0, 0.0]])
    soft_targets = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    losses, gradient = run(
        logits, torch.tensor([0, 0]), dense(soft_targets) if k is None else top(soft_targets, k), 0.5
    )
    assert torch.isfinite(losses.total).all() and torch.isfinite(gradient).all()
    assert losses.total[0].item() == pytest.approx(0, abs=5e-5)
    assert losses.total[1].item() == pytest.approx(200, abs=1e-2)


def test_ignored_rows_have_no_loss_and_no_gradient():
    """Label -100, with and without a past, and in the plain sum."""
    logits, labels, soft_targets = draw()
    labels[[1, 4]] = -100
    losses, gradient = run(logits, labels, dense(soft_targets, torch.arange(ROWS) != 1), 0.8)
    assert losses.total[[1, 4]].tolist() == losses.hard[[1, 4]].tolist() == losses.soft[[1, 4]].tolist() == [0, 0]
    assert (gradient[[1, 4]] == 0).all() and (gradient[[0, 2, 3, 5, 6]].abs().sum(-1) > 0.01).all()
    logits = logits.requires_grad_()
    loss = cross_entropy_sum(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    kept = labels != -100
    close(loss, plain(logits[kept], labels[kept])[0].sum(), atol=1e-5)
    assert (gradient[~kept] == 0).all()


def test_ignored_rows_with_nan_logits_count_nothing():
    """As in F.cross_entropy: padding positions may be anything."""
    logits, labels, soft_targets = draw()
    labels[2], logits[2] = -100, math.nan
    losses = progressive_cross_entropy(logits, labels, dense(soft_targets), 0.8)
    kept = labels != -100
    expected = progressive_cross_entropy(logits[kept], labels[kept], dense(soft_targets[kept]), 0.8)
    for name in ("total", "hard", "soft"):
        assert torch.equal(getattr(losses, name)[kept], getattr(expected, name)), name
        assert getattr(losses, name)[2] == 0


@pytest.mark.parametrize("k", [None, 3])
def test_all_rows_ignored(k):
    """A batch of padding costs exactly 0."""
    logits, labels, soft_targets = draw()
    losses, gradient = run(
        logits, torch.full_like(labels, -100), dense(soft_targets) if k is None else top(soft_targets, k), 0.8
    )
    assert losses.total.sum() == 0 and (gradient == 0).all()


# Target entropy and the rest


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0])
def test_target_entropy(alpha):
    """Against the definition."""
    _, labels, soft_targets = draw()
    target = ((1 - alpha) * F.one_hot(labels, CLASSES) + alpha * soft_targets).double()
    expected = [-sum(p * math.log(p) for p in row if p > 0) for row in target.tolist()]
    close(target_entropy(dense(soft_targets), labels, alpha), torch.tensor(expected))
    assert min(expected) > 0.1 * alpha


@pytest.mark.parametrize("k", [1, 3, 6, CLASSES])
def test_target_entropy_of_top_k_is_the_collapsed_one_and_a_lower_bound(k):
    """The bucket is one class, the label's if it is not among the stored entries."""
    _, labels, soft_targets = draw(200)
    alpha, stored = 0.6, top(soft_targets, k)
    entropy = target_entropy(stored, labels, alpha)
    target = ((1 - alpha) * F.one_hot(labels, CLASSES) + alpha * soft_targets).double()
    collapsed = []
    for row, kept in zip(target.tolist(), stored.index.tolist(), strict=True):
        parts = [row[c] for c in kept] + [sum(p for c, p in enumerate(row) if c not in kept)]
        collapsed.append(-sum(p * math.log(p) for p in parts if p > 0))
    close(entropy, torch.tensor(collapsed), atol=2e-5)
    whole = target_entropy(dense(soft_targets), labels, alpha)
    assert (entropy <= whole + 1e-5).all()
    if k == 3:
        outside = ~(stored.index == labels[:, None]).any(-1)
        assert 20 < outside.sum() < 180 and (entropy < whole - 1e-2)[outside].any()


def test_loss_of_top_k_is_never_below_the_target_entropy():
    """Whatever the logits; and near it where they equal the target."""
    logits, labels, soft_targets = draw(200)
    stored = top(soft_targets, 3)
    entropy = target_entropy(stored, labels, 0.6)
    assert (run(logits, labels, stored, 0.6)[0].total >= entropy - 1e-5).all()
    best = (0.4 * F.one_hot(labels, CLASSES) + 0.6 * soft_targets).log()
    inside = (stored.index == labels[:, None]).any(-1)
    close(run(best, labels, stored, 0.6)[0].total[inside], entropy[inside], atol=2e-5)


def test_target_entropy_of_ignored_rows_does_not_fail():
    """The value is arbitrary."""
    _, labels, soft_targets = draw()
    labels[:] = -100
    assert torch.isfinite(target_entropy(dense(soft_targets), labels, 0.5)).all()


def test_select_reorders_rows():
    """All three parts move together."""
    _, _, soft_targets = draw()
    order, mask = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)), torch.arange(ROWS) % 2 == 0
    chosen = top(soft_targets, 3, mask).select(order)
    for place, row in enumerate(order.tolist()):
        values, index = soft_targets[row].topk(3)
        assert torch.equal(chosen.index[place], index) and chosen.mask[place] == (row % 2 == 0)
        close(chosen.log_probs[place].exp(), values)
    assert dense(soft_targets, mask).select(order).index is None


def test_log_softmax_is_float32_and_finite():
    """-inf becomes a number whose exponential is exactly 0; NaN stays NaN, for the history to see."""
    out = log_softmax(torch.tensor([[0.0, -math.inf], [math.nan, 0.0]], dtype=torch.float16))
    assert out.dtype == torch.float32 and out[0].tolist() == [0.0, LOG_ZERO] and out[0].exp()[1] == 0
    assert out[1].isnan().all()


# Stored entries: the four remainder rules, row by row in float64

RULES = ["bucket", "label", "uniform", "renormalize"]


def target_of(past_row, kept, label, rule):
    """The whole distribution `[C]` that the stored entries of a row stand for; none for the bucket."""
    known = torch.zeros_like(past_row).scatter(0, kept, past_row[kept])
    outside = torch.ones_like(past_row).scatter(0, kept, 0.0)
    rest = 1 - known.sum() if outside.any() else torch.zeros(())
    if rule == "label":
        known[label] += rest
    elif rule == "uniform" and outside.any():
        known = known + outside * rest / outside.sum()
    elif rule == "renormalize":
        known = known / known.sum()
    return known


def stored_reference(logits, labels, past_probs, kept, mask, alpha, rule, tau=1.0):
    """Total, hard and soft loss of each row and the gradient of the total, from definitions only."""
    logits = logits.detach().double().requires_grad_()
    hard, soft = (torch.zeros(len(logits), dtype=torch.float64) for _ in range(2))
    total = []
    for r, label in enumerate(labels.tolist()):
        if label == -100:
            total.append((logits[r] * 0).sum())
            continue
        row, past_row = logits[r], past_probs[r].double()
        h = -row.log_softmax(0)[label]
        hard[r] = h.detach()
        if not mask[r]:
            total.append(h)
            continue
        if rule == "bucket":
            part = reference_soft(row, past_row, tau, kept[r].tolist())
        else:
            target = soften(target_of(past_row, kept[r], label, rule), tau)
            part = -(target * (row / tau).log_softmax(0)).sum() * tau**2
        soft[r] = part.detach()
        total.append((1 - alpha) * h + alpha * part)
    total = torch.stack(total)
    return total.detach(), hard, soft, torch.autograd.grad(total.sum(), logits)[0]


def stored(past_probs, k, rule, mask=None):
    made = top(past_probs, k, mask)
    made.tail = rule
    return made


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 4, CLASSES])
@pytest.mark.parametrize("rule", RULES)
def test_stored_entries_equal_the_reference(rule, k, masked, ignored, tau):
    logits, labels, soft_targets = draw(seed=4)
    labels[3] = soft_targets[3].argmax()  # among the entries, whichever they are
    mask = torch.arange(ROWS) % 3 != 1 if masked else torch.ones(ROWS, dtype=torch.bool)
    if ignored:
        labels[[0, 1]] = -100
    entries = stored(soft_targets, k, rule, mask)
    losses, gradient = run(logits, labels, entries, 0.7, tau)
    total, hard, soft, expected = stored_reference(logits, labels, soft_targets, entries.index, mask, 0.7, rule, tau)
    near = 1e-4 if tau != 1.0 and rule == "bucket" else 5e-6
    close(losses.total, total, atol=near)
    close(losses.hard, hard)
    close(losses.soft, soft, atol=near)
    close(gradient, expected, atol=near)
    if not (masked or ignored):
        entries.all_valid = True  # spares the masking and changes nothing
        whole, same = run(logits, labels, entries, 0.7, tau)
        assert torch.equal(whole.total, losses.total) and torch.equal(same, gradient) and whole.distilled is None
    if k < CLASSES:
        others = [other for other in RULES if other != rule]
        values = [
            stored_reference(logits, labels, soft_targets, entries.index, mask, 0.7, other, tau)[0] for other in others
        ]
        assert all((value - total).abs().max() > 1e-2 for value in values)  # the rules can be told apart


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [4, CLASSES])
@pytest.mark.parametrize("rule", RULES)
def test_stored_entries_with_half_precision_logits(rule, k, masked):
    """The value is that of the same logits in float32."""
    logits, labels, soft_targets = draw(seed=4)
    labels[0], mask = -100, torch.arange(ROWS) % 3 != 1 if masked else torch.ones(ROWS, dtype=torch.bool)
    entries, half = stored(soft_targets, k, rule, mask), logits.bfloat16()
    losses, gradient = run(half, labels, entries, 0.7)
    total, _, _, expected = stored_reference(half, labels, soft_targets, entries.index, mask, 0.7, rule)
    close(losses.total, total, atol=5e-6)
    assert losses.total.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert ((gradient.double() - expected).abs() < 2.0**-8).all() and (gradient[0] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_gradient_of_stored_entries_is_rounded_once(rule):
    logits, labels, soft_targets = draw(200, seed=4)
    half, entries = logits.bfloat16(), stored(soft_targets, 4, rule)
    (_, gradient), (_, wide) = (run(z, labels, entries, 0.7) for z in (half, half.float()))
    assert ((gradient.float() - wide).abs() <= 2.0**-8 * wide.abs()).all()


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("rule", RULES)
def test_stored_entries_pass_gradcheck(rule, tau):
    """Finite differences (of the float32 inside, hence the wide step)."""
    logits, labels, soft_targets = draw(4, 6, sharpness=1.0)
    labels[1] = -100
    entries = stored(soft_targets, 3, rule, torch.tensor([True, True, False, True]))

    def loss(z):
        return progressive_cross_entropy(z, labels, entries, 0.7, tau).total.double()

    inputs = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-2, atol=1e-3, rtol=1e-3)

    def broken(z):
        return loss(z.detach() + 0.95 * (z - z.detach()))

    assert not torch.autograd.gradcheck(broken, inputs, eps=1e-2, atol=1e-3, rtol=1e-3, raise_exception=False)


@pytest.mark.parametrize("rule", RULES)
def test_alpha_0_of_stored_entries_is_cross_entropy(rule):
    logits, labels, soft_targets = draw()
    losses, gradient = run(logits, labels, stored(soft_targets, 3, rule), 0.0)
    hard, expected = plain(logits, labels)
    close(losses.total, hard)
    close(gradient, expected)
    assert not losses.distilled.any()
    assert (run(logits, labels, stored(soft_targets, 3, rule), 0.5)[0].total - hard).abs().max() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_weighted_rows_get_weighted_gradients(rule):
    """What comes in from behind is passed on row by row."""
    logits, labels, soft_targets = draw()
    entries, weights = stored(soft_targets, 3, rule), torch.linspace(-1, 2, ROWS)
    z = logits.clone().requires_grad_()
    total = progressive_cross_entropy(z, labels, entries, 0.6).total
    (gradient,) = torch.autograd.grad((weights * total).sum(), z)
    expected = stored_reference(logits, labels, soft_targets, entries.index, torch.ones(ROWS), 0.6, rule)[3]
    close(gradient, expected * weights.double().unsqueeze(-1), atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_certain_present_and_past_with_stored_entries(rule, dtype):
    """Nothing is left for the other classes, now, then or both: finite, and near the exact value where it has one."""
    logits = torch.tensor([[60.0, 0, 0, 0, 0, 0]] * 3 + [[1.0, 0.5, 0, 0, 0, 0]]).to(dtype)
    sure, unsure = torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.tensor([0.6, 0.3, 0.04, 0.03, 0.02, 0.01])
    soft_targets = torch.stack((sure, sure, unsure, sure))
    labels = torch.tensor([0, 1, 0, 0])
    entries = stored(soft_targets, 2, rule)
    losses, gradient = run(logits, labels, entries, 0.5)
    assert torch.isfinite(losses.total).all() and torch.isfinite(gradient).all()
    assert losses.total[0].item() == pytest.approx(0, abs=1e-3)
    assert losses.total[1].item() == pytest.approx(30, rel=1e-3)
    total, _, _, expected = stored_reference(logits, labels, soft_targets, entries.index, torch.ones(4), 0.5, rule)
    close(losses.total[3:], total[3:], atol=1e-5)
    close(gradient[3:].float(), expected[3:], atol=1e-5 if dtype == torch.float32 else 4e-3)
    if rule != "bucket":  # a bucket has no mass to compare with left in float32
        close(losses.total, total, atol=1e-4)
        close(gradient.float(), expected, atol=1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("sharpness", [4.0, 7.0, 9.0])
def test_bucket_of_little_mass(sharpness):
    """The mass left over is a difference of float32 numbers: the error stays below its resolution."""
    logits = torch.zeros(1, 50)
    logits[0, :2] = torch.tensor([sharpness + 4, sharpness])
    soft_targets = torch.full((1, 50), 0.1 / 48)
    soft_targets[0, :2] = torch.tensor([0.6, 0.3])
    entries = stored(soft_targets, 2, "bucket")
    losses, gradient = run(logits, torch.tensor([1]), entries, 0.8)
    total, _, _, expected = stored_reference(
        logits, torch.tensor([1]), soft_targets, entries.index, torch.ones(1), 0.8, "bucket"
    )
    left = 1 - logits.double().softmax(-1)[0, :2].sum().item()
    resolution = 0.1 * 8e-7 / left  # of the logarithm of what is left, times the past mass of the bucket
    assert left < 0.02
    assert abs(losses.total.item() - total.item()) < 2e-6 + resolution
    assert (gradient - expected).abs().max() < 1e-6 + resolution


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("rule", RULES)
def test_garbage_in_stored_entries_without_a_past_reaches_nothing(rule, tau):
    logits, labels, soft_targets = draw()
    labels[4], mask = -100, torch.tensor([True, False, True, False, True, True, True])
    clean = stored(soft_targets, 3, rule, mask)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        dirty = SoftTargets(clean.log_probs.clone(), mask, clean.index, rule)
        dirty.log_probs[~mask] = garbage
        dirty.log_probs[4] = garbage  # has a past, but no label
        (a, da), (b, db) = run(logits, labels, clean, 0.8, tau), run(logits, labels, dirty, 0.8, tau)
        assert torch.equal(a.total, b.total) and torch.equal(a.soft, b.soft)
        assert torch.equal(da, db) and torch.isfinite(da).all()


@pytest.mark.parametrize("rule", RULES)
def test_stored_entries_and_a_label_of_all_rows_that_are_ignored(rule):
    logits, labels, soft_targets = draw()
    losses, gradient = run(logits, torch.full_like(labels, -100), stored(soft_targets, 3, rule), 0.8)
    assert losses.total.abs().sum() == 0 and (gradient == 0).all()


@pytest.mark.parametrize("rule", ["bucket", "label", "renormalize", "uniform"])
def test_stored_entries_with_masked_classes_stay_finite(rule):
    """Logits of -inf cost nothing where the rule gives these classes no mass; never is anything NaN."""
    logits, labels, soft_targets = draw(6, 8)
    labels, soft_targets = labels.clamp_max(4), soft_targets[:, :5] / soft_targets[:, :5].sum(-1, keepdim=True)
    entries = stored(soft_targets, 3, rule)
    gap = torch.cat((logits[:, :5], -torch.full((6, 3), math.inf)), dim=1)
    losses, gradient = run(gap, labels, entries, 0.8)
    assert not losses.total.isnan().any() and torch.isfinite(gradient).all()
    if rule != "uniform":
        expected, narrow = run(logits[:, :5], labels, entries, 0.8)
        close(losses.total, expected.total)
        close(gradient[:, :5], narrow)
        assert (gradient[:, 5:] == 0).all()


@pytest.mark.parametrize("rule", ["label", "renormalize"])
@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_target_entropy_of_a_remainder_without_other_classes_is_exact(rule, alpha):
    _, labels, soft_targets = draw(50)
    entries = stored(soft_targets, 3, rule)
    expected = []
    for row, kept, label in zip(soft_targets.double(), entries.index, labels.tolist(), strict=True):
        target = alpha * target_of(row, kept, label, rule)
        target[label] += 1 - alpha
        expected.append(torch.special.entr(target).sum())
    close(target_entropy(entries, labels, alpha), torch.stack(expected), atol=5e-6)


# What is stored, and the normalizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("classes", "k", "block"),
    [(7, 7, 64), (1000, 3, 64), (1003, 3, 64), (1027, 4, 64), (257, 1, 64), (97, 5, 4), (6500, 25, 64)],
)
def test_top_entries_are_those_of_topk(classes, k, block, dtype):
    rows = torch.randn(9, classes, generator=torch.Generator().manual_seed(classes)).to(dtype)
    values, index = top_entries(rows, k, block)
    expected = rows.topk(k, dim=-1)
    assert torch.equal(values, expected.values)  # with equal scores in bfloat16 another index is as good
    assert torch.equal(rows.gather(-1, index), values)
    assert all(len(set(row)) == k for row in index.tolist())
    if dtype == torch.float32:
        assert torch.equal(index, expected.indices)


def test_top_entries_of_rows_in_several_chunks_and_in_the_last_classes():
    """A wide row: the largest in the first block, in the odd end and all in one block."""
    rows = torch.randn(5, 131_101, generator=torch.Generator().manual_seed(0))
    rows[0, -1], rows[1, 0] = 99.0, 98.0
    rows[2, 640:644] = torch.tensor([60.0, 61.0, 62.0, 63.0])
    rows[3] = -math.inf
    rows[3, [5, 70, 131_100]] = torch.tensor([1.0, 2.0, 3.0])
    values, index = top_entries(rows, 3)
    expected = rows.topk(3, dim=-1)
    assert torch.equal(values, expected.values) and torch.equal(index, expected.indices)
    assert index[2].tolist() == [643, 642, 641] and index[3].tolist() == [131_100, 70, 5]


@pytest.mark.parametrize("classes", [1, 5, 1003, 300_001])
def test_summary_is_logsumexp_and_topk(classes):
    """Also in several chunks, and of rows too wide for one."""
    rows = 5 * torch.randn(3 if classes > 1e5 else 700, classes, generator=torch.Generator().manual_seed(1))
    for logits in (rows, rows.bfloat16()):
        whole, k = summarize(logits), min(4, classes)
        assert whole.log_norm.dtype == torch.float32 and whole.top is None
        close(whole.log_norm, logits.double().exp().sum(-1).log(), atol=1e-5)
        with_entries = summarize(logits, k)
        assert torch.equal(with_entries.log_norm, whole.log_norm)
        assert torch.equal(with_entries.top, logits.float().topk(k).values)
        assert torch.equal(logits.float().gather(-1, with_entries.index), with_entries.top)
    close(summarize(rows + 500).log_norm, summarize(rows).log_norm + 500, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 263, 530])
def test_cross_entropy_in_pieces_is_that_of_torch_to_the_bit(rows, dtype, monkeypatch):
    """Several pieces of 262 rows, with rows that are ignored; the control is the number of pieces."""
    monkeypatch.setattr(cross_entropy_module, "CHUNK_ABOVE", 0)
    logits, labels, _ = draw(rows, 1000, seed=rows)
    labels[::3] = -100
    ours, torchs = (logits.to(dtype).requires_grad_() for _ in range(2))
    loss = cross_entropy_sum(ours, labels)
    expected = F.cross_entropy(torchs.float(), labels, reduction="sum")
    (gradient,), (same) = torch.autograd.grad(loss / 7, ours), torch.autograd.grad(expected / 7, torchs)[0]
    assert torch.equal(loss, expected) and torch.equal(gradient, same) and gradient.dtype == dtype
    assert "Chunked" in type(loss.grad_fn).__name__ and "InPieces" not in type(expected.grad_fn).__name__
    kept = labels != -100
    close(loss, plain(logits.to(dtype).float()[kept], labels[kept])[0].sum(), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rows", [1, 263, 530])
def test_whole_rows_in_pieces_are_those_of_one_piece_to_the_bit(rows, known, dtype, monkeypatch):
    """Pieces of 262 rows; rows without a past have the bits of F.cross_entropy, and the past has no gradient."""
    logits, labels, soft_targets = draw(rows, 1000, seed=rows)
    labels[::3], mask = -100, torch.arange(rows) % 4 != 1
    logits, old, weights = logits.to(dtype), dense(soft_targets, mask), torch.linspace(-1, 2, rows)
    old.log_probs[~mask] = math.nan
    old.log_probs.requires_grad_()
    normalized = log_softmax(logits) if known else None
    results = []
    for limit in (0, 2**30):
        monkeypatch.setattr(losses_module, "CHUNK_ABOVE", limit)
        z = logits.clone().requires_grad_()
        losses = progressive_cross_entropy(z, labels, old, 0.7, normalized=normalized)
        assert ("Chunked" in type(losses.total.grad_fn).__name__) == (limit == 0)
        (weights * losses.total).sum().backward()
        results.append((losses, z.grad))
    (pieces, gradient), (whole, expected) = results
    for name in ("total", "hard", "soft"):
        assert torch.equal(getattr(pieces, name), getattr(whole, name)), name
    assert torch.equal(gradient, expected) and gradient.dtype == dtype and old.log_probs.grad is None
    z = logits.clone().requires_grad_()
    hard = F.cross_entropy(z.float(), labels, reduction="none")
    (weights * hard).sum().backward()
    assert torch.equal(pieces.total[~mask], hard[~mask]) and torch.equal(gradient[~mask], z.grad[~mask])
    learns = mask & (labels != -100)
    assert not torch.equal(gradient[learns], z.grad[learns]) or not learns.any()


def test_large_whole_rows_equal_the_reference():
    """More than `WHOLE` elements, in float64 row by row."""
    rows, classes = 70, 32_000
    logits, labels, soft_targets = draw(rows, classes, seed=3)
    labels[2], mask = -100, torch.arange(rows) % 5 != 1
    assert logits.numel() > losses_module.CHUNK_ABOVE
    losses, gradient = run(logits, labels, dense(soft_targets, mask), 0.8)
    total, expected = reference(logits, labels, soft_targets, mask, 0.8)
    close(losses.total, total, atol=2e-5)
    close(gradient, expected)
    assert (run(logits, labels, dense(soft_targets, mask), 0.7)[0].total - losses.total).abs().max() > 0.1
    for alpha in (0.3, 0.8):
        target = alpha * soft_targets.double()
        target[torch.arange(rows), labels.clamp_min(0)] += 1 - alpha
        close(
            target_entropy(dense(soft_targets), labels.clamp_min(0), alpha),
            torch.special.entr(target).sum(-1),
            atol=2e-5,
        )
