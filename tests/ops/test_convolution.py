import torch
import torch.nn.functional as F

from dico_t2i.ops import depthwise3x3, pixel_shuffle, pixel_unshuffle, reference


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def test_depthwise_agrees_with_the_reference():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 7, 5, 6), (6, 1, 3, 3), (6,)))
    torch.testing.assert_close(depthwise3x3(x, weight, bias), reference.depthwise3x3(x, weight, bias))


def test_resampling_is_that_of_torch():
    x = torch.randn(2, 8, 6, 4)
    assert torch.equal(pixel_unshuffle(nhwc(x)), nhwc(F.pixel_unshuffle(x, 2)))
    assert torch.equal(pixel_shuffle(nhwc(x)), nhwc(F.pixel_shuffle(x, 2)))
    assert torch.equal(pixel_shuffle(pixel_unshuffle(nhwc(x))), nhwc(x))
