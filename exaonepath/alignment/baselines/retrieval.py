"""Baselines of cross-modal retrieval: canonical correlation analysis, ridge regression, and partial least squares.

Each is fitted on the training patients with both modalities, and its hyperparameters are chosen by the validation
patients. A regression predicts the other modality, and the patient is found among the measured profiles by cosine
similarity, in the principal axes of the training patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from exaonepath.alignment.baselines.cca import Principal, fit_cca, reciprocal_rank
from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.metrics.intervals import one_thread
from exaonepath.alignment.metrics.retrieval import PairEmbeddings

# Penalties in multiples of the mean variance of a direction and the number of patients; components of PLS.
RIDGE_PENALTIES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
PLS_COMPONENTS = (5, 10, 20, 40, 80)
METHODS = ("CCA", "ridge", "PLS")
_FEWEST_TO_CHOOSE = 10

# Training profiles (of both modalities, one row a patient) and validation profiles to a function of test profiles.
Rows = tuple[np.ndarray, np.ndarray]


@one_thread()
def baseline_pairs(
    train: Mapping[str, Profiles],
    validation: Mapping[str, Profiles],
    test: Mapping[str, Profiles],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, dict[str, PairEmbeddings]]:
    """Queries and galleries of every baseline.

    Args:
        train, validation, test: modality to the profiles of these patients, standardised.
        pairs: pairs of modalities.

    Returns:
        Method to "a->b" to the embeddings of the queries (a) and of the gallery (b); a direction is left out if fewer
        than two training patients have both modalities.
    """
    out: dict[str, dict[str, PairEmbeddings]] = {name: {} for name in METHODS}
    for a, b in pairs:
        known, held_out = Profiles.common(train[a], train[b]), Profiles.common(validation[a], validation[b])
        if len(known[0]) < 2 or not len(test[a].patients) or not len(test[b].patients):
            continue
        x, y = test[a].values, test[b].values
        ids = test[a].patients, test[b].patients
        u, v = fit_cca(known, held_out)(x, y)
        out["CCA"][f"{a}->{b}"] = PairEmbeddings(a, b, u, v, *ids)
        out["CCA"][f"{b}->{a}"] = PairEmbeddings(b, a, v, u, *ids[::-1])
        for method, fit in (("ridge", fit_ridge), ("PLS", fit_pls)):
            predict, place = fit(known, held_out)
            out[method][f"{a}->{b}"] = PairEmbeddings(a, b, predict(x), place(y), *ids)
            predict, place = fit(known[::-1], held_out[::-1])
            out[method][f"{b}->{a}"] = PairEmbeddings(b, a, predict(y), place(x), *ids[::-1])
    return out


Coordinates = Callable[[np.ndarray], np.ndarray]


def fit_ridge(train: Rows, validation: Rows) -> tuple[Coordinates, Coordinates]:
    """Ridge regression of the second modality on the first: (prediction, the measured profile), both as coordinates."""
    from sklearn.linear_model import Ridge

    def fit(x: np.ndarray, y: np.ndarray, penalty: float) -> Coordinates:
        predict: Coordinates = Ridge(alpha=penalty * float(np.square(x).sum()) / x.shape[1]).fit(x, y).predict
        return predict

    return _regression(train, validation, RIDGE_PENALTIES, fit)


def fit_pls(train: Rows, validation: Rows) -> tuple[Coordinates, Coordinates]:
    """Partial least squares regression of the second modality on the first; results as of `fit_ridge`."""
    from sklearn.cross_decomposition import PLSRegression

    def fit(x: np.ndarray, y: np.ndarray, components: float) -> Coordinates:
        most = min(len(x) - 1, x.shape[1], y.shape[1])
        model = PLSRegression(max(1, min(int(components), most)), scale=False, max_iter=2000, tol=1e-4).fit(x, y)

        def predict(rows: np.ndarray) -> np.ndarray:
            return np.asarray(model.predict(rows)).reshape(len(rows), -1)

        return predict

    return _regression(train, validation, PLS_COMPONENTS, fit)


def _regression(
    train: Rows,
    validation: Rows,
    choices: Sequence[float],
    fit: Callable[[np.ndarray, np.ndarray, float], Coordinates],
) -> tuple[Coordinates, Coordinates]:
    left, right = Principal.of(train[0]), Principal.of(train[1])
    x, y = left.scores(train[0]), right.scores(train[1])
    chosen = fit(x, y, choices[len(choices) // 2])
    if len(validation[0]) >= _FEWEST_TO_CHOOSE:
        held_out = left.scores(validation[0]), right.scores(validation[1])
        fitted = [fit(x, y, choice) for choice in choices]
        chosen = max(fitted, key=lambda predict: reciprocal_rank(predict(held_out[0]), held_out[1]))
    return lambda rows: chosen(left.scores(rows)), right.scores
