"""Phantom scenes: the truth is what the label map holds, and every plan is clearly visible in it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from anatomy import PHASE_HU, draw_tissues
from atlas import Atlas, read_mapping
from canvas import bounding_box
from findings import ALL, CHANGES, COARSE, lesion_hu, plan_pair, plan_scan
from labels import BODY, FINDINGS, HOSTS, ORGANS, PHASES, STATES
from measure import Component, Measured, change, mirror
from scene import Case, SceneOptions, draw, draw_pair, patient, render, stream

from mllm3d.errors import UserError

SEEDS = range(60)
PAIR_SEEDS = range(20)
COARSE_GRID = SceneOptions(shape=(20, 40, 40))


def measured(case: Case) -> Measured:
    return Measured(case.labels, case.spacing_mm, case.painted_hu)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Scans of all seeds; the images are dropped, the label maps are what is tested."""
    return [replace(draw(seed), image=np.zeros(1, np.int16)) for seed in SEEDS]


@pytest.fixture(scope="module")
def measures(cases: list[Case]) -> list[Measured]:
    return [measured(case) for case in cases]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Measured, Measured]]:
    drawn = [draw_pair(seed) for seed in PAIR_SEEDS]
    return [(measured(prior), measured(current)) for prior, current in drawn]


# ---- cases ----


def test_case_is_a_ct_with_its_label_map():
    case = draw(3)
    assert case.image.dtype == np.int16 and case.labels.dtype == np.uint8
    assert case.image.shape == case.labels.shape
    assert case.image.min() >= -1024 and case.image.max() > 200
    assert case.phase in PHASES
    lungs = (case.labels == ORGANS["left lung"]) | (case.labels == ORGANS["right lung"])
    assert np.median(case.image[lungs]) < -700
    assert 80 < np.median(case.image[case.labels == ORGANS["spine"]]) < 400


def test_axes_point_to_head_back_and_left(measures: list[Measured]):
    for m in measures[:12]:
        at = {name: np.argwhere(m.labels == ORGANS[name]).mean(0) for name in ORGANS}
        assert at["heart"][0] > at["left kidney"][0]
        assert at["spine"][1] > at["stomach"][1]
        assert at["spleen"][2] > at["spine"][2] > at["liver"][2]
        assert at["left kidney"][2] > at["right kidney"][2]


def test_same_seed_same_bytes():
    for one, two in ((draw(5), draw(5)), (draw_pair(5)[1], draw_pair(5)[1])):
        assert one.image.tobytes() == two.image.tobytes()
        assert one.labels.tobytes() == two.labels.tobytes()
        assert (one.spacing_mm, one.painted_hu, one.phase) == (two.spacing_mm, two.painted_hu, two.phase)
    assert draw(5).image.tobytes() != draw(6).image.tobytes()


def test_the_cases_differ(cases: list[Case]):
    assert len({case.labels.shape for case in cases}) > 30
    slices = [case.spacing_mm[0] for case in cases]
    assert min(slices) < 4.5 and max(slices) > 5.5
    assert {case.phase for case in cases} == set(PHASES)
    liver = [measured(case).volume_ml("liver") for case in cases]
    assert max(liver) > 1.4 * min(liver)


def test_every_organ_is_in_every_case(measures: list[Measured]):
    for m in measures:
        assert all(m.volume_ml(organ) > 15 for organ in ORGANS)
        assert 500 < m.volume_ml("liver") < 2200
        assert 60 < m.volume_ml("left kidney") < 320


def test_painted_hu_names_what_the_map_holds(cases: list[Case]):
    for case in cases:
        held = {name for name, i in {**ORGANS, **FINDINGS}.items() if (case.labels == i).any()}
        assert set(case.painted_hu) == held


def test_contrast_phase_can_be_seen(cases: list[Case]):
    aorta = {p: [c.painted_hu["aorta"] for c in cases if c.phase == p] for p in PHASES}
    assert min(aorta["arterial"]) > max(aorta["portal venous"]) + 50
    assert min(aorta["portal venous"]) > max(aorta["delayed"]) + 20
    assert min(aorta["delayed"]) > max(aorta["non-contrast"]) + 30


# ---- findings ----


