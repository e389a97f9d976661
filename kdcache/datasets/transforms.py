"""Transforms inside map-style datasets: which there are, and the fields of a view policy that do the same.

Transforms are told by the names of their classes and by their attributes, as torchvision (both of its versions) and timm have
them, so that neither is imported.
"""

from collections.abc import Iterator
from typing import Any

from kdcache.errors import UsageError

__all__ = ["datasets_inside", "require_untransformed"]

# Conversions that a model's input needs, and that kdcache makes itself.
_CONVERSIONS = frozenset(
    {
        "ConvertImageDtype",
        "Identity",
        "MaybeToTensor",
        "PILToTensor",
        "ToDtype",
        "ToImage",
        "ToNumpy",
        "ToPILImage",
        "ToPureTensor",
    }
    | {"ToTensor"}
)
_CONTAINERS = frozenset({"Compose", "Sequential", "ModuleList", "RandomApply", "StandardTransform", "list", "tuple"})


def datasets_inside(dataset: Any) -> Iterator[Any]:
    """`dataset`, and those that wrappers such as torch's Subset and ConcatDataset hold, at any depth."""
    seen: set[int] = set()
    waiting = [dataset]
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        inner = getattr(found, "datasets", None)
        waiting += [getattr(found, "dataset", None), *(inner if isinstance(inner, list | tuple) else ())]
        waiting = [each for each in waiting if each is not None]


def require_untransformed(dataset: Any, where: str) -> None:
    """Raise UsageError, with the policy that does the same, if a dataset transforms its images or labels."""
    held: list[Any] = []
    of_labels = False
    for each in datasets_inside(dataset):
        for name in ("transform", "transforms"):
            value = getattr(each, name, None)
            if value is not None and type(value).__name__ != "StandardTransform":  # which holds the other two
                held.append(value)
        of_labels = of_labels or getattr(each, "target_transform", None) is not None
    if held:
        advice = _Advice()
        for value in held:
            advice.read(value)
        raise UsageError(
            f"{where} transforms its images: {', '.join(advice.names) or type(held[0]).__name__}",
            why="views are drawn again from a policy, which knows nothing of a transform inside the dataset"
            + (f"; no policy has {', '.join(advice.unmatched)}" if advice.unmatched else ""),
            fix=advice.fix(),
        )
    if of_labels:
        raise UsageError(
            f"{where} has a target_transform",
            why="labels are listed once, and are those that the dataset itself has",
            fix="leave target_transform out, and let __getitem__ return the number of the class",
        )


