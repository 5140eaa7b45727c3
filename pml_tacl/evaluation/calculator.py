"""Retrieval metrics for PML's testers, exact and flat in memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import FaissKMeans
from torch import Tensor

from pml_tacl.clustering.unit_embeddings import Embeddings
from pml_tacl.evaluation.mutual_information import adjusted_mutual_information
from pml_tacl.evaluation.ranking import (
    check_fit,
    check_included,
    faiss_search,
    finite_rows,
    per_query_metrics,
    torch_search,
    whole_labels,
)
from pml_tacl.utils.checks import check_count

RANKING_METRICS = (
    "precision_at_1",
    "r_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "mean_average_precision",
)


class RetrievalCalculator(AccuracyCalculator):
    """PML's AccuracyCalculator with Recall@K, right at every size.

    Metrics: recall_at_k for each of `ks`, precision_at_1, r_precision,
    mean_average_precision_at_r, mean_reciprocal_rank, NMI and AMI, all in [0, 1] (AMI may fall
    a little below 0), and mean_average_precision of the whole ranking when asked for by name.
    Each is as PML defines it; recall_at_k is the share of queries with a right answer among
    the k nearest. How it differs from its parent:

    - each query is ranked as far as each metric needs, whatever `k` says, so no metric is
      silently cut short;
    - memory stays flat: queries go through in chunks;
    - labels are compared as int64, so large ids do not collide;
    - the query itself is left out also when copies of it are in the gallery;
    - distances that come out equal in float32 are ordered by index (of copies of one row a BLAS
      may round some differently).

    Nearest is by L2 distance of the embeddings as given; PML's testers normalise them before.
    Queries without a right answer in the gallery are left out of the means, as in PML; their
    number is in `num_lone_queries` after each call, and with nothing else the result is NaN.

    Args:
        include: names of metrics to compute; empty for all.
        exclude: names of metrics to leave out.
        avg_of_avgs: average over classes of the averages within each.
        return_per_class: give a list with one value for each class, ascending in label, of the
            classes that have queries with a right answer.
        k: how far mean_reciprocal_rank and mean_average_precision look, an integer or
            "max_bin_count"; None is to the end of the ranking.
        label_comparison_fn: not supported.
        device: where to search; None is CUDA if there, else CPU.
        knn_func: PML's kind of k-NN function in place of `engine`.
        kmeans_func: PML's kind of k-means function for NMI and AMI.
        ks: the k of recall_at_k.
        engine: "faiss", "torch" or "auto": faiss on CPU, torch elsewhere.

    Raises:
        ValueError: for unknown metrics, wrong `ks`, `k` or `engine`, or a `label_comparison_fn`.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[0.0], [1.0], [5.0], [6.1]])
        >>> calculator = RetrievalCalculator(include=("recall_at_1", "recall_at_2"), ks=(1, 2))
        >>> calculator.get_accuracy(embeddings, torch.tensor([0, 0, 1, 1]))
        {'recall_at_1': 1.0, 'recall_at_2': 1.0}
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        avg_of_avgs: bool = False,
        return_per_class: bool = False,
        k: int | Literal["max_bin_count"] | None = None,
        label_comparison_fn: Callable[..., Tensor] | None = None,
        device: torch.device | str | None = None,
        knn_func: Callable[..., tuple[Tensor, Tensor]] | None = None,
        kmeans_func: Callable[[Tensor, int], Tensor] | None = None,
        *,
        ks: Sequence[int] = (1, 2, 4, 8),
        engine: Literal["auto", "faiss", "torch"] = "auto",
    ) -> None:
        if label_comparison_fn is not None:
            raise ValueError(
                "label_comparison_fn is not supported: use PML's AccuracyCalculator for it"
            )
        if engine not in ("auto", "faiss", "torch"):
            raise ValueError(f'engine must be "auto", "faiss" or "torch", got {engine!r}')
        if isinstance(ks, str) or not isinstance(ks, Sequence) or not len(ks):
            raise ValueError(f"ks must be a sequence of integers, for instance (1, 8), got {ks!r}")
        for at in ks:
            check_count("each of ks", at, 1)
        self.ks = tuple(sorted({int(at) for at in ks}))
        self.engine = engine
        self.num_lone_queries = 0
        self._ranking_metrics = (*RANKING_METRICS, *(f"recall_at_{at}" for at in self.ks))
        # PML finds metrics by the names of methods; a subclass may have its own of a name.
        for name in self._ranking_metrics:
            method = f"calculate_{name}"
            if getattr(type(self), method, None) is getattr(AccuracyCalculator, method, None):
                setattr(self, method, partial(self._average, name))
        if len(include) == 0 and k is None and isinstance(exclude, list | tuple):
            # Needs every query's whole ranking, so only for those who ask.
            exclude = (*exclude, "mean_average_precision")
        device = torch.device(device) if device is not None else c_f.use_cuda_if_available()
        if kmeans_func is None:
            # PML's default, less faiss's warnings about small clusters.
            gpu = device.type == "cuda"
            kmeans_func = FaissKMeans(niter=20, gpu=gpu, min_points_per_centroid=1)
        super().__init__(
            include, exclude, avg_of_avgs, return_per_class, k, None, device, None, kmeans_func
        )
        self.knn_func = knn_func

    def requires_knn(self) -> list[str]:
        """Names of the metrics that need a ranking."""
        return list(self._ranking_metrics)

    def get_accuracy(
        self,
        query: Embeddings,
        query_labels: Any,
        reference: Embeddings | None = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Compute the metrics.

        Args:
            query: (Q, D) embeddings, tensor or array.
            query_labels: (Q,) integers, or (Q, L): equal when the whole row is.
            reference: (R, D), the gallery; None for the queries themselves.
            reference_labels: (R,) integers, or (R, L).
            ref_includes_query: the first Q rows of the reference are the queries.
            include: as for the class, among the metrics of this calculator.
            exclude: as for the class.

        Returns:
            Value by name of metric. A metric that a subclass adds gets `per_query` (metric by
            name, (Q,) float64, NaN for lone queries), `query`, `reference`, their labels, and
            `relevant` (Q,), the number of right answers.

        Raises:
            ValueError: for shapes that do not fit, no rows, rows that are NaN or infinite, labels
                that are not whole numbers, or a reference that does not start with the queries.
        """
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        same = reference is query and reference_labels is query_labels
        query = finite_rows("query", query, self.device)
        reference = query if same else finite_rows("reference", reference, self.device)
        query_labels = whole_labels("query", query_labels, len(query)).to(self.device)
        reference_labels = whole_labels("reference", reference_labels, len(reference)).to(
            self.device
        )
        check_fit(query, query_labels, reference, reference_labels)
        if ref_includes_query and not same:
            check_included(query, query_labels, reference, reference_labels)
        self.curr_function_dict = self.get_function_dict(include, exclude)
        classes = torch.cat([query_labels, reference_labels])
        dim = None if classes.ndim == 1 else 0
        classes = torch.unique(classes, return_inverse=True, dim=dim)[1]
        query_classes, reference_classes = classes[: len(query)], classes[len(query) :]
        right = torch.bincount(reference_classes, minlength=int(classes.max()) + 1)
        relevant = right[query_classes] - int(ref_includes_query)
        self.num_lone_queries = int((relevant == 0).sum())
        kwargs = {
            "query": query,
            "reference": reference,
            "query_labels": query_labels,
            "reference_labels": reference_labels,
            "query_classes": query_classes,
            "relevant": relevant,
            "ref_includes_query": ref_includes_query,
        }
        names = [name for name in self.get_curr_metrics() if name in self._ranking_metrics]
        if names:
            if self.num_lone_queries == len(query):
                c_f.LOGGER.warning("None of the query labels are in the reference set.")
            kwargs["per_query"] = per_query_metrics(
                names,
                query,
                query_classes,
                reference,
                reference_classes,
                relevant,
                ref_includes_query=ref_includes_query,
                depth=max(1, int(relevant.max())) if self.k == "max_bin_count" else self.k,
                search=self._search,
            )
        if any(name in self.requires_clustering() for name in self.get_curr_metrics()):
            kwargs["query_labels"] = query_classes
            kwargs["cluster_labels"] = self.get_cluster_labels(**kwargs)
        accuracies: dict[str, Any] = self._get_accuracy(self.curr_function_dict, **kwargs)
        return accuracies

    def calculate_AMI(self, query_labels: Tensor, cluster_labels: Tensor, **kwargs: Any) -> float:
        """Adjusted mutual information of classes and clusters, as scikit-learn's."""
        return adjusted_mutual_information(query_labels, torch.as_tensor(cluster_labels))

    def _search(self, queries: Tensor, k: int, reference: Tensor) -> Tensor:
        if self.knn_func is not None:
            return self.knn_func(queries, k, reference, False)[1]
        on_cpu = self.device.type == "cpu"
        use_faiss = self.engine == "faiss" or (self.engine == "auto" and on_cpu)
        return (faiss_search if use_faiss else torch_search)(queries, k, reference)

    def _average(
        self,
        name: str,
        per_query: dict[str, Tensor],
        query_classes: Tensor,
        relevant: Tensor,
        **kwargs: Any,
    ) -> float | list[float]:
        answered = relevant > 0
        values, classes = per_query[name][answered], query_classes[answered]
        if not len(values):
            nothing = [float("nan")] * len(query_classes.unique())
            return nothing if self.return_per_class else float("nan")
        if not (self.avg_of_avgs or self.return_per_class):
            return float(values.mean())
        classes = torch.unique(classes, return_inverse=True)[1]
        averages = torch.bincount(classes, weights=values) / torch.bincount(classes)
        return averages.tolist() if self.return_per_class else float(averages.mean())
