"""What the loop must know about a task: its targets, what a prediction is, how far two networks are apart."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Classification:
    """One class per image; logits are [B, classes]."""

    classes: int

    def balanced_targets(self, counts: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """Target classes that level a buffer: the rarest class first, ties in random order.

        Args:
            counts: int64 [classes], how often each class is in the buffer now.
            number: how many targets.
            rng: on the device of `counts`.

        Returns:
            int64 [number]: after adding them one by one, each went to a class that was rarest at that moment.
        """
        levels = counts[:, None] + torch.arange(number, device=counts.device)  # [classes, number]
        ties = torch.rand(levels.shape, generator=rng, device=counts.device)
        targets = (levels + ties).flatten().topk(number, largest=False).indices // number
        return targets[torch.randperm(number, generator=rng, device=counts.device)]  # any part is as mixed as the whole

    def random_targets(self, number: int, rng: torch.Generator) -> Tensor:
        """Uniform target classes, int64 [number]."""
        return torch.randint(self.classes, (number,), generator=rng, device=rng.device)

    def target_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each sample, float32 [B]."""
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted class, int64 [B], and the confidence in it, float32 [B] in 0...1."""
        confidences, classes = logits.float().softmax(1).max(1)
        return classes, confidences

    def discrepancy(self, teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
        """KL(T || S) of each sample at `temperature`, times its square so that gradients keep their scale; [B].

        One function for the distillation loss, the adversarial term and the replay priorities (Hinton et al. 2015).
        """
        teacher_log = (teacher_logits.float() / temperature).log_softmax(1)
        student_log = (student_logits.float() / temperature).log_softmax(1)
        return (teacher_log.exp() * (teacher_log - student_log)).sum(1) * temperature**2

    def agreement(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Whether both networks predict the same class, bool [B]."""
        return teacher_logits.argmax(1) == student_logits.argmax(1)
