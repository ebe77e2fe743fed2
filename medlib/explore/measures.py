"""Numbers for what the eye sees in an embedding, computed in the full feature space. Deterministic."""

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_ROWS = 256  # of the matrix of all pairs that are held at a time


def _check(features: np.ndarray, positions: np.ndarray, patients: np.ndarray | None = None) -> None:
    if features.ndim != 2 or positions.shape != (len(features),):
        raise ValueError(f"features must be (N,D) and positions (N,), got {features.shape} and {positions.shape}")
    if patients is not None and patients.shape != (len(features),):
        raise ValueError(f"patients must be (N,), got {patients.shape} for {len(features)} features")
    if not (np.isfinite(features).all() and np.isfinite(positions).all()):
        raise ValueError("features and positions must be finite")


def unit(features: np.ndarray) -> np.ndarray:
    """``features`` (N,D) with rows of length 1; a zero row stays zero."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def rank_correlation(features: np.ndarray, positions: np.ndarray) -> float:
    """Spearman correlation, over all pairs, of feature distance (1 - cos) with distance in position.

    features: (N,D), N >= 3 · positions: (N,) · returns a value in [-1, 1]: 1 where slices that lie further apart in the
    body also lie further apart in feature space, about 0 where position tells nothing; nan where all distances agree.
    """
    features, positions = np.asarray(features, np.float64), np.asarray(positions, np.float64)
    _check(features, positions)
    first, second = np.triu_indices(len(features), k=1)
    rows = unit(features)
    # Rounded, so that distances equal in exact arithmetic tie, whatever order a machine sums in.
    distance = np.round(1 - (rows @ rows.T)[first, second], 9)
    gap = np.round(np.abs(positions[first] - positions[second]), 9)
    if np.ptp(distance) == 0 or np.ptp(gap) == 0:
        return float("nan")
    return float(spearmanr(distance, gap).statistic)


def direction_alignment(
    features: np.ndarray, positions: np.ndarray, patients: np.ndarray, direction: np.ndarray | None = None
) -> float:
    """Mean cosine between a step up in position and one common direction (what CORAL's ordinal loss asks for).

    features: (N,D) raw · positions: (N,) · patients: (N,) · direction: (D,), default the mean of all unit steps. A step
    is feature_j - feature_i for every pair with position_j > position_i that comes from two *different* patients, so
    that a direction of one patient's own does not count; coincident features are left out.
    Returns a value in [-1, 1]: 1 where all steps are parallel to the direction; nan where there is no step.
    """
    features, positions, patients = np.asarray(features, np.float64), np.asarray(positions), np.asarray(patients)
    _check(features, positions, patients)
    # The sum of (f_j - f_i) / |f_j - f_i| is the sum of w_ij f_j - w_ij f_i with w = 1 / |f_j - f_i|: no (N,N,D).
    features = features - features.mean(axis=0)  # no step changes, and the two sums cancel less
    _, owner = np.unique(patients, return_inverse=True)
    balance, count = np.zeros(len(features)), 0
    for rows in np.array_split(np.arange(len(features)), -(-len(features) // _ROWS)):
        later = (positions > positions[rows, None] + 1e-6) & (owner != owner[rows, None])
        length = cdist(features[rows], features)
        moved = later & (length > 1e-12)
        weights = np.where(moved, 1 / np.where(moved, length, 1), 0)
        balance += weights.sum(axis=0)
        balance[rows] -= weights.sum(axis=1)
        count += int(moved.sum())
    if count == 0:
        return float("nan")
    mean = balance @ features / count
    towards = mean if direction is None else np.asarray(direction, np.float64)
    return float(mean @ towards / max(float(np.linalg.norm(towards)), 1e-12))


def position_probe_error(
    features: np.ndarray, positions: np.ndarray, patients: np.ndarray, folds: int = 5, penalty: float = 1.0
) -> tuple[float, float]:
    """How far off a linear probe reads the position of slices of patients it has not seen.

    Ridge regression (``penalty``) on standardised features, cross-validated by patient: at most ``folds`` groups of
    whole patients are left out in turn. features: (N,D) · positions: (N,) · patients: (N,), two patients or more.
    Returns (error, baseline), mean absolute errors in units of position: of the probe, and of always answering the mean
    position of the other patients. A probe that learns nothing has error >= baseline.
    """
    features, positions, patients = np.asarray(features, np.float64), np.asarray(positions), np.asarray(patients)
    _check(features, positions, patients)
    names = np.unique(patients)
    if len(names) < 2:
        raise ValueError(f"the probe is tested on patients left out: two or more are needed, got {list(names)}")
    probe_error, mean_error = np.zeros(len(features)), np.zeros(len(features))
    for fold in range(min(folds, len(names))):
        held = np.isin(patients, names[fold :: min(folds, len(names))])
        model = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(features[~held], positions[~held])
        probe_error[held] = np.abs(model.predict(features[held]) - positions[held])
        mean_error[held] = np.abs(positions[~held].mean() - positions[held])
    return float(probe_error.mean()), float(mean_error.mean())
