"""The boundary to timm: model names, creation and weights, and the CIFAR networks of the papers."""
