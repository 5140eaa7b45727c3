"""Exact retrieval metrics for PML's testers, in bounded memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import FaissKMeans
from torch import Tensor

from pml_tacl.clustering.unit_embeddings import Embeddings
from pml_tacl.evaluation.inputs import check_fit, finite_rows, starts_with, whole_labels
from pml_tacl.evaluation.mutual_information import adjusted_mutual_information
from pml_tacl.evaluation.nearest import Frame, Nearest, faiss_engine, torch_engine
from pml_tacl.evaluation.ranking import Search, per_query_metrics
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError

RANKING_METRICS = (
    "precision_at_1",
    "r_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "mean_average_precision",
)


class RetrievalCalculator(AccuracyCalculator):
    """PML's AccuracyCalculator with Recall@K and exact results for data sets of any size.

    Metrics: recall_at_k for each of `ks`, precision_at_1, r_precision,
    mean_average_precision_at_r, mean_reciprocal_rank, NMI and AMI, all in [0, 1] (AMI may fall
    a little below 0). mean_average_precision needs the whole ranking, and is computed only if
    `include` names it or `k` limits the ranking. The metrics are defined as in PML. recall_at_k is
    the fraction of queries with a correct result among their k nearest results. The results come
    from the gallery, which PML calls the reference. The differences from PML's class are:

    - each metric gets as many results per query as it needs, so no value is too low because the
      ranking was cut off;
    - queries are processed in chunks, which limits the memory;
    - labels are compared as int64, so two large labels never count as equal by rounding;
    - the query itself is not among its results, even if the gallery contains copies of it;
    - results are ranked by exact distances, for any offset and scale of the embeddings and any
      `torch.set_float32_matmul_precision`. Results at equal distances are ordered by index.

    Distances are L2 distances of the embeddings as given; this class does not normalise them, but
    PML's testers do so before they call it. Queries without a correct result in the gallery are
    left out of the means, as in PML. `num_lone_queries` is their number in the last call. If all
    queries are left out, the result is NaN.

    Args:
        include: names of metrics to compute, or one name; empty for all.
        exclude: names of metrics to leave out, or one name.
        avg_of_avgs: average within each class first, and then average these values.
        return_per_class: return a list with one value for each class that has a query with a
            correct result in the gallery, in ascending order of labels.
        k: number of results per query that mean_reciprocal_rank and mean_average_precision use:
            an integer; "max_bin_count", the largest number of correct results of any query; or
            None for all results.
        label_comparison_fn: not supported.
        device: device of the search; None is CUDA if available, else CPU.
        knn_func: k-NN function with the signature of PML's, used instead of `engine`; it gets the
            embeddings as given.
        kmeans_func: k-means function with the signature of PML's, for NMI and AMI.
        ks: the values of k for recall_at_k.
        engine: library for the search: "faiss", "torch", or "auto" for faiss on a CPU and torch
            on other devices.

    Raises:
        ValueError: if a metric is unknown, if `ks`, `k` or `engine` is invalid, or if
            `label_comparison_fn` is given.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[0.0], [1.0], [5.0], [6.1]])
        >>> calculator = RetrievalCalculator(include=("recall_at_1", "recall_at_2"), ks=(1, 2))
        >>> calculator.get_accuracy(embeddings, torch.tensor([0, 0, 1, 1]))
        {'recall_at_1': 1.0, 'recall_at_2': 1.0}
    """

    def __init__(
        self,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
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
            raise InputError(
                "label_comparison_fn is not supported: use PML's AccuracyCalculator for it"
            )
        if engine not in ("auto", "faiss", "torch"):
            raise InputError(f'engine must be "auto", "faiss" or "torch", got {engine!r}')
        if isinstance(ks, str) or not isinstance(ks, Sequence) or not len(ks):
            raise InputError(f"ks must be a sequence of integers, for instance (1, 8), got {ks!r}")
        for at in ks:
            check_count("each of ks", at, 1)
        include, exclude = as_names(include), as_names(exclude)
        self.ks = tuple(sorted({int(at) for at in ks}))
        self.engine = engine
        self.num_lone_queries = 0
        self._ranking_metrics = (*RANKING_METRICS, *(f"recall_at_{at}" for at in self.ks))
        # PML finds metrics by method names; a subclass may define its own.
        for name in self._ranking_metrics:
            method = f"calculate_{name}"
            if getattr(type(self), method, None) is getattr(AccuracyCalculator, method, None):
                setattr(self, method, partial(self._average, name))
        if not include and k is None:
            # Needs the whole ranking of every query, so compute it only on request.
            exclude = (*exclude, "mean_average_precision")
        device = torch.device(device) if device is not None else c_f.use_cuda_if_available()
        self._own_kmeans = kmeans_func is None
        if kmeans_func is None:
            # PML's default, without faiss's warnings about small clusters.
            gpu = device.type == "cuda"
            kmeans_func = FaissKMeans(niter=20, gpu=gpu, min_points_per_centroid=1)
        super().__init__(
            include, exclude, avg_of_avgs, return_per_class, k, None, device, None, kmeans_func
        )
        self.knn_func = knn_func

    def requires_knn(self) -> list[str]:
        """Return the names of the metrics that need a ranking."""
        return list(self._ranking_metrics)

    def get_accuracy(
        self,
        query: Embeddings,
        query_labels: Any,
        reference: Embeddings | None = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
    ) -> dict[str, Any]:
        """Compute the metrics.

        Args:
            query: (Q, D) embeddings, tensor or array.
            query_labels: (Q,) whole numbers of any type. Or (Q, L): two labels then match if all
                L numbers are equal.
            reference: (R, D), the gallery; None for the queries themselves.
            reference_labels: (R,) whole numbers, or (R, L).
            ref_includes_query: True if the first Q embeddings of the reference are the queries.
                Each query is then left out of its own results. If False, a warning is logged if
                more than a tenth of the queries find themselves.
            include: as for the class, but only metrics of this calculator.
            exclude: as for the class.

        Returns:
            Dict from metric name to value. If a subclass adds a metric, its method is called with
            `per_query`, `query`, `reference`, their labels, and `relevant`. `per_query` is a dict
            from metric name to the values of the queries, (Q,) float64, NaN for queries without
            a correct result. `relevant` (Q,) is the number of correct results of each query.

        Raises:
            ValueError: if shapes do not match, embeddings are empty, NaN or infinite, labels are
                not whole numbers, or the reference does not start with the queries.
        """
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        same = reference is query and reference_labels is query_labels
        # Ranking needs float64, which Apple GPUs do not support.
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        query = finite_rows("query", query, device)
        reference = query if same else finite_rows("reference", reference, device)
        if query.dtype != reference.dtype:
            query, reference = query.double(), reference.double()
        query_labels = whole_labels("query_labels", query_labels, len(query)).to(device)
        reference_labels = whole_labels("reference_labels", reference_labels, len(reference))
        reference_labels = reference_labels.to(device)
        given = query, query_labels, reference, reference_labels
        check_fit(*given)
        if ref_includes_query and not same and not starts_with(*given):
            raise InputError(
                "ref_includes_query=True, but the first rows of reference and reference_labels are "
                "not query and query_labels: put the queries first or pass ref_includes_query=False"
            )
        self.curr_function_dict = self.get_function_dict(as_names(include), as_names(exclude))
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
            search = self._search(query, reference)
            if isinstance(search, Nearest) and not ref_includes_query:
                _warn_of_queries_in_reference(search, query_labels, reference_labels)
            kwargs["per_query"] = per_query_metrics(
                names,
                query_classes,
                reference_classes,
                relevant,
                ref_includes_query=ref_includes_query,
                depth=max(1, int(relevant.max())) if self.k == "max_bin_count" else self.k,
                search=search,
            )
        if any(name in self.requires_clustering() for name in self.get_curr_metrics()):
            kwargs["query_labels"] = query_classes
            # k-means needs full float32 products, as the search does.
            rows = Frame(query, query).single(query) if self._own_kmeans else query
            kwargs["cluster_labels"] = self.get_cluster_labels(**{**kwargs, "query": rows})
        accuracies: dict[str, Any] = self._get_accuracy(self.curr_function_dict, **kwargs)
        return accuracies

    def calculate_AMI(self, query_labels: Tensor, cluster_labels: Tensor, **kwargs: Any) -> float:
        """Return the adjusted mutual information of classes and clusters, as in scikit-learn."""
        return adjusted_mutual_information(query_labels, torch.as_tensor(cluster_labels))

    def _search(self, query: Tensor, reference: Tensor) -> Search:
        knn_func = self.knn_func
        if knn_func is not None:
            return lambda rows, k: knn_func(query[rows], k, reference, False)[1]
        on_cpu = query.device.type == "cpu"
        use_faiss = self.engine == "faiss" or (self.engine == "auto" and on_cpu)
        return Nearest(query, reference, faiss_engine if use_faiss else torch_engine)

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


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; a single string is one name."""
    return (names,) if isinstance(names, str) else tuple(names)


def _warn_of_queries_in_reference(
    nearest: Nearest, query_labels: Tensor, reference_labels: Tensor
) -> None:
    """Warn if more than a tenth of a sample of queries find themselves in the reference."""
    step = max(1, len(query_labels) // 256)
    rows = torch.arange(0, len(query_labels), step, device=query_labels.device)
    found = nearest(rows, 1)[:, 0]
    squares = nearest.query_squares[rows]
    itself = (nearest.exact(rows, found) <= 1e-9 * squares) & (squares > 0)
    agree = query_labels[rows] == reference_labels[found]
    itself &= agree if agree.ndim == 1 else agree.all(dim=1)
    if 10 * int(itself.sum()) > len(rows):
        c_f.LOGGER.warning(
            "%d of %d sampled queries find themselves in the reference, which counts as correct: "
            "remove them, or put them first and pass ref_includes_query=True",
            int(itself.sum()),
            len(rows),
        )
