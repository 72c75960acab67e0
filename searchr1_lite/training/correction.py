"""Weighing what another program sampled: the learner and a vLLM server never agree to the last digit.

Each token's loss is multiplied by learner probability over sampling probability, at most CAP: truncated importance
sampling, which TRL has. Left out: TRL's default, one weight for a whole sequence. That is a product over thousands of
tokens, which small biases drive to nothing, or over the cap, where TRL drops the sequence.
"""

from types import SimpleNamespace

from trl import GRPOTrainer

CAP = 3.0


def correct_for_sampler(trainer: GRPOTrainer) -> None:
    """Have the trainer use the log-probabilities that the rollouts come with; call it before `train`.

    TRL does so only for its own vLLM engines, so it is told that it has one, whose weights need no synchronising. It
    costs a forward pass over each batch of rollouts. Logged beside it: `sampling/sampling_logp_difference`.
    """
    trainer.use_vllm = True
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    trainer._last_loaded_step = -1
    trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, CAP
