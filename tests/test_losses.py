"The segmentation losses against MONAI, in every shape and precision, and what they refuse."
import pytest
import torch
import torch.nn.functional as F

from medseg_nb.core import LabelError, ShapeError
from medseg_nb.losses.segmentation import BCEDice, CEDice

SHAPES = [(1, 2, 7), (3, 2, 8, 5), (2, 4, 5, 6, 4)]

def sample(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=g) * 3
    return logits, torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)

def value_and_gradient(loss, logits, y):
    logits = logits.clone().requires_grad_()
    value = loss(logits, y)
    return value.detach(), torch.autograd.grad(value, logits)[0]

def monai_loss(kind, batch_dice, background_in_dice):
    losses = pytest.importorskip("monai.losses")
    dice = losses.DiceLoss(include_background=background_in_dice, to_onehot_y=True, batch=batch_dice, smooth_nr=1e-5,
                           smooth_dr=1e-5, **({"sigmoid": True} if kind is BCEDice else {"softmax": True}))
    def loss(logits, y):
        one_hot = F.one_hot(y, logits.shape[1]).movedim(-1, 1).float()
        pixels = F.binary_cross_entropy_with_logits(logits, one_hot) if kind is BCEDice else F.cross_entropy(logits, y)
        return dice(logits, y[:, None]) + pixels
    return loss

@pytest.mark.parametrize("kind", [BCEDice, CEDice])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_monai(kind, batch_dice, background, shape):
    logits, y = sample(shape)
    ours = value_and_gradient(kind(batch_dice=batch_dice, background_in_dice=background), logits, y)
    theirs = value_and_gradient(monai_loss(kind, batch_dice, background), logits, y)
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("kind", [BCEDice, CEDice])
def test_gradient_is_the_finite_difference(kind):
    logits, y = sample((2, 3, 4, 3))
    loss = kind()
    _, gradient = value_and_gradient(loss, logits, y)
    step = 1e-2
    for index in [(0, 0, 0, 0), (0, 1, 2, 1), (1, 2, 3, 2)]:
        up, down = logits.clone(), logits.clone()
        up[index] += step; down[index] -= step
        assert gradient[index].item() == pytest.approx(((loss(up, y) - loss(down, y)) / (2*step)).item(), abs=2e-4)

@pytest.mark.parametrize("kind", [BCEDice, CEDice])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    logits = torch.full((1, 2, 64, 64, 32), 6.0, dtype=dtype)     # 131072 voxels: a float16 sum would be infinite
    y = torch.ones(1, 64, 64, 32, dtype=torch.int64)
    assert kind()(logits, y).dtype == torch.float32
    torch.testing.assert_close(kind()(logits, y), kind()(logits.float(), y))

@pytest.mark.parametrize("kind", [BCEDice, CEDice])
def test_extreme_scores_stay_finite(kind):
    logits = torch.tensor([[[1e4, -1e4, 1e4], [-1e4, 1e4, 1e4]]])
    for y in (torch.tensor([[0, 1, 0]]), torch.tensor([[1, 0, 1]])):
        value, gradient = value_and_gradient(kind(), logits, y)
        assert value.isfinite() and gradient.isfinite().all()

def test_perfect_and_empty():
    y = torch.zeros(1, 8, 8, dtype=torch.int64)
    sure = torch.stack([torch.full((8, 8), 50.0), torch.full((8, 8), -50.0)])[None]
    assert CEDice().parts(sure, y)["dice"].item() == pytest.approx(0, abs=1e-4)       # nothing there, nothing found
    y[0, 2:4] = 1
    assert CEDice().parts(sure, y)["dice"].item() == pytest.approx(1, abs=1e-4)       # all missed

@pytest.mark.parametrize("kind", [BCEDice, CEDice])
def test_bad_input_is_refused(kind):
    logits, y = sample((2, 3, 4, 4))
    for wrong in (y + 1, y - 1):
        with pytest.raises(LabelError, match="expected 0 to 2"): kind()(logits, wrong)
    for wrong in (y[:1], y[:, None], F.one_hot(y, 3), y.float(), y[:, :0]):
        with pytest.raises(ShapeError): kind()(logits, wrong)
    for wrong in (logits[:, :1], logits.long(), logits[0, :, 0, 0]):
        with pytest.raises(ShapeError): kind()(wrong, y)
    with pytest.raises(ShapeError, match="smooth"): kind(smooth=0)