class _Advice:
    """What is read from transforms: their `names`, the `policy` fields and `options` that do the same, and the `unmatched`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.policy: dict[str, str] = {}
        self.options: dict[str, str] = {}
        self.unmatched: list[str] = []
        self._resized: int | None = None
        self._squashed = False  # whether both sides were given, so that the photograph's proportions are lost

    def fix(self) -> str:
        fix, said = "leave the transform out of the dataset", ""
        if self.policy or "size" in self.options:
            fields = ",".join(f"{field}={value}" for field, value in self.policy.items())
            said = f"--policy 'none:{fields}'" if fields else "--policy none"
            said += f" --size {self.options['size']}" if "size" in self.options else ""
        if said:
            fix += f", and say instead: {said}"
        elif self.unmatched:
            fix += "; what a policy can do is shown by: kdcache policy imagenet"
        if "mean" in self.options:
            own = f"--mean {self.options['mean']} --std {self.options['std']}"
            fix += f"; images are normalised as the model says, or train-teacher is told with {own}"
        return fix

    def read(self, transform: Any, probability: float | None = None) -> None:
        """Read one transform. `probability`: that of the RandomApply around it."""
        name = type(transform).__name__
        if name in _CONTAINERS:
            inner = transform if isinstance(transform, list | tuple) else getattr(transform, "transforms", None)
            if name == "RandomApply":
                probability = float(getattr(transform, "p", 0.5))
            for each in inner if inner is not None else _children(transform):
                self.read(each, probability)
            return
        self.names.append(name)
        if name in _CONVERSIONS:
            return
        try:
            matched = self._match(name, transform, probability)
        except (AttributeError, IndexError, TypeError, ValueError):  # a class of that name with other attributes
            matched = False
        if not matched:
            self.unmatched.append(name)

    def _match(self, name: str, transform: Any, probability: float | None) -> bool:
        if name == "ColorJitter":
            return self._jitter(transform, 1.0 if probability is None else probability)
        if probability is not None:
            return False  # a policy has no pieces under a probability of their own but for those below
        match name:
            case "RandomResizedCrop" | "RandomResizedCropAndInterpolation":
                self._size(transform.size)
                self.policy |= {"crop.kind": "inception", "crop.scale": _pair(transform.scale)}
                if _pair(transform.ratio) != _pair((3 / 4, 4 / 3)):  # as policies have it
                    self.policy["crop.ratio"] = _pair(transform.ratio)
                self._filter(transform)
            case "RandomHorizontalFlip":
                self.policy["hflip"] = f"{float(transform.p):g}"
            case "Resize":
                self._resized = _side(transform.size)
                self._squashed = isinstance(transform.size, list | tuple) and len(transform.size) == 2
                self._size(transform.size)
                self._filter(transform)
            case "CenterCrop":
                side = _side(transform.size)
                if self._resized and self._resized >= side:
                    mode = "squash" if self._squashed else "center"
                    self.policy |= {"crop.mode": mode, "crop.fraction": f"{side / self._resized:.4g}"}
                self._size(transform.size)
            case "RandomCrop" if getattr(transform, "padding", None):
                self.policy |= {"crop.kind": "pad", "crop.padding": str(_side(transform.padding))}
                self._size(transform.size)
            case "RandAugment":
                self.policy |= {"randaugment.n": str(int(transform.num_ops)), "randaugment.m": str(int(transform.magnitude))}
                if transform.num_magnitude_bins != 31:  # as policies have it
                    self.policy["randaugment.bins"] = str(int(transform.num_magnitude_bins))
            case "RandomErasing":
                chance = transform.p if hasattr(transform, "p") else transform.probability
                scale = transform.scale if hasattr(transform, "scale") else (transform.min_area, transform.max_area)
                self.policy |= {"erase.probability": f"{float(chance):g}", "erase.scale": _pair(scale)}
                if hasattr(transform, "ratio"):
                    self.policy["erase.ratio"] = _pair(transform.ratio)
            case "Normalize":
                self.options |= {"mean": _values(transform.mean), "std": _values(transform.std)}
            case _:
                return False
        return True

    def _jitter(self, transform: Any, probability: float) -> bool:
        strengths: dict[str, str] = {}
        for name in ("brightness", "contrast", "saturation", "hue"):
            bounds = getattr(transform, name)
            if bounds is None:
                continue
            low, high = (float(bound) for bound in bounds)
            strength = high if name == "hue" else high - 1
            expected = -strength if name == "hue" else max(0.0, 1 - strength)
            if strength < 0 or abs(low - expected) > 1e-6:
                return False  # a policy's factors lie evenly around 1
            strengths[f"jitter.{name}"] = f"{strength:.4g}"
        if probability < 1:
            strengths["jitter.probability"] = f"{probability:g}"
        self.policy |= strengths
        return True

    def _size(self, size: Any) -> None:
        self.options["size"] = str(_side(size))

    def _filter(self, transform: Any) -> None:
        interpolation = getattr(transform, "interpolation", "")
        named = str(getattr(interpolation, "value", interpolation)).lower()
        if named in {"bilinear", "bicubic"}:
            self.policy["filter"] = named


def _children(module: Any) -> list[Any]:
    """Transforms in a module: torch's Sequential and ModuleList have no list of them."""
    return list(module.children()) if hasattr(module, "children") else []


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _pair(values: Any) -> str:
    low, high = (float(value) for value in values)
    return f"[{low:.6g},{high:.6g}]"


def _values(values: Any) -> str:
    return ",".join(f"{float(value):g}" for value in values)
