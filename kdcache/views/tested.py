"""How test images were shown to a model: a view policy without randomness, as records and archives hold it. NumPy only."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdcache.views.crops import CenterCrop
from kdcache.views.policy import ViewPolicy

__all__ = ["WHOLE", "TestViews"]


class TestViews(BaseModel):
    """The views of a test: `policy`, and the `crop_pct` of timm that its crop comes from, if a model stated one."""

    __test__ = False  # it is no test of pytest's
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    origin: str  # model: its pretrained configuration; or the test policy that was asked for or is the dataset's
    policy: ViewPolicy
    crop_pct: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _not_random(self) -> "TestViews":
        if not self.policy.is_fixed:
            raise ValueError("the views of a test are centre crops without randomness")
        return self

    @property
    def crop(self) -> CenterCrop:
        assert isinstance(self.policy.crop, CenterCrop)
        return self.policy.crop

    @property
    def share(self) -> float:
        """Share of the short side that a view shows (of each side, where images are squashed)."""
        return self.crop_pct or (self.policy.size / self.crop.resize if self.crop.resize else self.crop.fraction)

    @property
    def title(self) -> str:
        """In words: `crop 0.95 of the short side, bicubic`."""
        share = self.share
        if self.crop.mode == "squash":
            return f"{'whole image' if share == 1 else f'{share:.4g} of each side'} made square, {self.policy.filter}"
        return f"crop {share:.4g} of the short side, {self.policy.filter}"

    def timm_fields(self) -> dict[str, Any]:
        """The fields of timm's configuration by which timm shows test images likewise."""
        return {"crop_pct": self.share, "crop_mode": self.crop.mode, "interpolation": self.policy.filter}


WHOLE = TestViews(origin="none", policy=ViewPolicy.load("none"))  # what tests showed before they had a policy
