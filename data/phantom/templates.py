"""How a question may be put: several phrasings for each kind of question, in the benchmarks' forms.

``{x}`` is the thing asked about, ``{a}`` the same with its article, ``{xs}`` its plural; ``{history}`` and
``{slices}`` come from the case. No phrasing hints at an answer.
"""

_ARTICLE_AN = ("enlarged",)
_NO_ARTICLE = ("cardiomegaly", "splenomegaly", "fatty liver", "consolidation", "arterial calcification")
_SAME_PLURAL = (*_NO_ARTICLE, "kidneys", "lungs", "spine", "ribs", "effusion")


def plural(name: str) -> str:
    """The plural of a finding's name; a place behind it stays: "lung nodules in the left lung"."""
    name, place, organ = name.partition(" in the ")
    return (name if name in _SAME_PLURAL else name + "s") + place + organ


def with_article(name: str) -> str:
    """The name with "a" or "an" where English wants one."""
    if name in _NO_ARTICLE:
        return name
    return f"{'an' if name.startswith(_ARTICLE_AN) else 'a'} {name}"


TEMPLATES: dict[str, tuple[str, ...]] = {
    # 3D-RAD
    "existence": (
        "Does the CT scan reveal {a}?",
        "Does this CT image show {x}?",
        "Is {x} present on the CT scan?",
        "Is there evidence of {x} on this CT scan?",
        "Can {x} be detected on the CT scan?",
        "Does the CT scan demonstrate {x}?",
        "Can signs of {x} be recognized on this scan?",
        "Is {x} apparent on the CT images?",
    ),
    "which_side": (
        "Which side shows {x}?",
        "On which side is {x} observed?",
        "Where is the {x} seen: left, right or on both sides?",
        "Which side of the body is affected by {x}?",
    ),
    "more_prominent": (
        "Where is the {x} more prominent?",
        "Which side shows more prominent {x}?",
        "On which side is the {x} larger?",
    ),
    "renal_lesion_type": (
        "Which type of lesion is observed in the kidneys?",
        "What kind of renal lesion does the scan show?",
        "What is found in the kidneys on this scan?",
    ),
    "enlarged_organ": (
        "Which organ shows signs of enlargement?",
        "Which organ is enlarged on this CT scan?",
        "Of heart and spleen, which is enlarged?",
    ),
    "single_or_multiple": (
        "Are the {xs} on this scan single or multiple?",
        "Is the {x} solitary, or are there several?",
        "What best describes the number of {xs}: single or multiple?",
    ),
    "position": (
        "Where is the largest {x} located?",
        "What is the location of the largest {x}?",
        "In which part of the organ is the largest {x} found?",
        "Which area contains the largest {x}?",
    ),
    "effusion_type": (
        "Which type of effusion is present?",
        "What kind of effusion is noted on the scan?",
        "Which effusion does the CT scan show?",
    ),
    "liver_diagnosis": (
        "Which condition is noted in the liver?",
        "What is the diagnosis for the liver on this scan?",
        "What abnormality does the liver show?",
    ),
    "diameter": (
        "What is the diameter of the largest {x}?",
        "How large is the largest {x} at its longest diameter?",
        "What is the longest diameter of the largest {x}?",
    ),
    "ap_size": (
        "What is the AP size of the largest {x}?",
        "How far does the largest {x} extend from front to back?",
        "What is the front-to-back size of the largest {x}?",
    ),
    "craniocaudal_size": (
        "What is the craniocaudal size of the {x}?",
        "How long is the {x} from top to bottom?",
        "What is the head-to-foot extent of the {x}?",
    ),
    "thickness": (
        "What is the thickness of the {x} at its thickest point?",
        "How thick is the {x} where it is thickest?",
        "What thickness does the {x} reach?",
    ),
    "static": (
        "Compared with the prior scan, what is the current status of {x}?",
        "With the prior scan beside it, how would you classify the {x} on the current CT scan?",
        "How should the {x} be interpreted from the prior and the current CT scan?",
        "Considering both scans, what is your assessment of {x}?",
    ),
    "static_change": (
        "Compared with the prior scan, how has the extent of the {x} changed?",
        "How does the extent of the {x} compare with the prior scan?",
        "What has happened to the {x} since the prior scan?",
    ),
    "longitudinal": (
        "Scans before the prior one showed {x} as: {history}. (Note: 0 indicates absence, and 1 indicates "
        "presence.) What is the status of {x} from the prior scan to the current one?",
        "Earlier {x} sequences, prior and current scan not included: {history}. (Note: 0 indicates absence, "
        "and 1 indicates presence.) How has {x} changed between the prior and the current scan?",
        "Sequence history for {x} up to the prior scan: {history}. (Note: 0 indicates absence, and 1 "
        "indicates presence.) From the prior scan to now, what best describes {x}?",
    ),
    "longitudinal_change": (
        "Scans before the prior one showed {x} as: {history}. (Note: 0 indicates absence, and 1 indicates "
        "presence.) How has the extent of the {x} changed between the prior and the current scan?",
        "Earlier {x} sequences, prior and current scan not included: {history}. (Note: 0 indicates absence, "
        "and 1 indicates presence.) How does the extent of the {x} compare with the prior scan?",
    ),
    # Only in the biased version: the history ends with the prior scan, as in 3D-RAD.
    "longitudinal_biased": (
        "Past sequences of {x}: {history}. (Note: 0 indicates absence, and 1 indicates presence.) What is "
        "the current CT assessment of {x} based on prior sequences?",
        "Scans showed {x} as: {history}. (Note: 0 indicates absence, and 1 indicates presence.) How has "
        "{x} progressed according to its temporal sequence?",
    ),
    # DeepTumorVQA
    "lesion_volume": (
        "What is the volume of the largest {x}?",
        "What is the volume of the largest {x} in this CT scan, in ml?",
        "How many millilitres does the largest {x} measure?",
    ),
    "organ_hu": (
        "What is the mean attenuation of the {x} in HU?",
        "What is the mean HU value of the {x}?",
        "How many Hounsfield units does the {x} measure on average?",
    ),
    "organ_volume": (
        "What is the volume of the {x}?",
        "What is the total volume of the {x}, in ml?",
        "How large is the volume of the {x}, in millilitres?",
    ),
    "hu_ratio": (
        "What is the ratio of mean liver HU to mean spleen HU?",
        "How does liver attenuation relate to spleen attenuation, as a ratio?",
    ),
    "tumor_burden": (
        "What percentage of the {x} is occupied by lesions?",
        "What share of the {x} volume do its lesions take, in percent?",
    ),
    "lesion_existence": (
        "Is there {a} in this CT scan?",
        "Does this scan contain {a}?",
        "Based on the CT scan, is {a} present?",
        "Can {a} be identified on this scan?",
    ),
    "count": (
        "How many {xs} are there in this CT scan?",
        "What is the number of {xs} on this scan?",
        "Count the {xs}: how many are seen?",
    ),
    "count_by_location": (
        "How many {xs} can be counted?",
        "What is the number of {xs}?",
        "Count the {xs}.",
    ),
    "attenuation": (
        "Relative to the surrounding organ, what is the attenuation of the largest {x}?",
        "How does the largest {x} appear against the organ around it?",
        "Is the largest {x} hypo-, iso- or hyperattenuating?",
    ),
    "largest_slice": (
        "On which axial slice is the largest {x} cut at its widest? The scan has {slices} slices, counted "
        "from the feet.",
        "Which of the {slices} axial slices, counted from the feet, shows the largest {x} at its widest?",
    ),
    "kidney_comparison": (
        "Which kidney has the larger volume?",
        "Comparing both kidneys by volume, which is larger?",
        "Which of the two kidneys is bigger?",
    ),
    "kidney_asymmetry": (
        "Do the kidney volumes differ by more than 20 %?",
        "Is there a kidney volume asymmetry of more than 20 %?",
    ),
    "enlargement": (
        "Is the {x} enlarged?",
        "Does this scan show an enlarged {x}?",
        "Is enlargement of the {x} present?",
    ),
    "liver_halves": (
        "Which half of the liver contains more lesion volume?",
        "Comparing the upper and the lower half of the liver, which holds more lesion volume?",
    ),
    "clustering": (
        "Do all liver lesions lie in the same half (upper or lower) of the liver?",
        "Are the liver lesions confined to one half, upper or lower, of the liver?",
    ),
    "burden_comparison": (
        "Which organ carries the largest lesion volume?",
        "Comparing the organs, where is the total lesion volume greatest?",
        "Which organ has the greatest lesion burden?",
    ),
    "hu_difference": (
        "By how many HU does the {x} differ from the organ around it?",
        "What is the HU difference between the {x} and its organ?",
    ),
    "fatty_liver": (
        "Does the liver attenuation indicate fatty liver?",
        "Judging liver against spleen attenuation, is hepatic steatosis present?",
    ),
    "steatosis_grade": (
        "How would you grade hepatic steatosis from liver and spleen attenuation?",
        "What is the grade of hepatic steatosis on this scan?",
    ),
    "splenomegaly_grade": (
        "How would you grade splenomegaly by splenic volume?",
        "What is the grade of splenomegaly on this scan?",
    ),
    "lesion_class": (
        "Is the largest kidney lesion more likely a cyst or a tumour?",
        "How should the largest kidney lesion be classified?",
        "What type is the largest renal lesion?",
    ),
    "renal_mass": (
        "How is the largest renal mass best characterized?",
        "Which description fits the largest renal mass?",
    ),
    # M3D
    "plane": (
        "In which plane is the largest cross-section of the {x} found?",
        "Which plane cuts the {x} with the largest area?",
        "Axial, coronal or sagittal: which plane shows the largest section of the {x}?",
    ),
    "phase": (
        "What is the contrast phase of this CT scan?",
        "In which contrast phase was this scan taken?",
        "Which phase does the enhancement suggest?",
    ),
    "organ": (
        "In which organ is the largest focal lesion located?",
        "Which organ contains the largest focal lesion?",
        "The largest focal lesion of this scan lies in which organ?",
    ),
    "abnormality": (
        "Which of these abnormalities is present?",
        "What abnormality can be seen in this scan?",
        "Which abnormality does the CT image show?",
    ),
    "location": (
        "Where is the largest {x} located, left or right?",
        "On which side of the body does the largest {x} lie?",
        "Is the largest {x} on the left or the right side?",
    ),
    "report": (
        "Write the findings report of this CT scan.",
        "Describe the findings of this CT scan.",
        "Please give a findings report for this scan.",
        "What are the findings on this chest-abdomen CT?",
    ),
}