def test_every_plan_is_drawn(measures: list[Measured]):
    for seed, m in zip(SEEDS, measures, strict=True):
        plan = plan_scan(stream(seed, "scan"), SceneOptions().shares)
        missing = [name for name in ALL if m.present(name) != (plan[name][0] is not None)]
        assert not [name for name in missing if name in COARSE]
        assert len(missing) <= 1


def test_prevalence(measures: list[Measured]):
    shares = SceneOptions().shares
    for name in ALL:
        seen = np.mean([m.present(name) for m in measures])
        assert abs(seen - shares[name]) < 0.2, name


def test_prevalence_can_be_set():
    options = SceneOptions(prevalence={name: float(name == "pleural effusion") for name in ALL})
    for seed in range(4):
        m = measured(draw(seed, options))
        assert [name for name in ALL if m.present(name)] == ["pleural effusion"]


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="unknown finding 'cold'"):
        SceneOptions(prevalence={"cold": 0.5})
    with pytest.raises(ValueError, match="not between 0 and 1"):
        SceneOptions(prevalence={"fatty liver": 1.5})
    with pytest.raises(ValueError, match="at least 16"):
        SceneOptions(shape=(4, 112, 112))


def test_nothing_is_thinner_than_three_voxels(measures: list[Measured]):
    coarse = [measured(draw(seed, COARSE_GRID)) for seed in range(12)]
    for m in (*measures, *coarse):
        for finding in FINDINGS:
            for part in m.components(finding):
                assert min(part.mask.shape) >= 3, finding
                assert part.voxels >= 15


def test_coarse_grids_leave_small_lesions_out():
    m = [measured(draw(seed, COARSE_GRID)) for seed in range(12)]
    assert not any(x.visible("lung nodule") for x in m)
    assert any(x.visible("pleural effusion") for x in m)


def test_instances_are_whole_and_counted(measures: list[Measured]):
    """Round lesions fill a good part of their box: a count is never of crumbs of one lesion."""
    limits = {"pleural effusion": 2, "pericardial effusion": 1, "consolidation": 2, "kidney tumour": 1}
    for m in measures:
        for finding in FINDINGS:
            parts = m.components(finding)
            assert sum(p.voxels for p in parts) == (m.labels == FINDINGS[finding]).sum()
            assert len(parts) <= limits.get(finding, 4)
            if finding not in ("pleural effusion", "pericardial effusion", "consolidation"):
                assert all(p.mask.mean() > 0.4 for p in parts)


def test_findings_lie_in_or_beside_their_host(measures: list[Measured]):
    for m in measures:
        for finding, hosts in HOSTS.items():
            for part in m.components(finding):
                reach = [int(np.ceil(8 / s)) for s in m.spacing_mm]
                near = m.labels[
                    tuple(slice(max(s.start - r, 0), s.stop + r) for s, r in zip(part.box, reach, strict=True))
                ]
                wanted = [ORGANS[h] for h in hosts] or [BODY]
                assert np.isin(near, wanted).any(), finding


def test_states_keep_away_from_their_thresholds(measures: list[Measured]):
    for m in measures:
        ratio, deficit = m.cardiothoracic_ratio(), m.liver_deficit_hu()
        assert ratio is not None and (ratio < 0.47 or ratio > 0.53)
        assert deficit is not None and (deficit < 15 or deficit > 25)
        if m.present("splenomegaly"):
            assert m.volume_ml("spleen") > 420
        else:
            assert m.volume_ml("spleen") < 290 and (m.spleen_extent_mm() or 0) < 124


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("deficit", [-14.0, 8.0, 30.0, 52.0])
def test_lesions_stand_out_in_every_phase(phase: str, deficit: float):
    hosts = {
        "liver lesion": ("liver",),
        "kidney cyst": ("cortex", "medulla"),
        "kidney tumour": ("cortex", "medulla"),
        "pancreatic lesion": ("pancreas",),
        "arterial calcification": ("artery",),
    }
    assert set(PHASE_HU) == set(PHASES)
    for seed in range(20):
        tissue = draw_tissues(phase, deficit, np.random.default_rng(seed))
        for finding, names in hosts.items():
            for contrast in (0.0, 0.5, 1.0):
                for name in names:
                    assert abs(lesion_hu(finding, tissue, contrast) - tissue[name]) >= 20, (finding, name)


# ---- measurements ----


def box_map(*boxes: tuple[int, tuple[slice, slice, slice]]) -> np.ndarray:
    labels = np.zeros((12, 40, 40), np.uint8)
    labels[:, 4:36, 4:36] = BODY
    for value, box in boxes:
        labels[box] = value
    return labels


