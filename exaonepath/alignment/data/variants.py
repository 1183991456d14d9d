"""Variants that change a protein: classes of the MAF specification, and terms of the Sequence Ontology (VEP)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# Classes of the MAF specification that change the protein (or its splicing), as in maftools.
NON_SILENT = frozenset(
    {
        "Frame_Shift_Del",
        "Frame_Shift_Ins",
        "In_Frame_Del",
        "In_Frame_Ins",
        "Missense_Mutation",
        "Nonsense_Mutation",
        "Nonstop_Mutation",
        "Splice_Site",
        "Translation_Start_Site",
    }
)
SILENT = frozenset(
    {
        "3'Flank",
        "3'UTR",
        "5'Flank",
        "5'UTR",
        "De_novo_Start_InFrame",
        "De_novo_Start_OutOfFrame",
        "IGR",
        "Intron",
        "RNA",
        "Silent",
        "Splice_Region",
        "Targeted_Region",
        "Start_Codon_SNP",
        "lincRNA",
    }
)
# Terms that vcf2maf converts to one of `NON_SILENT`, and all other terms of VEP and SnpEff.
_CHANGING_TERMS = """
    transcript_ablation exon_loss_variant splice_acceptor_variant splice_donor_variant stop_gained
    frameshift_variant stop_lost start_lost initiator_codon_variant missense_variant coding_sequence_variant
    rare_amino_acid_variant conservative_missense_variant inframe_insertion inframe_deletion
    disruptive_inframe_insertion disruptive_inframe_deletion conservative_inframe_insertion
    conservative_inframe_deletion protein_altering_variant
"""
_SILENT_TERMS = """
    synonymous_variant stop_retained_variant start_retained_variant incomplete_terminal_codon_variant
    splice_region_variant splice_donor_5th_base_variant splice_donor_region_variant
    splice_polypyrimidine_tract_variant 5_prime_utr_variant 3_prime_utr_variant
    5_prime_utr_premature_start_codon_gain_variant intron_variant intragenic_variant intergenic_variant
    intergenic_region upstream_gene_variant downstream_gene_variant non_coding_transcript_exon_variant
    non_coding_transcript_variant non_coding_exon_variant nc_transcript_variant mature_mirna_variant
    nmd_transcript_variant coding_transcript_variant transcript_amplification tfbs_ablation tfbs_amplification
    tf_binding_site_variant regulatory_region_ablation regulatory_region_amplification regulatory_region_variant
    feature_elongation feature_truncation transcript_variant gene_variant sequence_variant
    conserved_intron_variant
"""
_CHANGES = {
    **dict.fromkeys((name.lower() for name in (*NON_SILENT, *_CHANGING_TERMS.split())), True),
    **dict.fromkeys((name.lower() for name in (*SILENT, *_SILENT_TERMS.split())), False),
}


def changes_protein(term: str) -> bool | None:
    """Whether a variant of this class or term changes the protein; None for an unknown one.

    A variant may have several terms, joined as in VEP ("missense_variant&splice_region_variant"). It changes the
    protein if one of them does. Otherwise, the result is None if one of them is unknown.
    """
    found = [_CHANGES.get(part.strip().lower()) for part in re.split(r"[&,;|]", term)]
    return True if True in found else None if None in found else False


def sort_terms(terms: Iterable[str]) -> tuple[set[str], dict[str, int]]:
    """(terms that change the protein, unknown terms with their numbers of occurrences, the most frequent first)."""
    counts = Counter(terms)
    known = {term: changes_protein(term) for term in counts}
    unknown = {term: count for term, count in counts.most_common() if known[term] is None}
    return {term for term, changes in known.items() if changes}, unknown
