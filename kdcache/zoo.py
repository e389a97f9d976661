"""`import kdcache.zoo` makes the CIFAR networks of kdcache.models.cifar known to `timm.create_model`."""

from kdcache.models.cifar import *  # noqa: F403
