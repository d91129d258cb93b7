"""Data by name, each with its own normalisation: digits, MNIST and its kin, CIFAR, folders of images, text, arrays."""

from vfx.data.catalogue import SOURCES, read
from vfx.data.cifar import cifar10, cifar100
from vfx.data.digits import digits
from vfx.data.folder import ImageFolder
from vfx.data.mnist import fashion_mnist, mnist
from vfx.data.preprocessing import preprocessing
from vfx.data.tasks import tasks
from vfx.data.text import text, text_file

__all__ = [
    "SOURCES",
    "ImageFolder",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "mnist",
    "preprocessing",
    "read",
    "tasks",
    "text",
    "text_file",
]
