"""Annotation in a matrix: rows and columns that describe features or patients and are no measurements.

The number, position or length of a gene is a column of numbers, like the column of a patient. Annotation with a usual
name is left out. For other candidates, the user is asked (by an error): a row or column is a candidate if other tables
name most of the other patients or features of the matrix, but not this one, and its name or its numbers differ from
theirs. The user answers with `annotation` in the settings of the matrix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from exaonepath.alignment.data.names import gene_of_date, is_no_name
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.text import few

_OF_FEATURES = """
    hugosymbol hugogenesymbol hgncsymbol hgncid symbol gene genes genename genenames genesymbol genesymbols
    genesymb geneid geneids entrez entrezid entrezgene entrezgeneid ncbigeneid ncbiid locusid locus ensembl
    ensemblid ensemblgene ensemblgeneid ensg transcript transcriptid ensembltranscriptid refseq refseqid uniprot
    uniprotid accession description genedescription genetype biotype genebiotype transcripttype featuretype
    cytoband cytobands band chromosome chrom chr chromosomename seqname seqnames contig start end stop
    startposition endposition startpos endpos chromstart chromend chrstart chrend genestart geneend genestartbp
    geneendbp position pos mapinfo coordinate genomiccoordinate strand width length genelength transcriptlength
    effectivelength efflength size genesize exonlength cdslength gccontent percentagegenegccontent
    compositeelementref composite probe probeid probename probeset probesetid cpg cpgid cpgisland
    relationtoisland infiniumdesigntype designtype ucscrefgenename ucscrefgenegroup featureid rowid reporterid
    spotid
"""
_OF_PATIENTS = """
    patient patientid patientidentifier sample sampleid sampleidentifier samplename sampletype
    tumorsamplebarcode barcode caseid case submitterid caseidentifier participantid subjectid age ageatdiagnosis
    agediagnosis sex gender race ethnicity osmonths ostime osstatus osevent dfsmonths dfsstatus pfsmonths
    pfsstatus pfitime pfi dsstime survivaltime vitalstatus dayslastfollowup daystodeath daystolastfollowup batch
    plate purity tumorpurity ploidy librarysize
