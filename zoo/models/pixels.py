"""How the zoo's models make the pixels of a data set standard ones."""


def standardized(mean, stddev):
    """The arguments of an image model that make its channels standard ones.

    Raw pixels x are from 0 to 255, so that with the mean μ and standard deviation σ of
    x / 255 the model computes with

        (x / 255 - μ) / σ = scale · x + offset.

    Args:
        mean: μ, a number each channel.
        stddev: σ, likewise.

    Returns:
        dict of `scale` and `offset`, lists of a number each channel.

    Example:

    >>> from kzoo.zoo.models.pixels import standardized
    >>> standardized(mean=[0.5], stddev=[0.25])["offset"]
    [-2.0]
    """
    return {
        "scale": [1 / (255 * s) for s in stddev],
        "offset": [-m / s for m, s in zip(mean, stddev, strict=True)],
    }


# Of the training images of CIFAR-10 and of ImageNet.
CIFAR10 = standardized((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = standardized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
