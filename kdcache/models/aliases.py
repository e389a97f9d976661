"""Short names of the models that the papers' experiments and their students have, and what they are to timm."""

__all__ = ["ALIASES"]

ALIASES: dict[str, str] = {
    # The temperature study's models, with the ImageNet-1K weights of timm that its section 3.1 describes.
    "rn50": "resnet50.a1_in1k",
    "vit_s": "vit_small_patch16_224.augreg_in1k",
    "cn_t": "convnext_tiny.fb_in1k",
    "rny6.4": "regnety_064.ra3_in1k",
    "rn18": "resnet18.a1_in1k",
    "mnv4": "mobilenetv4_conv_medium.e500_r224_in1k",
    "cn_p": "convnextv2_pico.fcmae_ft_in1k",
    "mvit": "mobilevitv2_150.cvnets_in1k",
    # Other pretraining, as its section 4.3 asks for: teachers that are finetuned with a new head. timm has no ResNet50 of
    # ImageNet-21K but BiT's, and no ViT-S of CLIP.
    "rn50_in21k": "resnetv2_50x1_bit.goog_in21k",
    "rn50_clip": "resnet50_clip_gap.openai",
    "vit_s_in21k": "vit_small_patch16_224.augreg_in21k",
    "vit_s_dino": "vit_small_patch16_224.dino",
    "vit_b_clip": "vit_base_patch16_clip_224.openai",
    # The ImageNet pairs of the distillation papers are rn34-rn18 and rn50-mnv1. Their teachers have torchvision's weights, tv_...
    "rn34": "resnet34.a1_in1k",
    "mnv1": "mobilenetv1_100.ra4_e3600_r224_in1k",
    "tv_rn34": "resnet34.tv_in1k",
    "tv_rn50": "resnet50.tv_in1k",
    # Networks of their CIFAR pairs, in models/cifar. Where timm has one of that name (vgg13, resnet50), the name is timm's,
    # and the zoo's is cifar_vgg13, cifar_resnet50.
    "resnet20": "cifar_resnet20",
    "resnet32": "cifar_resnet32",
    "resnet56": "cifar_resnet56",
    "resnet110": "cifar_resnet110",
    "resnet8x4": "cifar_resnet8x4",
    "resnet32x4": "cifar_resnet32x4",
    "wrn16_2": "cifar_wrn_16_2",
    "wrn40_1": "cifar_wrn_40_1",
    "wrn40_2": "cifar_wrn_40_2",
    "wrn28_2": "cifar_wrn_28_2",
    "wrn16_4": "cifar_wrn_16_4",
    "wrn28_4": "cifar_wrn_28_4",
    "vgg8": "cifar_vgg8",
}
