"""Learning from few labels: transfer, SimCLR, LoRA."""

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
from pdl_utils.few_labels.simclr import (
    VIEW,
    SimCLR,
    cifar_encoder,
    knn_accuracy,
    knn_monitor,
    nt_xent_loss,
    pretrain,
    pretrained_encoder,
)
from pdl_utils.few_labels.transfer import (
    Outcome,
    Recipe,
    fine_tune,
    five_digits,
    linear_probe,
    measure,
    mlp,
    probe_outcome,
    probe_scores,
    recipe_scores,
    self_train,
    share_right,
    train_adam,
    train_on,
    without_head,
)
