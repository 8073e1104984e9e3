"""Breast cancer, malignant or benign, from 30 measures of a fine needle aspirate.

A linear softmax model, which is logistic regression, after a fixed scaling of each measure.

Data: the Wisconsin Diagnostic Breast Cancer set as scikit-learn ships it (Wolberg, Street and
Mangasarian 1995, CC BY 4.0); a site's file is a CSV with scikit-learn's feature names,
underscores for spaces, and a column `malignant` (1 is malignant) or `target` (0 is malignant,
scikit-learn's own coding).
"""

from __future__ import annotations

from collections.abc import Mapping

# Least and largest value of each feature: the "Summary Statistics" that scikit-learn prints in
# the dataset's DESCR. These are public constants; no mean, deviation or range of a site's rows
# is ever used, for that would be private.
RANGES: Mapping[str, tuple[float, float]] = {
    "mean_radius": (6.981, 28.11),
    "mean_texture": (9.71, 39.28),
    "mean_perimeter": (43.79, 188.5),
    "mean_area": (143.5, 2501.0),
    "mean_smoothness": (0.053, 0.163),
    "mean_compactness": (0.019, 0.345),
    "mean_concavity": (0.0, 0.427),
    "mean_concave_points": (0.0, 0.201),
    "mean_symmetry": (0.106, 0.304),
    "mean_fractal_dimension": (0.05, 0.097),
    "radius_error": (0.112, 2.873),
    "texture_error": (0.36, 4.885),
    "perimeter_error": (0.757, 21.98),
    "area_error": (6.802, 542.2),
    "smoothness_error": (0.002, 0.031),
    "compactness_error": (0.002, 0.135),
    "concavity_error": (0.0, 0.396),
    "concave_points_error": (0.0, 0.053),
    "symmetry_error": (0.008, 0.079),
    "fractal_dimension_error": (0.001, 0.03),
    "worst_radius": (7.93, 36.04),
    "worst_texture": (12.02, 49.54),
    "worst_perimeter": (50.41, 251.2),
    "worst_area": (185.2, 4254.0),
    "worst_smoothness": (0.071, 0.223),
    "worst_compactness": (0.027, 1.058),
    "worst_concavity": (0.0, 1.252),
    "worst_concave_points": (0.0, 0.291),
    "worst_symmetry": (0.156, 0.664),
    "worst_fractal_dimension": (0.055, 0.208),
}
FEATURES = tuple(RANGES)