def test_measures_on_a_known_map():
    labels = box_map(
        (ORGANS["right lung"], np.s_[2:10, 10:30, 6:16]),
        (ORGANS["left lung"], np.s_[2:10, 10:30, 24:34]),
        (ORGANS["heart"], np.s_[4:7, 12:20, 16:26]),
        (ORGANS["spleen"], np.s_[0:2, 20:30, 24:30]),
        (FINDINGS["lung nodule"], np.s_[3:6, 22:25, 8:11]),
        (FINDINGS["lung nodule"], np.s_[3:6, 22:26, 29:33]),
    )
    m = Measured(labels, (5.0, 3.0, 2.0), {"liver": 30.0, "spleen": 50.0})
    assert m.cardiothoracic_ratio() == pytest.approx(10 / 28)
    assert m.spleen_extent_mm() == 30.0
    assert m.volume_ml("spleen") == pytest.approx(2 * 10 * 6 * 0.03)
    assert m.volume_ml("right lung") == pytest.approx(8 * 20 * 10 * 0.03)
    large, small = m.components("lung nodule")
    assert (large.voxels, small.voxels) == (48, 27)
    assert (m.side(large), m.side(small)) == ("left", "right")
    assert (m.host(large), m.host(small)) == ("left lung", "right lung")
    assert m.largest_diameter_mm(small) == pytest.approx(np.hypot(2 * 3, 2 * 2) + 2.5)
    assert large.centre == (4.0, 23.5, 30.5)
    assert m.liver_deficit_hu() == 20.0 and m.present("fatty liver")
    assert not m.present("cardiomegaly") and not m.present("liver lesion")


def test_diagonal_neighbours_are_one_component():
    labels = box_map((FINDINGS["liver lesion"], np.s_[2:5, 10:13, 10:13]))
    labels[5, 13, 13] = FINDINGS["liver lesion"]
    assert Measured(labels, (1.0, 1.0, 1.0), {}).count("liver lesion") == 1
    labels[5, 13, 13], labels[6, 14, 14] = BODY, FINDINGS["liver lesion"]
    assert Measured(labels, (1.0, 1.0, 1.0), {}).count("liver lesion") == 2


def test_what_is_not_in_view_is_not_measured():
    m = Measured(box_map(), (1.0, 1.0, 1.0), {})
    assert m.cardiothoracic_ratio() is None and m.spleen_extent_mm() is None and m.liver_deficit_hu() is None
    assert not any(m.present(name) for name in ALL)
    with pytest.raises(KeyError, match="cold"):
        m.present("cold")


def test_organ_volumes_count_the_lesions_in_them(measures: list[Measured]):
    m = next(m for m in measures if m.visible("liver lesion"))
    healthy = m.labels.copy()
    healthy[healthy == FINDINGS["liver lesion"]] = ORGANS["liver"]
    assert Measured(healthy, m.spacing_mm, {}).volume_ml("liver") == pytest.approx(m.volume_ml("liver"))


def answers(m: Measured, part: Component) -> tuple[object, ...]:
    return part.voxels, round(m.largest_diameter_mm(part), 6), m.largest_slice(part), m.side(part)


def test_mirroring_swaps_left_and_right_and_nothing_else(measures: list[Measured]):
    swap = {"left": "right", "right": "left"}
    for m in measures[:20]:
        other = Measured(mirror(m.labels), m.spacing_mm, m.painted_hu)
        for finding in FINDINGS:
            here = sorted(answers(m, part) for part in m.components(finding))
            there = sorted((*a[:3], swap[str(a[3])]) for a in (answers(other, p) for p in other.components(finding)))
            assert here == there, finding
        assert {n: m.present(n) for n in ALL} == {n: other.present(n) for n in ALL}
        for organ in ORGANS:
            first, *rest = organ.split()
            twin = " ".join([swap.get(first, first), *rest])
            assert m.volume_ml(organ) == pytest.approx(other.volume_ml(twin))
        assert m.cardiothoracic_ratio() == other.cardiothoracic_ratio()
        assert m.spleen_extent_mm() == other.spleen_extent_mm()


def test_mirror_is_its_own_inverse():
    labels = draw(0).labels
    assert (mirror(mirror(labels)) == labels).all()
    assert (mirror(labels) != labels).any()


