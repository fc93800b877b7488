"""Models are for the members that their layers have."""

from functools import partial

import pytest

from kzoo.layers import BatchNormalizationBatchEnsemble, DenseBatchEnsemble
from kzoo.zoo.models.bottleneck_resnet import bottleneck_resnet
from kzoo.zoo.models.resnet import resnet
from kzoo.zoo.models.transformer import transformer
from kzoo.zoo.models.wide_resnet import wide_resnet

SMALL = {
    "resnet": partial(resnet, (8, 8, 1), 3, depth=8, width=1),
    "wide": partial(wide_resnet, (8, 8, 1), 3, depth=10, width=1),
    "bottleneck": partial(bottleneck_resnet, (8, 8, 1), 3, blocks=(1,), width=1),
    "transformer": partial(transformer, 5, layers=1, width=2, heads=1, hidden=2),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_plain_layers_have_no_members(make):
    message = r"Received: ensemble_size=3, and layers of \[1\] members"
    with pytest.raises(ValueError, match=message):
        make(ensemble_size=3)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("part", ["dense", "normalization"])
def test_members_that_the_model_is_not_for(part, size):
    layer = {
        "dense": partial(DenseBatchEnsemble, ensemble_size=2),
        "normalization": partial(BatchNormalizationBatchEnsemble, 2),
    }[part]
    message = rf"Received: ensemble_size={size}, and layers of \[2\] members"
    with pytest.raises(ValueError, match=message):
        SMALL["bottleneck"](ensemble_size=size, **{part: layer})
    SMALL["bottleneck"](ensemble_size=2, **{part: layer})
