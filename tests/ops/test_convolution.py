import torch
import torch.nn.functional as F

from dico_t2i.ops import pixel_shuffle, pixel_unshuffle


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def test_resampling_is_that_of_torch():
    x = torch.randn(2, 8, 6, 4)
    assert torch.equal(pixel_unshuffle(nhwc(x)), nhwc(F.pixel_unshuffle(x, 2)))
    assert torch.equal(pixel_shuffle(nhwc(x)), nhwc(F.pixel_shuffle(x, 2)))
    assert torch.equal(pixel_shuffle(pixel_unshuffle(nhwc(x))), nhwc(x))
