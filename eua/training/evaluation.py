"""The metrics of a model in training on held-out rows: the method's loss, its parts, and how well energies separate prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from eua.data.batches import ForgetRetainCollator
from eua.data.rows import EncodedRow
from eua.methods.answers import Answers
from eua.methods.objective import Figures, Objective, added, figure_means
from eua.model.forward import check_finite, eval_mode
from eua.model.head import vocabulary_and_device
from eua.statistics import auroc


@torch.no_grad()
def held_out_metrics(
    model: nn.Module,
    rows: Mapping[str, Sequence[EncodedRow]],
    reference: Mapping[str, Sequence[Tensor]],
    *,
    answers: Callable[[dict[str, Tensor]], Answers],
    objective: Objective,
    gamma: float,
    alpha: float,
    batch_size: int,
    progress: bool = True,
) -> dict[str, float]:
    """The loss of held-out rows, its parts, and how well the scores of prompts separate forget from retain rows.

    It draws no random number and restores the model's mode, so training goes on as if nothing had happened.

    Args:
        model: the model in training.
        rows: encoded rows, ``"forget"``, ``"retain"``, and where the method uses them ``"alternative"``, one per forget row.
        reference: of these rows, (A,) each, the figures of the model before unlearning.
        answers: what the loss reads of a batch.
        objective: the loss.
        gamma, alpha: its weights.
        batch_size: rows per forward; those with an alternative count once.
        progress: show progress bars.

    Returns:
        ``loss``, the names of :func:`eua.methods.objective.figure_means`, and ``auroc``: the prompts' scores, forget against
        retain.
    """
    _, device = vocabulary_and_device(model)
    collate = ForgetRetainCollator()
    figures: Figures | None = None
    scores: dict[str, Tensor] = {}
    for kind in ("forget", "retain"):
        of_kind = rows[kind]
        order = sorted(range(len(of_kind)), key=lambda i: -len(of_kind[i].input_ids))  # a lack of memory shows at once
        with_alternative = kind == "forget" and bool(rows.get("alternative"))
        of_prompts: list[Tensor] = []
        title = f"held-out {kind} rows"
        with eval_mode(model):
            for start in tqdm(range(0, len(order), batch_size), desc=title, disable=not progress, leave=False):
                indices = order[start : start + batch_size]
                kinds = (kind, "alternative") if with_alternative else (kind,)
                items = [[{"row": rows[k][i], "reference": reference[k][i], "kind": k} for k in kinds] for i in indices]
                batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
                of_batch = answers(batch)
                check_finite(of_batch.energy, f"the energies of {title}")
                figures = added(figures, objective.loss(of_batch, gamma, alpha).figures)
                # The prompt's last token predicts the answer's first one. Its energy is the prompt's score.
                first = torch.tensor([of_kind[i].prompt_length - 1 for i in indices], device=device)
                of_prompts.append(of_batch.energy[:: len(kinds)].gather(1, first[:, None])[:, 0].float().cpu())
        scores[kind] = torch.cat(of_prompts)
    means = figure_means(figures or {})
    prompts = means.get("loss_prompt_forget", 0.0) + means.get("loss_prompt_retain", 0.0)
    loss = gamma * (means.get("loss_forget", 0.0) + means.get("loss_retain", 0.0) + objective.prompt_energy * prompts)
    if objective.has_retain:
        loss += alpha * means[f"{objective.retain_loss}_retain"]
    return {"loss": loss, **means, "auroc": auroc(scores["forget"], scores["retain"])}
