"""Which slides a command works on: files, folders, patterns; what is skipped, and what collides."""

import pickle

import pytest

from exaonepath.errors import IdCollisionError, OutputCollisionError, SettingsError, SlideOpenError
from exaonepath.slides.cohort.inputs import cohort_inputs
from exaonepath.slides.find import find_slides


@pytest.fixture
def tree(tmp_path):
    """A tree of empty files: what is found follows from names alone."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return tmp_path

    return make


def names(inputs):
    return [slide.id for slide in inputs.slides]


def test_a_folder_of_folders(tree, caplog):
    root = tree("b.svs", "p1/x/a.tif", "p1/c.ndpi", "p2/notes.txt", ".git/d.svs", "p2/._e.svs", "p2/f.qptiff")
    with caplog.at_level("WARNING"):
        found = cohort_inputs([root], recursive=True)
    assert names(found) == ["b", "c", "a"]
    assert {skipped.path.name: skipped.reason.split(" (")[0] for skipped in found.skipped} == {
        "._e.svs": "a hidden file",
        "f.qptiff": ".qptiff files",
    }
    assert "._e.svs is a hidden file" in caplog.text
    flat = cohort_inputs([root])
    assert names(flat) == ["b"]
    assert {skipped.path.name for skipped in flat.skipped} == {"a.tif", "c.ndpi"}
    assert "--recursive" in caplog.text


def test_as_many_hidden_files_as_slides_are_counted(tree, caplog):
    root = tree(*(f"{prefix}{at}.svs" for at in range(9) for prefix in ("s", "._s")))
    assert len(cohort_inputs([root]).skipped) == 9
    assert [record.message for record in caplog.records] == [
        f"{root} has 9 hidden files, such as {root / '._s0.svs'}, which are skipped"
    ]


def test_links_in_circles_end(tree):
    root = tree("a/one.svs", "b/two.svs")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "across").symlink_to(root / "a")
    assert sorted(names(cohort_inputs([root], recursive=True))) == ["one", "two"]


def test_a_link_to_a_folder_elsewhere_is_followed(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "far.svs").write_bytes(b"")
    root = tree("near.svs")
    (root / "link").symlink_to(other)
    assert names(cohort_inputs([root], recursive=True)) == ["near", "far"]


def test_a_broken_link_is_a_problem_and_the_others_are_kept(tree):
    root = tree("a/one.svs")
    (root / "a" / "two.svs").symlink_to(root / "gone.svs")
    found = cohort_inputs([root], recursive=True)
    assert names(found) == ["one"]
    assert "does not exist" in str(found.problems[0])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.svs", ["a", "b"]),
        ("**/*.svs", ["a", "b", "c"]),
        ("deep", ["c", "d"]),
        ("de*", ["c", "d"]),
        ("[ab].svs", ["a", "b"]),
        ("?.*", ["a", "b"]),
        ("**", ["a", "b", "c", "d"]),
    ],
)
def test_quoted_patterns(tree, pattern, expected):
    root = tree("a.svs", "b.svs", "n.txt", "deep/c.svs", "deep/d.tif", "deep/e.txt", "deep/.f.svs")
    assert sorted(names(cohort_inputs([root / pattern]))) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree):
    root = tree("[a].svs", "a.svs")
    assert names(cohort_inputs([root / "[a].svs"])) == ["[a]"]


@pytest.mark.parametrize(("pattern", "message"), [("*.ndpi", "no match"), ("*.txt", "no slide file")])
def test_a_pattern_without_slides(tree, pattern, message):
    root = tree("a.svs", "n.txt")
    (problem,) = cohort_inputs([root / pattern]).problems
    assert message in str(problem)
    with pytest.raises(SlideOpenError, match=message):
        find_slides([root / pattern])


def test_all_collisions_are_listed(tree):
    root = tree("p1/a.svs", "p2/a.svs", "p3/a.tif", "b.svs", "b_features.svs", "c.svs")
    with pytest.raises(IdCollisionError, match="--manifest") as caught:
        cohort_inputs([root], recursive=True)
    assert len(caught.value.problems) == 2
    text = str(caught.value)
    assert all(str(root / name) in text for name in ("p1/a.svs", "p2/a.svs", "p3/a.tif", "b_features.svs"))
    assert isinstance(caught.value, OutputCollisionError)
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems  # noqa: S301
    assert len(caught.value.lines) == 3


def test_a_file_that_is_named_twice_is_one_slide(tree):
    root = tree("a.svs")
    assert names(cohort_inputs([root / "a.svs", root, root / "*.svs"])) == ["a"]


@pytest.mark.parametrize("arguments", [((), None), (("a.svs",), "m.csv")])
def test_either_slides_or_a_manifest(arguments):
    with pytest.raises(SettingsError, match="slides, or a manifest"):
        cohort_inputs(*arguments)
