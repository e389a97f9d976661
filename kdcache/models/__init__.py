"""The boundary to timm: names of models, their creation and weights, and the CIFAR networks of the papers."""
