"""Zero-shot teachers: the image tower of a CLIP or SigLIP model of `transformers` (extra `hf`), with prompts as its classifier.

`--teacher kdcache.models.zeroshot:clip` is OpenAI's smallest CLIP. For another model or other prompts, write a module:

    from kdcache.models.zeroshot import zero_shot

    def mine(num_classes, class_names):
        return zero_shot("hf-hub:openai/clip-vit-large-patch14@REVISION", class_names, templates=("a photo of a {}.", "a {}."))

and use it where it is: `kdcache dump-teacher --teacher my_module:mine --teacher-epochs 0 ...`. The classifier is a layer of the
model, so the digest of its weights, by which teachers and archives are known, depends on class names and prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.errors import IncompatibleError, UsageError
from kdcache.models import hf
from kdcache.models.classes import spoken
from kdcache.models.names import HUB, LOCAL, exact_name, public_name

__all__ = ["ZeroShot", "clip", "siglip", "zero_shot"]

CLIP, SIGLIP = "hf-hub:openai/clip-vit-base-patch32", "hf-hub:google/siglip-base-patch16-224"
PROMPTS = ("a photo of a {}.",)  # CLIP's paper, section 3.1.4
OF_TEXT = ("text_model", "text_projection", "logit_scale", "logit_bias")  # parts that images do not need
BATCH = 256


class ZeroShot(nn.Module):
    """Logits `[B, C]` of normalised images `[B, 3, S, S]`: scaled cosines between an image and the prompts of each class.

    `head` has the classes' unit vectors times the scale, `[C, D]`, and SigLIP's bias.
    """

    def __init__(self, towers: Any, vectors: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.towers = towers
        self.head = nn.Linear(vectors.shape[1], vectors.shape[0], bias=bias is not None)
        with torch.no_grad():
            self.head.weight.copy_(vectors * scale)
            if bias is not None:
                self.head.bias.copy_(bias.expand(len(vectors)))
        for part in OF_TEXT:
            if hasattr(towers, part):
                delattr(towers, part)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.normalize(_vectors(self.towers.get_image_features(pixel_values=x)), dim=1))
        return logits


def clip(num_classes: int, class_names: Sequence[str]) -> nn.Module:
    """OpenAI's CLIP ViT-B/32, with the prompt `a photo of a {}.`."""
    return zero_shot(CLIP, class_names)


def siglip(num_classes: int, class_names: Sequence[str]) -> nn.Module:
    """Google's SigLIP ViT-B/16, with the prompt `This is a photo of {}.`."""
    return zero_shot(SIGLIP, class_names, templates=("This is a photo of {}.",))


def zero_shot(name: str, class_names: Sequence[str], *, templates: Sequence[str] = PROMPTS) -> nn.Module:
    """The zero-shot classifier of these classes by a model `hf-hub:ORG/NAME[@REVISION]` or `local-dir:PATH`.

    A class is the mean of the unit vectors of its prompts, again of length 1, as in CLIP's paper. Names are put into the
    templates in plain words: a WordNet id as its first synonym, underscores as spaces. `pretrained_cfg` of the result states
    what the model's image processor does. Raises IncompatibleError for a model without both towers.
    """
    if not name.startswith((HUB, LOCAL)):
        raise UsageError(f"model {name!r} is not understood", why="it is on the Hub or in a folder", fix=f"write {HUB}{name}")
    if not templates or not all("{}" in template for template in templates):
        raise UsageError(f"templates {list(templates)}", why="each needs the place of the class, {}", fix="'a photo of a {}.'")
    exact = exact_name(name)
    where, revision = hf.locate(exact)
    library = hf.transformers_for(exact)
    with hf.loaded_quietly(exact):
        towers = library.AutoModel.from_pretrained(where, **revision, dtype=torch.float32).eval()
        if not all(hasattr(towers, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
            raise IncompatibleError(
                f"{public_name(exact)} has no towers for images and texts",
                why=f"it is of the model type {towers.config.model_type!r}",
                fix="name a CLIP or SigLIP model of transformers, such as " + CLIP,
            )
        tokens = library.AutoTokenizer.from_pretrained(where, **revision)
        vectors = torch.stack([_of_prompts(towers, tokens, template, class_names) for template in templates])
    # By logarithms, as both models keep it.
    scale, bias = towers.logit_scale.detach().exp(), getattr(towers, "logit_bias", None)
    model = ZeroShot(towers, F.normalize(vectors.mean(0), dim=1), scale, None if bias is None else bias.detach())
    model.pretrained_cfg = {**hf.stated(exact), "classifier": "head", "num_classes": len(class_names)}  # type: ignore[assignment]
    return model


@torch.inference_mode()
def _of_prompts(towers: Any, tokens: Any, template: str, class_names: Sequence[str]) -> Tensor:
    """Unit vectors `[C, D]` of one prompt for each class."""
    prompts = [template.replace("{}", spoken(name)) for name in class_names]
    # SigLIP was trained with prompts of full length.
    padding = "max_length" if towers.config.model_type.startswith("siglip") else True
    longest = towers.config.text_config.max_position_embeddings
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = tokens(prompts[start : start + BATCH], padding=padding, truncation=True, max_length=longest, return_tensors="pt")
        known = {key: value for key, value in batch.items() if key in {"input_ids", "attention_mask"}}
        parts.append(F.normalize(_vectors(towers.get_text_features(**known)), dim=1))
    return torch.cat(parts)


def _vectors(features: Any) -> Tensor:
    """Embeddings `[B, D]`: newer transformers return them as one of several outputs."""
    vectors: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return vectors
