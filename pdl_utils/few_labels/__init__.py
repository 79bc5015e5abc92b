"""Learning from few labels: transfer, SimCLR, LoRA."""

from pdl_utils.few_labels.digits import five_digits, mlp, share_right, train_adam
from pdl_utils.few_labels.lora import (
    LoRA,
    LowRank,
    add_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    unmerge_lora,
    use_lora,
    without_lora,
)
from pdl_utils.few_labels.measure import Outcome, measure, probe_outcome, probe_scores, recipe_scores
from pdl_utils.few_labels.simclr import VIEW, SimCLR, cifar_encoder, nt_xent_loss, pretrain, pretrained_encoder
from pdl_utils.few_labels.transfer import (
    Recipe,
    fine_tune,
    fold_norms,
    knn_accuracy,
    knn_monitor,
    knn_votes,
    linear_probe,
    train_on,
    without_head,
)

__all__ = [
    "VIEW", "LoRA", "LowRank", "Outcome", "Recipe", "SimCLR", "add_lora", "cifar_encoder", "fine_tune",
    "five_digits", "fold_norms", "knn_accuracy", "knn_monitor", "knn_votes", "linear_probe",
    "load_lora_state_dict", "lora_state_dict", "measure", "merge_lora", "mlp", "nt_xent_loss", "pretrain",
    "pretrained_encoder", "probe_outcome", "probe_scores", "recipe_scores", "share_right", "train_adam",
    "train_on", "unmerge_lora", "use_lora", "without_head", "without_lora",
]  # fmt: skip
