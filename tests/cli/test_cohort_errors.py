"""What is wrong with a cohort, as `train` tells it: every reason on a line of its own, names escaped."""


def test_every_reason_has_a_line_and_no_name_breaks_one(run, tmp_path):
    (tmp_path / "rna.csv").write_text("id,A\np1,1\np2,high\n")
    (tmp_path / "cnv.csv").write_text('id,A\np1,1\np2,"x\x1b[31m\ry"\n')
    (tmp_path / "s.toml").write_text("[data.tables]\nrna = { path = 'rna.csv' }\ncnv = { path = 'cnv.csv' }\n")
    done = run("train", tmp_path / "s.toml", "-o", tmp_path / "run")
    assert done.exit_code == 1
    assert "\\x0a" not in done.stderr
    assert "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    lines = lines[lines.index("error: the cohort cannot be used, for 3 reasons:") :]
    assert [line[:8] for line in lines[1:]] == ["  - rna:", "  - cnv:", "  - coho"]
