"""Classifiers of sentence-transformers and SetFit as modules whose inputs are tensors and whose outputs are logits."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


class PairClassifier(nn.Module):
    """
    The softmax classifier over two sentences that `SoftmaxLoss` of sentence-transformers trains.

    Args:
        loss (`SoftmaxLoss`): with its model; both are trained and neither is copied.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, labels: Any = None, **inputs: Any) -> SequenceClassifierOutput:
        """
        Args:
            labels (`Any`, *optional*): left alone.
            **inputs: as `SentenceTransformerDataCollator` names them, `FIRST_input_ids`, `SECOND_input_ids` and so on.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: with logits of shape `[B, num_labels]`.

        Raises:
            ValueError: if the inputs are not those of two sentences.
        """
        columns = [name.removesuffix("_input_ids") for name in inputs if name.endswith("_input_ids")]
        if len(columns) != 2:
            raise ValueError(
                f"SoftmaxLoss classifies two sentences and the batch has {len(columns)}: collate with "
                "SentenceTransformerDataCollator(model.preprocess), from two columns of text."
            )
        sentences = [
            {name.removeprefix(f"{column}_"): value for name, value in inputs.items() if name.startswith(f"{column}_")}
            for column in columns
        ]
        return SequenceClassifierOutput(logits=self.loss(sentences, None)[1])


class HeadedBody(nn.Module):
    """
    The body and the differentiable head of a SetFit model.

    Args:
        body (`nn.Module`): the sentence transformer.
        head (`nn.Module`): `SetFitHead`.
        normalize (`bool`): whether embeddings have length 1 before the head.
    """

    def __init__(self, body: nn.Module, head: nn.Module, normalize: bool = False):
        super().__init__()
        self.body, self.head, self.normalize = body, head, normalize

    def forward(self, labels: Any = None, **inputs: Any) -> SequenceClassifierOutput:
        """
        Args:
            labels (`Any`, *optional*): left alone.
            **inputs: of the body, as `body.preprocess(texts)` makes them.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: with logits of shape `[B, classes]`.
        """
        embeddings = self.body(inputs)["sentence_embedding"]
        if self.normalize:
            embeddings = nn.functional.normalize(embeddings, p=2, dim=1)
        return SequenceClassifierOutput(logits=self.head(embeddings)[0])


def as_classifier(model: Any) -> nn.Module:
    """
    A classifier of sentence-transformers or SetFit as a module that [`SelfKDTrainer`] and [`LoopDistiller`] train. The
    weights are shared: what was given has learned when training is over, and is saved as ever.

    Args:
        model (`CrossEncoder`, `SoftmaxLoss` or `SetFitModel`):
            a cross-encoder with several labels, a loss with its sentence transformer, or a SetFit model made with
            `use_differentiable_head=True`.

    Returns:
        `nn.Module`: of a cross-encoder, its model of transformers.

    Raises:
        ValueError: if it has no classes to learn, or is none of these.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "CrossEncoder" in names:
        if model.num_labels < 2:
            raise ValueError(
                f"CrossEncoder with num_labels={model.num_labels} gives a score, which is no distribution to learn "
                "from: make it with num_labels of at least 2."
            )
        if model.model is None:
            raise ValueError("this CrossEncoder is not made of a classifier of transformers: give such a one.")
        return model.model
    if "SoftmaxLoss" in names:
        return PairClassifier(model)
    if "SetFitModel" in names:
        if not model.has_differentiable_head:
            raise ValueError(
                "the head of this SetFitModel has no gradients: make it with use_differentiable_head=True."
            )
        if model.multi_target_strategy is not None:
            raise ValueError(
                f"multi_target_strategy={model.multi_target_strategy!r} has several labels a text, which is not "
                "supported here: use a model of transformers with problem_type='multi_label_classification'."
            )
        return HeadedBody(model.model_body, model.model_head, model.normalize_embeddings)
    raise ValueError(
        f"{type(model).__name__} is no CrossEncoder, SoftmaxLoss or SetFitModel: give one of these, or train a module "
        "of your own whose outputs are logits."
    )