def test_both_sides_occur(measures: list[Measured]):
    for finding in ("pleural effusion", "lung nodule", "kidney cyst", "enlarged lymph node"):
        sides = Counter(m.side(part) for m in measures for part in m.components(finding))
        assert min(sides["left"], sides["right"]) >= 0.2 * sides.total(), finding


# ---- pairs ----


def planned_change(course: tuple[float | None, ...]) -> str:
    before, after = course
    if before is None or after is None:
        return "absent" if before is after else ("new" if before is None else "gone")
    return "unchanged" if before == after else ("grown" if after > before else "shrunk")


def test_pairs_show_the_planned_change(pairs: list[tuple[Measured, Measured]]):
    for seed, (prior, current) in zip(PAIR_SEEDS, pairs, strict=True):
        plan = plan_pair(stream(seed, "pair"), SceneOptions().shares)
        for name in ALL:
            planned, seen = planned_change(plan[name]), change(prior, current, name)
            assert seen == planned or (seen == "absent" and name not in COARSE), (seed, name)


def test_pairs_share_the_patient(pairs: list[tuple[Measured, Measured]]):
    for prior, current in pairs:
        assert prior.spacing_mm == current.spacing_mm and prior.labels.shape == current.labels.shape
        assert ((prior.labels == ORGANS["spine"]) == (current.labels == ORGANS["spine"])).all()


def test_a_lesion_stays_where_it_was(pairs: list[tuple[Measured, Measured]]):
    checked = 0
    for prior, current in pairs:
        for name in (
            "lung nodule",
            "liver lesion",
            "kidney cyst",
            "pancreatic lesion",
            "enlarged lymph node",
        ):
            before = sorted(part.centre for part in prior.components(name))
            after = sorted(part.centre for part in current.components(name))
            if before and after:
                checked += 1
                assert np.allclose(before, after, atol=0.51)
    assert checked > 12


def test_fluid_keeps_its_volume_while_the_heart_grows():
    plan: dict[str, tuple[float | None, ...]] = {name: (None, None) for name in ALL}
    plan |= {"cardiomegaly": (None, 1.0), "pericardial effusion": (0.4, 0.4), "pleural effusion": (0.4, 0.4)}
    for seed in range(3):
        prior, current = (measured(case) for case in render(seed, plan, patient(seed, SceneOptions())))
        assert change(prior, current, "cardiomegaly") == "new"
        for name in ("pericardial effusion", "pleural effusion"):
            assert change(prior, current, name) == "unchanged"
            assert current.volume_ml(name) == pytest.approx(prior.volume_ml(name), rel=0.05)


def test_changes_are_balanced():
    shares = SceneOptions().shares
    plans = [plan_pair(np.random.default_rng(seed), shares) for seed in range(400)]
    seen = Counter(planned_change(plan[name]) for plan in plans for name in COARSE)
    present = sum(plan[name][1] is not None for plan in plans for name in COARSE) / (400 * len(COARSE))
    assert present == pytest.approx(0.5, abs=0.04)
    for kind in CHANGES:
        assert seen[kind] / seen.total() == pytest.approx(0.125, abs=0.025), kind


# ---- atlas ----


@pytest.fixture
def small_atlas(tmp_path: Path) -> tuple[Path, Path]:
    """A label map of boxes, stored in RAS order: chest and abdominal organs and a rib."""
    names = {
        1: "lung_lower_lobe_left", 2: "lung_lower_lobe_right", 3: "heart", 4: "liver", 5: "spleen",
        6: "kidney_left", 7: "kidney_right", 8: "aorta", 9: "vertebrae_T12", 10: "rib_left_9", 11: "colon",
    }  # fmt: skip
    voxels = np.zeros((72, 56, 60), np.uint8)  # (right to left reversed: index grows to the right), front, head
    for value, x, y, z in (
        (1, (6, 30), (8, 50), (32, 58)), (2, (42, 66), (8, 50), (32, 58)), (3, (26, 46), (28, 44), (34, 50)),
        (4, (36, 66), (12, 48), (8, 30)), (5, (8, 22), (10, 26), (14, 28)), (6, (16, 26), (12, 22), (2, 13)),
        (7, (46, 56), (12, 22), (0, 8)), (8, (32, 38), (18, 24), (0, 46)), (9, (30, 42), (6, 17), (0, 60)),
        (10, (2, 5), (10, 40), (20, 24)), (11, (22, 34), (36, 46), (4, 20)),
    ):  # fmt: skip
        voxels[slice(*x), slice(*y), slice(*z)] = value
    path, mapping = tmp_path / "labels.nii.gz", tmp_path / "names.json"
    nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), path)
    mapping.write_text(json.dumps({str(k): v for k, v in names.items()}))
    return path, mapping


