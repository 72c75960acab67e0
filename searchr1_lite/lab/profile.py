"""A profile with known faults, and which fault can go with which settings. Light: it loads nothing of the training."""

import os
from typing import Any, Literal

from pydantic import Field, model_validator

from searchr1_lite.config import REINFORCED, Profile, load_profile

Defect = Literal[
    "retokenised_text", "no_stop_at_tag", "mask_by_text", "groups_of_one", "kl_sign", "unmasked_values",
    "top_p_sampling", "stale_updates", "colliding_ids", "truncated_closing_tag", "ratio_over_retrieved", "bf16_lora",
]  # fmt: skip


class BrokenProfile(Profile):
    defects: list[Defect] = Field([])  # what defects.py does to the training

    @model_validator(mode="before")
    @classmethod
    def _stale(cls, settings: Any) -> Any:
        """The defect stale_updates is a setting: ten updates from one batch (the scripts' batch sizes)."""
        known = isinstance(settings, dict) and isinstance(settings.get("defects"), list | tuple)
        return settings | {"updates_per_rollout": 10} if known and "stale_updates" in settings["defects"] else settings

    @model_validator(mode="after")
    def _have_what_they_need(self) -> "BrokenProfile":
        for defect in self.defects:
            met, needed = self._needs(defect)
            if self.algorithm not in REINFORCED or not met:
                raise ValueError(f"defects: {defect} needs {needed if not met else 'rollouts'}")
        if self.defects and self.trainer != "loop":
            raise ValueError("defects: they are made in our own training loop: trainer = loop")
        return self

    def _needs(self, defect: str) -> tuple[bool, str]:
        """Whether there is what a defect is a defect of, and what that is."""
        grpo, local = self.algorithm == "grpo", self.sampler == "local"
        pairs = self.questions_per_step % 2 == 0 and "groups_of_one" not in self.defects
        leaks = local and self.masked and grpo and self.policy_loss != "cispo" and not self.llds_coef
        return {
            "retokenised_text": (local, "sampler local: nobody knows what a server would have thought of the new ids"),
            "no_stop_at_tag": (local, "sampler local"),
            "top_p_sampling": (local, "sampler local"),
            "mask_by_text": (local and self.masked, "masked true, and sampler local"),
            "groups_of_one": (grpo, "algorithm grpo"),
            "colliding_ids": (grpo and pairs, "algorithm grpo, an even questions_per_step, and no groups_of_one"),
            "kl_sign": (self.beta > 0 and self.algorithm != "ppo", "beta above 0, and not PPO, whose KL is a reward"),
            "unmasked_values": (self.algorithm == "ppo", "algorithm ppo: only that has values"),
            "truncated_closing_tag": (self.strategy == "search_r1", "strategy search_r1: only that is shown passages"),
            "ratio_over_retrieved": (leaks, "algorithm grpo, masked true, sampler local, and neither CISPO nor LLDS"),
            "bf16_lora": (self.lora_r > 0, "an adapter: lora_r above 0"),
        }.get(defect, (True, ""))


def load_broken(name: str | os.PathLike = "tiny", /, **overrides: Any) -> BrokenProfile:
    """As `load_profile`, for a profile that may have the setting `defects`."""
    return load_profile(name, BrokenProfile, **overrides)