"""
_KNOWN = frozenset([*_OF_FEATURES.split(), *_OF_PATIENTS.split()])

_FEWEST_KNOWN = 0.5  # share of the other names; if other tables name fewer, an unknown name has no meaning
_FEWEST_ALIKE = 0.9
_FAR = 100.0
_MOST_FEATURES = 5  # if more names have another form, the names of this table simply vary


def normalised(name: str) -> str:
    """Lower case without punctuation and blanks: "Entrez_Gene_Id" and "entrez gene ID" are one name."""
    name = name.lower()
    return name if name.isalnum() else re.sub(r"[\W_]+", "", name)  # the first check is fast, for 900,000 names


def is_annotation(name: str, declared: Collection[str] = ()) -> bool:
    """Whether a column of this name is annotation: by a usual name, or because the user declared it."""
    return name in declared or normalised(name) in _KNOWN


def without_annotation(
    where: str, table: ModalityTable, declared: Collection[str], report: CohortReport
) -> ModalityTable:
    """The table without patients and features whose names are those of annotation."""
    rows = [at for at, name in enumerate(table.patients) if is_annotation(name, declared)]
    columns = [at for at, name in enumerate(table.features) if is_annotation(name, declared)]
    if not rows and not columns:
        return table
    note_left_out(
        where, table.source, [*(table.patients[at] for at in rows), *(table.features[at] for at in columns)], report
    )
    table = table.take(np.setdiff1d(np.arange(len(table.patients)), rows))
    kept = np.setdiff1d(np.arange(len(table.features)), columns)
    return ModalityTable(
        table.patients, tuple(table.features[at] for at in kept), table.values[:, kept], table.scale, table.source
    )


def note_left_out(where: str, source: str, names: Sequence[str], report: CohortReport) -> None:
    """Report that these rows or columns were left out as annotation."""
    report.add(
        "note",
        "annotation",
        where,
        f"{source}: {len(names)} row(s) or column(s) of annotation left out: {few(names)}",
        features=names,
    )


def ask_about_strangers(
    matrices: Mapping[str, ModalityTable],
    declared: Mapping[str, Collection[str] | None],
    report: CohortReport,
    *,
    patients: Iterable[str],
    features: Iterable[str],
    labels: Iterable[str],
    same: Callable[[str], str] = str,
) -> None:
    """Report, as errors, patients or features of a matrix that look like annotation.

    Args:
        matrices: modality to matrix, patients in rows.
        declared: modality to the names that the user declares as annotation. None: nothing declared. For a list, even
            an empty one, no error is reported.
        report: receives the errors.
        patients: patients of slides, labels and other tables. features: features of other tables.
        labels: names of columns of the labels, without those that look like names of genes.
        same: converts the id of a sample to that of its patient.
    """
    odd = {name: _odd(table) for name, table in matrices.items()}
    written = {name: _odd_features(table.features) for name, table in matrices.items()}
    known, known_features = {same(patient) for patient in patients}, frozenset(features)
    for name, table in matrices.items():
        if declared.get(name) is not None:
            continue
        # Names that are unusual in another matrix too do not count as known: matrices of the same program have the same
        # annotation.
        elsewhere = known.union(
            *((same(p) for p in other.patients if p not in odd[at]) for at, other in matrices.items() if at != name)
        )
        usual = [patient for patient in table.patients if patient not in odd[name]]
        strange = [patient for patient in table.patients if patient in odd[name] and same(patient) not in elsewhere]
        known_share = sum(same(patient) in elsewhere for patient in usual) / max(1, len(usual))
        if strange and known_share >= _FEWEST_KNOWN:
            _ask(name, table.source, "patients", strange, "no other table names them, as it does the others", report)
        named = known_features.union(*(other.features for at, other in matrices.items() if at != name))
        called = sorted((set(labels) & set(table.features)) - named)
        if called:
            _ask(name, table.source, "features", called, "the labels have columns of these names", report)
        named = named.difference(*(written[at] for at in matrices if at != name)).union(known_features)
        alone = [feature for feature in written[name] if feature not in named and feature not in called]
        usual = [feature for feature in table.features if feature not in written[name]]
        if alone and sum(feature in named for feature in usual) >= _FEWEST_KNOWN * len(usual):
            _ask(name, table.source, "features", alone, "no other table names them, as it does the others", report)


def _ask(where: str, source: str, what: str, names: Sequence[str], why: str, report: CohortReport) -> None:
    answer = ", ".join(repr(name) for name in names[:3])
    report.add(
        "error",
        "annotation",
        where,
        f"{source}: {few(names)} may be {what} or annotation: {why}; set its `annotation` to [{answer}] to leave them "
        f"out, or to [] if they are {what}",
        features=names,
    )


def _odd(table: ModalityTable) -> set[str]:
    """Patients whose names have another form than nearly all others, or whose numbers are much larger."""
    shapes = [_shape(patient) for patient in table.patients]
    usual, count = Counter(shapes).most_common(1)[0] if shapes else ("", 0)
    odd: set[str] = set()
    if count >= _FEWEST_ALIKE * (len(shapes) - 1) and count > 2:
        odd.update(patient for patient, shape in zip(table.patients, shapes, strict=True) if shape != usual)
    if len(table.patients) > 2:
        size = np.concatenate([np.nansum(np.abs(block), axis=1) for _, block in table.row_blocks()])
        middle = float(np.median(size))
        odd.update(
            patient for patient, own in zip(table.patients, size, strict=True) if middle > 0 and own > _FAR * middle
        )
    return odd


def _shape(name: str) -> str:
    """The form of a name: "A" for each word of letters, "9" for each word with a digit, and the characters between."""
    return re.sub(r"[^\W_]+", lambda word: "A" if word.group().isalpha() else "9", name)


def _odd_features(features: Sequence[str]) -> tuple[str, ...]:
    """The few features whose names are written in another way than nearly all others; empty if the names vary."""
    ways = [_writing(name) for name in features]
    usual, count = Counter(ways).most_common(1)[0] if ways else ("", 0)
    odd = [name for name, way in zip(features, ways, strict=True) if way != usual]
    # Counts of unassigned reads are left out later, and warnings are logged for missing names and dates.
    odd = [name for name in odd if not (name.startswith(("__", "N_")) or is_no_name(name) or gene_of_date(name))]
    return tuple(odd) if len(odd) <= _MOST_FEATURES and count >= _FEWEST_ALIKE * len(features) - 1 else ()


def _writing(name: str) -> str:
    """Style of a name: whether it has lower case after the first letter (except "orf", as in C1orf112), and whether it
    has characters that names of genes do not have."""
    letters = (re.sub(r"orf(?=\d)", "", name) if "orf" in name else name)[1:]
    small = "" if letters == letters.upper() else "small"
    return small if name.isalnum() or not re.search(r"[_\s()%/]", name) else small + "marked"