def test_atlas_becomes_a_case(small_atlas: tuple[Path, Path]):
    options = SceneOptions(prevalence={"fatty liver": 1.0, "pleural effusion": 1.0})
    case = Atlas.load(*small_atlas).draw(1, options)
    m = measured(case)
    assert case.image.shape == case.labels.shape and case.image.dtype == np.int16
    for organ in (
        "left lung",
        "right lung",
        "heart",
        "liver",
        "spleen",
        "left kidney",
        "aorta",
        "spine",
        "ribs",
    ):
        assert m.visible(organ), organ
    assert m.present("fatty liver") and m.present("pleural effusion")
    at = {name: np.argwhere(case.labels == ORGANS[name]).mean(0) for name in ("liver", "spleen", "heart", "spine")}
    assert at["spleen"][2] > at["liver"][2] and at["heart"][0] > at["liver"][0]
    assert at["spine"][1] > at["heart"][1]
    rows = bounding_box(case.labels > 0)
    assert (rows[1].stop - rows[1].start) * case.spacing_mm[1] > 150


def test_atlas_findings_keep_the_rules(small_atlas: tuple[Path, Path]):
    atlas = Atlas.load(*small_atlas)
    seen: set[str] = set()
    for seed in range(8):
        m = measured(atlas.draw(seed))
        for finding in FINDINGS:
            parts = m.components(finding)
            assert all(min(part.mask.shape) >= 3 for part in parts)
            seen |= {finding} if parts else set()
    assert {"pleural effusion", "consolidation", "pericardial effusion", "liver lesion"} <= seen


def test_atlas_is_warped_and_repeatable(small_atlas: tuple[Path, Path]):
    atlas = Atlas.load(*small_atlas)
    one, again = atlas.draw(2), atlas.draw(2)
    assert one.image.tobytes() == again.image.tobytes()
    prior, current = atlas.draw_pair(2)
    assert prior.labels.shape == current.labels.shape
    liver = [measured(atlas.draw(seed)).volume_ml("liver") for seed in range(4)]
    assert max(liver) > 1.02 * min(liver)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('{"1": "liver", ', "not a JSON object"),
        ('["liver"]', "not a JSON object"),
        ('{"1": "liver"}', "no name for label 2"),
        ('{"1": "livr", "2": "liver"}', "did you mean 'liver'"),
        ('{"1": "gallbladder", "2": "colon"}', "no organ of the phantom"),
        ('{"1": "liver", "300": "spleen"}', "between 0 and 255"),
    ],
)
def test_wrong_label_names_are_one_line(tmp_path: Path, names: str, message: str):
    voxels = np.ones((8, 8, 8), np.uint8)
    voxels[4:] = 2
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "labels.nii.gz")
    (tmp_path / "names.json").write_text(names)
    with pytest.raises(UserError, match=message) as caught:
        Atlas.load(tmp_path / "labels.nii.gz", tmp_path / "names.json")
    assert "\n" not in str(caught.value)


def test_missing_label_names_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_mapping(tmp_path / "names.json")


def test_atlas_of_a_real_ct(real_data: Path):
    folder = real_data / "totalsegmentator"
    label_map, mapping = folder / "example_seg_fast_force_split.nii.gz", folder / "labels_total_v2.json"
    if not label_map.is_file():
        pytest.skip(f"no real data: {label_map} is not there")
    m = measured(Atlas.load(label_map, mapping).draw(0))
    assert 800 < m.volume_ml("liver") < 1500
    assert not m.present("splenomegaly") and not m.visible("heart")
    liver, spleen = (np.argwhere(m.labels == ORGANS[name]).mean(0) for name in ("liver", "spleen"))
    assert spleen[2] > liver[2]


def test_the_lists_of_findings_agree():
    assert set(ALL) == set(FINDINGS) | set(STATES)
    assert set(COARSE) < set(ALL)
