"""Real handwriting without a download: scikit-learn's 1,797 digits of 8×8 pixels, enlarged for the papers' networks."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEST_IMAGES = 500


def digits(size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train_x (1297, 1, size, size), train_y, test_x (500, …), test_y, split by class for a given `seed`.

    Images are enlarged bilinearly, float32, standardised by the mean and deviation of all training pixels.
    """
    # Imported here: scikit-learn takes a second, and the networks do not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=seed)
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    images = (images - images[train].mean()) / images[train].std()
    return images[train], labels[train], images[test], labels[test]
