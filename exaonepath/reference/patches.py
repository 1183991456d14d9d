"""Patching, directly from its specification: the whole level at once, one patch at a time."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np


def grid_by_points(
    contours: list[np.ndarray], holes: list[list[np.ndarray]], patch: int, step: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The patch grid, one `pointPolygonTest` per point; arguments and result as `patches.grid.patch_grid`."""
    coords, owners = [], []
    for index, contour in enumerate(contours):
        x0, y0, w, h = cv2.boundingRect(contour)
        shift = int(patch // 2 * 0.5)
        for y in range(y0, y0 + h, step[1]):
            for x in range(x0, x0 + w, step[0]):
                cx, cy = x + patch // 2, y + patch // 2
                corners = [(cx + i * shift, cy + j * shift) for i in (-1, 1) for j in (-1, 1)]
                if not any(cv2.pointPolygonTest(contour, (float(a), float(b)), False) >= 0 for a, b in corners):
                    continue
                centre = (x + patch / 2, y + patch / 2)
                if any(cv2.pointPolygonTest(hole, centre, False) > 0 for hole in holes[index]):
                    continue
                coords.append((x, y))
                owners.append(index)
    return np.array(coords, np.int32).reshape(-1, 2), np.array(owners, np.int32)


def segment_at_once(
    image: np.ndarray, scale: tuple[float, float], settings: Any
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Contours and their holes at level 0, from the whole RGBA level, with complete intermediate images.

    Args:
        image: uint8 [h, w, 4]. scale: downsample of the level, (x, y). settings: a `SegmentationSettings`.
    """
    s = settings.seg_downsample
    if s > 1:
        image = cv2.resize(image, (int(image.shape[1] / s), int(image.shape[0] / s)), interpolation=cv2.INTER_AREA)
    h, w = image.shape[:2]
    rgb = image[..., :3].copy()
    for a, b in (((0, 0), (w, 20)), ((0, h - 20), (w, h)), ((0, 0), (20, h)), ((w - 20, 0), (w, h))):
        cv2.rectangle(rgb, a, b, (255, 255, 255), -1)
    grey = cv2.cvtColor(image, cv2.COLOR_RGBA2GRAY)
    rgb[cv2.convertScaleAbs(cv2.Laplacian(grey, cv2.CV_64F)) <= 15] = 255
    blurred = cv2.medianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1], settings.mthresh | 1)
    kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if settings.use_otsu else 0)
    _, mask = cv2.threshold(blurred, settings.sthresh, 255, kind)
    if settings.close > 0:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((settings.close, settings.close), np.uint8))
    outlines, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    sx, sy = scale[0] * s, scale[1] * s
    unit = max(1, int(512**2 / (sx * sy)))
    children: dict[int, list[np.ndarray]] = {}
    for i, outline in enumerate(outlines):
        children.setdefault(int(hierarchy[0][i][3]), []).append(outline)
    contours, holes = [], []
    for i, outline in enumerate(outlines):
        if hierarchy[0][i][3] != -1:
            continue
        inside = children.get(i, [])
        area = cv2.contourArea(outline) - sum(cv2.contourArea(hole) for hole in inside)
        if area <= 0 or area < settings.a_t * unit:
            continue
        inside = sorted(inside, key=cv2.contourArea, reverse=True)[: settings.max_n_holes]
        contours.append((outline[:, 0] * (sx, sy)).astype(np.int32))
        holes.append(
            [(k[:, 0] * (sx, sy)).astype(np.int32) for k in inside if cv2.contourArea(k) > settings.a_h * unit]
        )
    return contours, holes
