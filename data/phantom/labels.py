"""The label map of a phantom: one uint8 per voxel, organs first, findings over them.

A finding's voxels carry the finding's id instead of the organ's, so that the map alone tells what can be
seen: instances of one finding never touch, and its connected components are its count. Three findings have
no voxels of their own because they are a property of an organ: they are measured (see ``STATES``).
"""

BACKGROUND, BODY = 0, 1

ORGANS: dict[str, int] = {
    "left lung": 10,
    "right lung": 11,
    "heart": 12,
    "aorta": 13,
    "spine": 14,
    "ribs": 15,
    "liver": 16,
    "spleen": 17,
    "left kidney": 18,
    "right kidney": 19,
    "pancreas": 20,
    "stomach": 21,
}

FINDINGS: dict[str, int] = {
    "lung nodule": 40,
    "consolidation": 41,
    "pleural effusion": 42,
    "pericardial effusion": 43,
    "arterial calcification": 44,
    "liver lesion": 45,
    "kidney cyst": 46,
    "kidney tumour": 47,
    "pancreatic lesion": 48,
    "enlarged lymph node": 49,
}

STATES: tuple[str, ...] = ("cardiomegaly", "splenomegaly", "fatty liver")
"""Cardiomegaly: widest heart / widest inner thorax (both lungs and what lies between) > 0.5.
Splenomegaly: largest extent of the spleen along an axis > 130 mm or volume > 350 ml.
Fatty liver: painted liver HU at least 20 below painted spleen HU (case metadata holds the painted HU)."""

PHASES: tuple[str, ...] = ("non-contrast", "arterial", "portal venous", "delayed")

HOSTS: dict[str, tuple[str, ...]] = {
    "lung nodule": ("left lung", "right lung"),
    "consolidation": ("left lung", "right lung"),
    "pleural effusion": ("left lung", "right lung"),
    "pericardial effusion": ("heart",),
    "arterial calcification": ("aorta",),
    "liver lesion": ("liver",),
    "kidney cyst": ("left kidney", "right kidney"),
    "kidney tumour": ("left kidney", "right kidney"),
    "pancreatic lesion": ("pancreas",),
    "enlarged lymph node": (),
}
"""Which organs a finding lies in; it is on the host's side of the body."""
